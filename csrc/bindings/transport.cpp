#include "transport.hpp"

#include <cstring>

#include "kvlink/base/check.hpp"
#include "kvlink/cpu/digest_pages.hpp"
#include "kvlink/cpu/relayout_pages.hpp"
#include "readiness.hpp"
#include "register.hpp"

namespace kvlink::bindings {

using namespace kvlink::transport;

const Executor kExecutor{.relayout = &cpu::relayout_pages, .digest = &cpu::digest_pages};

std::shared_ptr<void> hold(py::object object) {
  return {new py::object(std::move(object)), [](void* held) {
            if (!Py_IsInitialized()) return;
            py::gil_scoped_acquire gil;
            delete static_cast<py::object*>(held);
          }};
}

namespace {

void set_generations(OwnPages& own, const std::vector<int32_t>& pages,
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

std::shared_ptr<OwnPages> make_own(const PoolView& pool, std::vector<int32_t> model_layers,
                                   int32_t model_head, const PageArray& pages, int64_t num_tokens,
                                   const std::optional<GenerationArray>& generations) {
  KVLINK_CHECK(model_layers.size() == pool.stored_layers.size(), "model_layers: expected ",
               pool.stored_layers.size(), "; got ", model_layers.size());
  auto own = std::make_shared<OwnPages>();
  own->layers = pool.stored_layers;
  own->model_layers = std::move(model_layers);
  own->model_head = model_head;
  own->pages.assign(pages.data(), pages.data() + pages.size());
  own->num_tokens = num_tokens;
  own->keep_alive = hold(py::make_tuple(pool.owner, generations));
  set_generations(*own, own->pages, generations, pool.stored_layers[0].num_pages);
  return own;
}

SlotKey open_slot(Control& self, uint32_t slot, SlotKind kind, const py::bytes& transfer_id_bytes,
                  int64_t deadline_ns, uint32_t num_layers, uint64_t rows_per_layer,
                  uint32_t num_pulls, bool with_digest, uint64_t first_page,
                  std::shared_ptr<OwnPages> own) {
  SlotTerms terms{.kind = kind,
                  .transfer_id = {0, 0},
                  .deadline_ns = deadline_ns,
                  .num_layers = num_layers,
                  .rows_per_layer = rows_per_layer,
                  .num_pulls = num_pulls,
                  .with_digest = with_digest,
                  .pages = own->pages.data(),
                  .num_pages = static_cast<uint32_t>(own->pages.size())};
  const std::string_view transfer_id(transfer_id_bytes);
  KVLINK_CHECK(transfer_id.size() == 16, "transfer_id: expected 16 bytes; got ",
               transfer_id.size());
  std::memcpy(terms.transfer_id, transfer_id.data(), 16);
  return self.open(slot, first_page, terms, std::move(own));
}

py::dict progress(const PostedTransfer& self) {
  const Progress now = self.progress();
  py::list parts;
  for (const PartTimes& times : now.parts) {
    parts.append(py::make_tuple(times.posted_ns, times.started_ns, times.done_ns));
  }
  return py::dict(py::arg("status") = now.status, py::arg("source_reusable") = now.source_reusable,
                  py::arg("num_moving") = now.num_moving, py::arg("num_bytes") = now.num_bytes,
                  py::arg("num_rows") = now.num_rows, py::arg("moving_ns") = now.moving_ns,
                  py::arg("parts") = parts, py::arg("message") = now.message);
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
  py::class_<OwnPages, std::shared_ptr<OwnPages>>(module, "OwnPages",
                                                  "The owner's pages of one grant or offer.")
      .def(py::init(&make_own), py::arg("pool"), py::arg("model_layers"), py::arg("model_head"),
           py::arg("pages"), py::arg("num_tokens"), py::arg("generations") = py::none())
      .def_property_readonly("verify_ns",
                             [](const OwnPages& self) { return self.verify_ns.load(); });
}

void register_control(py::module_& module) {
  module.attr("MAX_STORED_LAYERS") = kMaxLayers;
  module.attr("MAX_LINKS") = kMaxLinks;
  py::class_<Control, std::shared_ptr<Control>>(module, "Control",
                                                "Slots and page lists that peers map.")
      .def_static("create", &Control::create, py::arg("num_slots"), py::arg("num_page_entries"))
      .def_static("attach", &Control::attach, py::arg("fd"), py::arg("num_bytes"))
      .def_property_readonly("fd", [](const Control& self) { return self.segment().fd(); })
      .def_property_readonly("num_bytes", [](const Control& self) { return self.segment().size(); })
      .def_property_readonly("num_slots", &Control::num_slots)
      .def_property_readonly("num_page_entries", &Control::num_page_entries)
      .def("open", &open_slot, py::arg("slot"), py::arg("kind"), py::arg("transfer_id"),
           py::arg("deadline_ns"), py::arg("num_layers"), py::arg("rows_per_layer"),
           py::arg("num_pulls"), py::arg("with_digest"), py::arg("first_page"), py::arg("own"))
      .def("forget", &Control::forget, py::arg("key"), "The pages of an ended slot may go.")
      .def("close", &Control::close, py::arg("key"), py::arg("status"))
      .def("expire", &Control::expire, py::arg("key"), py::arg("now_ns"))
      .def("quiet", &Control::quiet, py::arg("key"))
      .def("drop_link", &Control::drop_link, py::arg("bit"))
      .def("status", &Control::status, py::arg("key"))
      .def("enter", &Control::enter, py::arg("key"), py::arg("bit"),
           "What a writer does before each chunk; for fault injection.")
      .def("leave", &Control::leave, py::arg("key"), py::arg("bit"))
      .def("adopt", &Control::adopt, py::arg("key"), py::arg("bit"))
      .def("unadopt", &Control::unadopt, py::arg("key"), py::arg("bit"))
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
            const std::span<const int32_t> listed = self->pages(first, count);
            py::array_t<int32_t> pages({std::ssize(listed)}, listed.data(), py::cast(self));
            pages.attr("flags").attr("writeable") = false;
            return pages;
          },
          py::arg("first"), py::arg("count"), "A read-only int32 view; nothing is copied.")
      .def(
          "wait_layer",
          [](const Control& self, SlotKey key, uint32_t layer, int64_t deadline_ns) {
            return wait_in_slices(
                deadline_ns, [&](int64_t until) { return self.wait_layer(key, layer, until); });
          },
          py::arg("key"), py::arg("layer"), py::arg("deadline_ns"))
      .def(
          "readiness",
          [](const std::shared_ptr<Control>& self, SlotKey key, uint32_t layer, std::string name) {
            return std::make_shared<ReadinessObject>(self->readiness(key, layer), std::move(name),
                                                     self);
          },
          py::arg("key"), py::arg("layer"), py::arg("name"))
      .def(
          "wait_closed",
          [](const Control& self, SlotKey key, int64_t deadline_ns) {
            return wait_in_slices(deadline_ns,
                                  [&](int64_t until) { return self.wait_closed(key, until); });
          },
          py::arg("key"), py::arg("deadline_ns"))
      .def(
          "arrive",
          [](Control& self, SlotKey key, int64_t deadline_ns) {
            return wait_in_slices(
                deadline_ns, [&](int64_t until) { return self.arrive(key, kExecutor, until); });
          },
          py::arg("key"), py::arg("deadline_ns"));
}

void register_transfer(py::module_& module) {
  py::class_<PostedTransfer, std::shared_ptr<PostedTransfer>>(module, "PostedTransfer",
                                                              "The moving side of one transfer.")
      .def("post", &PostedTransfer::post, py::arg("part"), py::arg("num_tokens"))
      .def("tokens_left", &PostedTransfer::tokens_left, py::arg("part"))
      .def(
          "readiness",
          [](const std::shared_ptr<PostedTransfer>& self, int32_t part, std::string name) {
            return std::make_shared<ReadinessObject>(self->readiness(part), std::move(name), self);
          },
          py::arg("part"), py::arg("name"))
      .def("post_all", &PostedTransfer::post_all, "What is left of every part, and finish.")
      .def("finish", &PostedTransfer::finish)
      .def("cancel", &PostedTransfer::cancel)
      .def("progress", &progress)
      .def(
          "wait_source_reusable",
          [](PostedTransfer& self, int64_t deadline_ns) {
            return wait_in_slices(deadline_ns, [&](int64_t until) {
                     return self.wait_source_reusable(until) ? Status::kOk : Status::kPending;
                   }) == Status::kOk;
          },
          py::arg("deadline_ns"))
      .def(
          "wait_arrived",
          [](PostedTransfer& self, int64_t deadline_ns) {
            return wait_in_slices(deadline_ns,
                                  [&](int64_t until) { return self.wait_arrived(until); });
          },
          py::arg("deadline_ns"));
}

}  // namespace

