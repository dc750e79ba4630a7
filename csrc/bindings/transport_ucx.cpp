#include <map>

#include "kvlink/base/check.hpp"
#include "kvlink/layout/serialise.hpp"
#include "register.hpp"
#include "transport.hpp"

#ifdef KVLINK_HAVE_UCX
#include "kvlink/transport/ucx/link.hpp"
#endif

namespace kvlink::bindings {

#ifdef KVLINK_HAVE_UCX

using namespace kvlink::transport;
namespace ucx = kvlink::transport::ucx;

namespace {

// Threads of the path may drop Python objects, so nothing here waits for them under the GIL.
struct UcxLink {
  std::shared_ptr<ucx::Link> link;

  explicit UcxLink(std::shared_ptr<ucx::Link> link) : link(std::move(link)) {}
  UcxLink(const UcxLink&) = delete;
  ~UcxLink() {
    py::gil_scoped_release release;
    link->close(Status::kCancelled);
    link.reset();
  }
};

struct UcxHub {
  std::shared_ptr<ucx::Hub> hub;

  explicit UcxHub(std::shared_ptr<Control> control) {
    py::gil_scoped_release release;
    hub = ucx::Hub::create(std::move(control), kExecutor);
  }
  UcxHub(const UcxHub&) = delete;
  ~UcxHub() {
    py::gil_scoped_release release;
    hub->close();
    hub.reset();
  }
};

py::object begin(const UcxLink& self, SlotKind kind, SlotKey key, const Parts& parts,
                 std::array<int32_t, 4> heads, const PoolView& own, const PageArray& own_pages,
                 const py::bytes& peer_layout, size_t peer_layers, int64_t peer_pages,
                 int64_t num_tokens, const std::optional<GenerationArray>& generations,
                 int64_t deadline_ns) {
  const ucx::RemotePool peer{.layout = layout_from_bytes(std::string_view(peer_layout)),
                             .num_layers = peer_layers,
                             .num_pages = peer_pages};
  // The peer's side is filled in by what it answers.
  auto spec = make_spec(kind, key, parts, heads, own, own, to_span(own_pages), to_span(own_pages),
                        num_tokens, generations);
  Status status;
  std::shared_ptr<PostedTransfer> transfer;
  {
    py::gil_scoped_release release;
    transfer = self.link->begin(std::move(spec), peer, deadline_ns, &status);
  }
  return transfer ? py::cast(transfer) : py::cast(status);
}

}  // namespace

void register_transport_ucx(py::module_& module) {
  module.attr("UCX_BUILT") = true;
  module.def(
      "ucx_load",
      [](const std::vector<std::string>& candidates) {
        const ucx::Api& api = ucx::load_api(candidates);
        return std::make_pair(api.path, api.version);
      },
      py::arg("candidates"),
      "Loads the first UCX library that can be; its path and version. Raises Unsupported.");
  module.def("ucx_transports", &ucx::available_transports, py::call_guard<py::gil_scoped_release>(),
             "What a context of the loaded library sees here, for example \"tcp/eth0\".");
  py::enum_<ucx::Fault>(module, "UcxFault", "What a fault test does to messages on their way.")
      .value("DROP", ucx::Fault::kDrop)
      .value("DUPLICATE", ucx::Fault::kDuplicate)
      .value("FLIP_BIT", ucx::Fault::kFlipBit)
      .value("DELAY", ucx::Fault::kDelay);
  py::class_<UcxLink>(module, "UcxLink", "One session with a peer over UCX.")
      .def("describe", [](const UcxLink& self) { return py::bytes(self.link->describe()); })
      .def(
          "connect",
          [](const UcxLink& self, const py::bytes& description, bool same_host) {
            const std::string bytes(description);
            py::gil_scoped_release release;
            self.link->connect(bytes, same_host);
          },
          py::arg("description"), py::arg("same_host"))
      .def("begin", &begin, py::arg("kind"), py::arg("key"), py::arg("parts"), py::arg("heads"),
           py::arg("own"), py::arg("own_pages"), py::arg("peer_layout"), py::arg("peer_layers"),
           py::arg("peer_pages"), py::arg("num_tokens"), py::arg("generations"),
           py::arg("deadline_ns"),
           "A PostedTransfer, or the TransferStatus that tells why there is none.")
      .def(
          "transports", [](const UcxLink& self) { return self.link->transports(); },
          py::call_guard<py::gil_scoped_release>())
      .def("failed", [](const UcxLink& self) { return self.link->failed(); })
      .def(
          "counters",
          [](const UcxLink& self) {
            const auto& counts = self.link->counts;
            return std::map<std::string, uint64_t>{{"dropped_messages", counts.dropped.load()},
                                                   {"credit_waits", counts.credit_waits.load()},
                                                   {"asked_again", counts.asked.load()},
                                                   {"copied_chunks", counts.copied.load()},
                                                   {"in_place_chunks", counts.in_place.load()},
                                                   {"gathered_chunks", counts.gathered.load()},
                                                   {"direct_chunks", counts.direct.load()}};
          },
          "What only this path counts.")
      .def(
          "inject",
          [](const UcxLink& self, ucx::Fault fault, int count) { self.link->inject(fault, count); },
          py::arg("fault"), py::arg("count"),
          "The next `count` messages that this side sends; FLIP_BIT waits for those with KV.")
      .def(
          "enter",
          [](const UcxLink& self, SlotKind kind, SlotKey key, int32_t model_layer,
             int32_t model_head, int64_t deadline_ns) {
            py::gil_scoped_release release;
            return self.link->enter(key, kind, model_layer, model_head, deadline_ns);
          },
          py::arg("kind"), py::arg("key"), py::arg("model_layer"), py::arg("model_head"),
          py::arg("deadline_ns"), "Pins the pages and stays inside; for fault injection.")
      .def("leave", [](const UcxLink& self) { self.link->leave(); })
      .def(
          "close",
          [](const UcxLink& self, Status status) {
            py::gil_scoped_release release;
            self.link->close(status);
          },
          py::arg("status"));
  py::class_<UcxHub>(module, "UcxHub", "An endpoint's UCX context and its threads.")
      .def(py::init<std::shared_ptr<Control>>(), py::arg("control"))
      .def(
          "open_link",
          [](const UcxHub& self, uint32_t bit) {
            py::gil_scoped_release release;
            return std::make_unique<UcxLink>(ucx::Link::open(self.hub, bit));
          },
          py::arg("bit"))
      .def(
          "forget",
          [](const UcxHub& self, const PoolView& pool) {
            const std::vector<LayerView>& layers = pool.stored_layers;
            py::gil_scoped_release release;
            self.hub->forget_layers(layers);
          },
          py::arg("pool"), "Its memory is mapped for peers no more.")
      .def(
          "close", [](const UcxHub& self) { self.hub->close(); },
          py::call_guard<py::gil_scoped_release>());
}

#else

void register_transport_ucx(py::module_& module) { module.attr("UCX_BUILT") = false; }

#endif

}  // namespace kvlink::bindings
