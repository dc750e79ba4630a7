#include "kvlink/transport/host_shm/link.hpp"
#include "register.hpp"
#include "transport.hpp"

namespace kvlink::bindings {

using namespace kvlink::transport;

namespace {

py::object begin(host_shm::Link& self, SlotKind kind, SlotKey key, const Parts& parts,
                 std::array<int32_t, 4> heads, const PoolView& src, const PoolView& dst,
                 const PageArray& src_pages, const PageArray& dst_pages, int64_t num_tokens,
                 const std::optional<GenerationArray>& dst_generations) {
  Status status;
  const std::shared_ptr<PostedTransfer> transfer =
      self.begin(make_spec(kind, key, parts, heads, src, dst, src_pages, dst_pages, num_tokens,
                           dst_generations),
                 &status);
  return transfer ? py::cast(transfer) : py::cast(status);
}

}  // namespace

void register_transport_host_shm(py::module_& module) {
  using host_shm::Link;
  py::class_<Link, std::shared_ptr<Link>>(
      module, "ShmLink", "A peer's control segment and the thread that moves pages.")
      .def(py::init([](std::shared_ptr<Control> control, uint32_t bit) {
             // Its thread may drop Python objects, so nobody waits for it under the GIL.
             const auto end = [](Link* link) {
               py::gil_scoped_release release;
               delete link;
             };
             return std::shared_ptr<Link>(new Link(std::move(control), bit, kExecutor), end);
           }),
           py::arg("control"), py::arg("bit"))
      .def_property_readonly("closed", &Link::closed)
      .def("close", &Link::close, py::arg("status"), py::call_guard<py::gil_scoped_release>())
      .def("begin", &begin, py::arg("kind"), py::arg("key"), py::arg("parts"), py::arg("heads"),
           py::arg("src"), py::arg("dst"), py::arg("src_pages"), py::arg("dst_pages"),
           py::arg("num_tokens"), py::arg("dst_generations") = py::none(),
           "A PostedTransfer, or the TransferStatus that tells why there is none.");
}

}  // namespace kvlink::bindings