TransferSpec make_spec(SlotKind kind, SlotKey key, const Parts& parts, std::array<int32_t, 4> heads,
                       const PoolView& src, const PoolView& dst, std::span<const int32_t> src_pages,
                       std::span<const int32_t> dst_pages, int64_t num_tokens,
                       const std::optional<GenerationArray>& dst_generations) {
  TransferSpec spec{.kind = kind,
                    .key = key,
                    .plan = {.parts = {},
                             .num_heads = heads[0],
                             .src_head = heads[1],
                             .dst_head = heads[2],
                             .model_head = heads[3]},
                    .src = {src.stored_layers},
                    .dst = {dst.stored_layers},
                    .src_pages = {src_pages.begin(), src_pages.end()},
                    .dst_pages = {dst_pages.begin(), dst_pages.end()},
                    .num_tokens = num_tokens,
                    .with_digest = true,
                    .own = std::make_shared<OwnPages>(),
                    .keep_alive = hold(py::make_tuple(src.owner, dst.owner, dst_generations))};
  for (const auto& [src_layer, dst_layer, model_layer] : parts) {
    spec.plan.parts.push_back({src_layer, dst_layer, model_layer});
  }
  set_generations(*spec.own, spec.dst_pages, dst_generations, dst.stored_layers[0].num_pages);
  return spec;
}

namespace {

// A copy of ids that are int32 already and all in [0, num_pages); None for others.
py::object page_ids(const py::handle& pages, int64_t num_pages) {
  if (!PageArray::check_(pages)) return py::none();
  const auto given = py::reinterpret_borrow<PageArray>(pages);
  if (given.ndim() != 1 || given.size() == 0) return py::none();
  PageArray ids(given.size(), given.data());
  const auto inside = [num_pages](int32_t id) { return id >= 0 && id < num_pages; };
  const std::span<const int32_t> copied = to_span(ids);
  return std::all_of(copied.begin(), copied.end(), inside) ? py::object(ids) : py::none();
}

}  // namespace

void register_transport(py::module_& module) {
  module.def("page_ids", &page_ids, py::arg("pages"), py::arg("num_pages"),
             "A copy of ids that are int32 already and all in [0, num_pages); None for others.");
  register_vocabulary(module);
  register_control(module);
  register_transfer(module);
  register_transport_host_shm(module);
  register_transport_ucx(module);
}

}  // namespace kvlink::bindings
