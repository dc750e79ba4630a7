#include "kvlink/base/check.hpp"
#include "kvlink/transport/host_shm/transfer.hpp"
#include "register.hpp"
#include "transport.hpp"

namespace kvlink::bindings {

using namespace kvlink::transport;

namespace {

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

py::object begin(const ShmLink& self, SlotKind kind, SlotKey key, const Parts& parts,
                 std::array<int32_t, 4> heads, const PoolView& src, const PoolView& dst,
                 const PageArray& src_pages, const PageArray& dst_pages, int64_t num_tokens,
                 const std::optional<GenerationArray>& dst_generations) {
  Status status;
  std::shared_ptr<PostedTransfer> transfer =
      host_shm::begin_transfer(make_spec(kind, key, parts, heads, src, dst, src_pages, dst_pages,
                                         num_tokens, dst_generations),
                               self.bit, self.control, self.worker, kExecutor, &status);
  return transfer ? py::cast(transfer) : py::cast(status);
}

}  // namespace

void register_transport_host_shm(py::module_& module) {
  py::class_<ShmLink>(module, "ShmLink",
                      "A peer's control segment and the thread that moves pages.")
      .def(py::init([](std::shared_ptr<Control> control, uint32_t bit) {
             KVLINK_CHECK(bit < kMaxLinks, "bit: expected below ", kMaxLinks, "; got ", bit);
             return std::make_unique<ShmLink>(std::move(control), bit);
           }),
           py::arg("control"), py::arg("bit"))
      .def_property_readonly("closed", [](const ShmLink& self) { return self.worker->closed(); })
      .def("close", &ShmLink::close, py::arg("status"))
      .def("begin", &begin, py::arg("kind"), py::arg("key"), py::arg("parts"), py::arg("heads"),
           py::arg("src"), py::arg("dst"), py::arg("src_pages"), py::arg("dst_pages"),
           py::arg("num_tokens"), py::arg("dst_generations") = py::none(),
           "A PostedTransfer, or the TransferStatus that tells why there is none.");
}

}  // namespace kvlink::bindings
