#include "kvlink/transport/host_shm/link.hpp"
#include "register.hpp"
#include "transport.hpp"

namespace kvlink::bindings {

using namespace kvlink::transport;

namespace {

py::object begin(host_shm::Link& self, SlotKind kind, uint32_t slot, uint64_t generation,
                 const Parts& parts, std::array<int32_t, 4> heads, const PoolView& own,
                 const PoolView& peer, const PageArray& own_pages, uint64_t first_peer_page,
                 uint64_t num_peer_pages, int64_t num_tokens,
                 const std::optional<GenerationArray>& generations) {
  const std::span<const int32_t> peer_pages = self.control().pages(first_peer_page, num_peer_pages);
  const std::span<const int32_t> pages = to_span(own_pages);
  const bool pushes = kind == SlotKind::kGrant;
  Status status;
  const std::shared_ptr<PostedTransfer> transfer = self.begin(
      make_spec(kind, {slot, generation}, parts, heads, pushes ? own : peer, pushes ? peer : own,
                pushes ? pages : peer_pages, pushes ? peer_pages : pages, num_tokens, generations),
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
      .def("begin", &begin, py::arg("kind"), py::arg("slot"), py::arg("generation"),
           py::arg("parts"), py::arg("heads"), py::arg("own"), py::arg("peer"),
           py::arg("own_pages"), py::arg("first_peer_page"), py::arg("num_peer_pages"),
           py::arg("num_tokens"), py::arg("generations") = py::none(),
           "A PostedTransfer, or the TransferStatus that tells why there is none.");
}

}  // namespace kvlink::bindings
