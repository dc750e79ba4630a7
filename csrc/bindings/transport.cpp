#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/digest_pages.hpp"
#include "kvlink/cpu/relayout_pages.hpp"
#include "kvlink/transport/host_shm/control.hpp"
#include "kvlink/transport/host_shm/transfer.hpp"
#include "pool.hpp"
#include "register.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

using namespace kvlink::transport;
using host_shm::Control;
using host_shm::ShmTransfer;
using host_shm::Worker;

using PageArray = py::array_t<int32_t, py::array::c_style>;
using GenerationArray = py::array_t<uint32_t, py::array::c_style>;

constexpr Executor kExecutor{.relayout = &cpu::relayout_pages, .digest = &cpu::digest_pages};
constexpr int64_t kSignalSlice = 100'000'000;  // ns between two looks for Ctrl-C

// Waits in slices without the GIL, so that signals are handled. `wait(deadline)` gives kPending.
template <typename Wait>
Status wait_in_slices(int64_t deadline_ns, Wait wait) {
  while (true) {
    Status status;
    {
      py::gil_scoped_release release;
      status = wait(std::min(deadline_ns, now_ns() + kSignalSlice));
    }
    if (status != Status::kPending || now_ns() >= deadline_ns) return status;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

// A reference to a Python object that a C++ thread may be the last to drop.
std::shared_ptr<void> hold(py::object object) {
  return {new py::object(std::move(object)), [](void* held) {
            if (!Py_IsInitialized()) return;
            py::gil_scoped_acquire gil;
            delete static_cast<py::object*>(held);
          }};
}

std::vector<int32_t> to_vector(const PageArray& pages) {
  return {pages.data(), pages.data() + pages.size()};
}

SlotKey open_slot(Control& self, uint32_t slot, SlotKind kind, const py::bytes& transfer_id_bytes,
                  int64_t deadline_ns, uint32_t num_layers, uint64_t rows_per_layer,
                  uint32_t num_pulls, bool with_digest, uint64_t first_page,
                  const PageArray& pages) {
  SlotTerms terms{.kind = kind,
                  .transfer_id = {0, 0},
                  .deadline_ns = deadline_ns,
                  .num_layers = num_layers,
                  .rows_per_layer = rows_per_layer,
                  .num_pulls = num_pulls,
                  .with_digest = with_digest,
                  .pages = pages.data(),
                  .num_pages = static_cast<uint32_t>(pages.size())};
  const std::string_view transfer_id(transfer_id_bytes);
  KVLINK_CHECK(transfer_id.size() == 16, "transfer_id: expected 16 bytes; got ",
               transfer_id.size());
  std::memcpy(terms.transfer_id, transfer_id.data(), 16);
  return self.open(slot, first_page, terms);
}

// What Grant keeps for verify, made once.
struct GrantedPages {
  host_shm::OwnPages own;
  py::object keep_alive;
};

void set_generations(host_shm::OwnPages& own, const std::vector<int32_t>& pages,
                     const std::optional<GenerationArray>& generations, int64_t num_pages) {
  if (!generations) return;
  KVLINK_CHECK(generations->size() == num_pages, "generations: expected ", num_pages,
               " entries; got ", generations->size());
  own.generations = generations->data();
  for (const int32_t page : pages) {
    KVLINK_CHECK(page >= 0 && page < num_pages, "pages: expected ids in [0, ", num_pages, "); got ",
                 page);
    own.granted.push_back(own.generations[page]);
  }
}

GrantedPages make_granted(const PoolView& pool, std::vector<int32_t> model_layers,
                          int32_t model_head, const PageArray& pages, int64_t num_tokens,
                          const std::optional<GenerationArray>& generations) {
  KVLINK_CHECK(model_layers.size() == pool.stored_layers.size(), "model_layers: expected ",
               pool.stored_layers.size(), "; got ", model_layers.size());
  GrantedPages granted{.own = {.layers = pool.stored_layers,
                               .model_layers = std::move(model_layers),
                               .model_head = model_head,
                               .pages = to_vector(pages),
                               .num_tokens = num_tokens,
                               .generations = nullptr,
                               .granted = {}},
                       .keep_alive = py::make_tuple(pool.owner, generations)};
  set_generations(granted.own, granted.own.pages, generations, pool.stored_layers[0].num_pages);
  return granted;
}

// A connected peer: its control segment, our bit in it and the thread that moves pages.
struct ShmLink {
  std::shared_ptr<Control> control;
  uint32_t bit;
  std::shared_ptr<Worker> worker = std::make_shared<Worker>();

  ShmLink(std::shared_ptr<Control> control, uint32_t bit) : control(std::move(control)), bit(bit) {}
  ShmLink(const ShmLink&) = delete;
  ~ShmLink() { close(Status::kCancelled); }

  void close(Status status) const {
    py::gil_scoped_release release;
    worker->close(status);
  }
};

using Parts = std::vector<std::array<int32_t, 3>>;  // (src_layer, dst_layer, model_layer)

py::object begin(const ShmLink& self, SlotKind kind, SlotKey key, const Parts& parts,
                 std::array<int32_t, 4> heads, const PoolView& src, const PoolView& dst,
                 const PageArray& src_pages, const PageArray& dst_pages, int64_t num_tokens,
                 const std::optional<GenerationArray>& dst_generations) {
  host_shm::TransferSpec spec{
      .kind = kind,
      .key = key,
      .bit = self.bit,
      .plan = {.parts = {},
               .num_heads = heads[0],
               .src_head = heads[1],
               .dst_head = heads[2],
               .model_head = heads[3]},
      .src = {src.stored_layers},
      .dst = {dst.stored_layers},
      .src_pages = to_vector(src_pages),
      .dst_pages = to_vector(dst_pages),
      .num_tokens = num_tokens,
      .own = {},
      .keep_alive = hold(py::make_tuple(src.owner, dst.owner, dst_generations))};
  for (const auto& [src_layer, dst_layer, model_layer] : parts) {
    spec.plan.parts.push_back({src_layer, dst_layer, model_layer});
  }
  set_generations(spec.own, spec.dst_pages, dst_generations, dst.stored_layers[0].num_pages);
  Status status;
  auto transfer =
      host_shm::begin_transfer(std::move(spec), self.control, self.worker, kExecutor, &status);
  return transfer ? py::cast(transfer) : py::cast(status);
}

py::dict progress(const ShmTransfer& self) {
  const Progress now = self.progress();
  py::list parts;
  for (const PartTimes& times : now.parts) {
    parts.append(py::make_tuple(times.posted_ns, times.started_ns, times.done_ns));
  }
  return py::dict(py::arg("status") = now.status, py::arg("source_reusable") = now.source_reusable,
                  py::arg("num_bytes") = now.num_bytes, py::arg("num_rows") = now.num_rows,
                  py::arg("moving_ns") = now.moving_ns, py::arg("parts") = parts,
                  py::arg("message") = now.message);
}

void register_vocabulary(py::module_& module) {
  py::enum_<Status>(module, "TransferStatus", "How a transfer stands or ended.")
      .value("OK", Status::kOk)
      .value("PENDING", Status::kPending)
      .value("CANCELLED", Status::kCancelled)
      .value("REVOKED", Status::kRevoked)
      .value("EXPIRED", Status::kExpired)
      .value("PEER_LOST", Status::kPeerLost)
      .value("DIGEST_MISMATCH", Status::kDigestMismatch)
      .value("GENERATION_MISMATCH", Status::kGenerationMismatch)
      .value("ROW_COUNT_MISMATCH", Status::kRowCountMismatch)
      .value("STALE", Status::kStale)
      .value("MOVE_FAILED", Status::kMoveFailed)
      .value("TIMEOUT", Status::kTimeout)
      .value("BUSY", Status::kBusy);
  py::enum_<SlotKind>(module, "SlotKind", "What the owner of the pages opened.")
      .value("GRANT", SlotKind::kGrant)
      .value("OFFER", SlotKind::kOffer);
  py::class_<SlotKey>(module, "SlotKey", "One use of one slot.")
      .def(py::init([](uint32_t slot, uint64_t generation) { return SlotKey{slot, generation}; }),
           py::arg("slot"), py::arg("generation"))
      .def_readonly("slot", &SlotKey::slot)
      .def_readonly("generation", &SlotKey::generation);
  py::class_<GrantedPages>(module, "GrantedPages", "The receiver's pages of one grant.")
      .def(py::init(&make_granted), py::arg("pool"), py::arg("model_layers"), py::arg("model_head"),
           py::arg("pages"), py::arg("num_tokens"), py::arg("generations") = py::none());
}

void register_control(py::module_& module) {
  module.attr("SHM_MAX_LAYERS") = host_shm::kMaxLayers;
  module.attr("SHM_MAX_LINKS") = host_shm::kMaxLinks;
  py::class_<Control, std::shared_ptr<Control>>(module, "ShmControl",
                                                "Slots and page lists that peers map.")
      .def_static("create", &Control::create, py::arg("num_slots"), py::arg("num_page_entries"))
      .def_static("attach", &Control::attach, py::arg("fd"), py::arg("num_bytes"))
      .def_property_readonly("fd", [](const Control& self) { return self.segment().fd(); })
      .def_property_readonly("num_bytes", [](const Control& self) { return self.segment().size(); })
      .def_property_readonly("num_slots", &Control::num_slots)
      .def_property_readonly("num_page_entries", &Control::num_page_entries)
      .def("open", &open_slot, py::arg("slot"), py::arg("kind"), py::arg("transfer_id"),
           py::arg("deadline_ns"), py::arg("num_layers"), py::arg("rows_per_layer"),
           py::arg("num_pulls"), py::arg("with_digest"), py::arg("first_page"), py::arg("pages"))
      .def("close", &Control::close, py::arg("key"), py::arg("status"))
      .def("expire", &Control::expire, py::arg("key"), py::arg("now_ns"))
      .def("quiet", &Control::quiet, py::arg("key"))
      .def("drop_link", &Control::drop_link, py::arg("bit"))
      .def("status", &Control::status, py::arg("key"))
      .def("enter", &Control::enter, py::arg("key"), py::arg("bit"),
           "What a writer does before each chunk; for fault injection.")
      .def("leave", &Control::leave, py::arg("key"), py::arg("bit"))
      .def("adopt", &Control::adopt, py::arg("key"), py::arg("bit"))
      .def("release", &Control::release, py::arg("key"), py::arg("bit"))
      .def(
          "deadline_ns",
          [](const Control& self, SlotKey key) { return self.slot(key.slot).deadline_ns.load(); },
          py::arg("key"))
      .def("extend", &Control::extend, py::arg("key"), py::arg("deadline_ns"))
      .def(
          "num_rows",
          [](const Control& self, SlotKey key) { return self.slot(key.slot).rows.load(); },
          py::arg("key"))
      .def(
          "page_list",
          [](const std::shared_ptr<Control>& self, uint64_t first, uint64_t count) {
            KVLINK_CHECK(
                first <= self->num_page_entries() && count <= self->num_page_entries() - first,
                "pages: expected entries within ", self->num_page_entries(), "; got ", first, " + ",
                count);
            py::array_t<int32_t> pages({static_cast<py::ssize_t>(count)}, self->page_list() + first,
                                       py::cast(self));
            pages.attr("flags").attr("writeable") = false;
            return pages;
          },
          py::arg("first"), py::arg("count"), "A read-only int32 view; nothing is copied.")
      .def(
          "wait_rows",
          [](const Control& self, SlotKey key, int64_t deadline_ns) {
            return wait_in_slices(deadline_ns,
                                  [&](int64_t until) { return self.wait_rows(key, until); });
          },
          py::arg("key"), py::arg("deadline_ns"))
      .def(
          "wait_layer",
          [](const Control& self, SlotKey key, uint32_t layer, int64_t deadline_ns) {
            return wait_in_slices(
                deadline_ns, [&](int64_t until) { return self.wait_layer(key, layer, until); });
          },
          py::arg("key"), py::arg("layer"), py::arg("deadline_ns"))
      .def(
          "wait_closed",
          [](const Control& self, SlotKey key, int64_t deadline_ns) {
            return wait_in_slices(deadline_ns,
                                  [&](int64_t until) { return self.wait_closed(key, until); });
          },
          py::arg("key"), py::arg("deadline_ns"))
      .def(
          "verify",
          [](Control& self, SlotKey key, const GrantedPages& pages, int64_t deadline_ns) {
            return wait_in_slices(deadline_ns, [&](int64_t until) {
              return self.verify(key, kExecutor, pages.own, until);
            });
          },
          py::arg("key"), py::arg("pages"), py::arg("deadline_ns"));
}

}  // namespace

void register_transport(py::module_& module) {
  register_vocabulary(module);
  register_control(module);
  py::class_<ShmTransfer, std::shared_ptr<ShmTransfer>>(module, "ShmTransfer",
                                                        "The moving side of one transfer.")
      .def("post", &ShmTransfer::post, py::arg("part"), py::arg("num_tokens"))
      .def("tokens_left", &ShmTransfer::tokens_left, py::arg("part"))
      .def("finish", &ShmTransfer::finish)
      .def("cancel", &ShmTransfer::cancel)
      .def("progress", &progress)
      .def(
          "wait_source_reusable",
          [](ShmTransfer& self, int64_t deadline_ns) {
            return wait_in_slices(deadline_ns, [&](int64_t until) {
                     return self.wait_source_reusable(until) ? Status::kOk : Status::kPending;
                   }) == Status::kOk;
          },
          py::arg("deadline_ns"))
      .def(
          "wait_arrived",
          [](ShmTransfer& self, int64_t deadline_ns) {
            return wait_in_slices(deadline_ns,
                                  [&](int64_t until) { return self.wait_arrived(until); });
          },
          py::arg("deadline_ns"));
  py::class_<ShmLink>(module, "ShmLink",
                      "A peer's control segment and the thread that moves pages.")
      .def(py::init([](std::shared_ptr<Control> control, uint32_t bit) {
             KVLINK_CHECK(bit < host_shm::kMaxLinks, "bit: expected below ", host_shm::kMaxLinks,
                          "; got ", bit);
             return std::make_unique<ShmLink>(std::move(control), bit);
           }),
           py::arg("control"), py::arg("bit"))
      .def_property_readonly("closed", [](const ShmLink& self) { return self.worker->closed(); })
      .def("close", &ShmLink::close, py::arg("status"))
      .def("begin", &begin, py::arg("kind"), py::arg("key"), py::arg("parts"), py::arg("heads"),
           py::arg("src"), py::arg("dst"), py::arg("src_pages"), py::arg("dst_pages"),
           py::arg("num_tokens"), py::arg("dst_generations") = py::none(),
           "A ShmTransfer, or the TransferStatus that tells why there is none.");
}

}  // namespace kvlink::bindings
