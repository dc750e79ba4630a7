#include "cuda_module.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "errors.hpp"
#include "kvlink/cuda/append_kv.hpp"
#include "kvlink/cuda/relayout_pages.hpp"
#include "op_args.hpp"
#include "tensor.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

// Where devices see page-locked host memory; null: it is not such memory. CUDA is asked, because
// torch exports all of the host's memory as kDeviceCpu.
uint64_t* mapped_address(const Tensor& array) {
  if (!array.on_host()) return nullptr;
  cudaPointerAttributes found{};
  if (cudaPointerGetAttributes(&found, array.data<void>()) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return found.type == cudaMemoryTypeHost ? static_cast<uint64_t*>(found.devicePointer) : nullptr;
}

struct CounterUse {
  bool may_be_mapped, writes;
};

// An array of one 64-bit integer: its address on the device.
uint64_t* counter_of(const py::object& counter, const std::string& name,
                     const dlpack::Device& device, CounterUse use) {
  const Tensor array(counter, name);
  const bool there = array.device().type == device.type && array.device().id == device.id;
  uint64_t* const mapped = use.may_be_mapped ? mapped_address(array) : nullptr;
  KVLINK_CHECK((there || mapped) && array.num_elements() == 1 &&
                   (array.type_name() == "int64" || array.type_name() == "uint64"),
               name, ": expected one int64 on the pool's device",
               use.may_be_mapped ? " or in page-locked host memory" : "", "; got ",
               array.num_elements(), " x ", array.type_name(), " on device type ",
               array.device().type);
  KVLINK_CHECK(!use.writes || !array.read_only(), name, ": is written to, but is read-only");
  return there ? array.data<uint64_t>() : mapped;
}

// Page ids on the device: the caller's own array, or a copy of what is on the host.
class DevicePageIds {
 public:
  DevicePageIds(const py::object& pages, const std::string& name, const PoolView& pool,
                cudaStream_t stream)
      : stream_(stream) {
    if (py::hasattr(pages, "__dlpack__")) {
      Tensor array(pages, name);
      if (!array.on_host()) {
        KVLINK_CHECK(array.shape().size() == 1 && array.is_contiguous() &&
                         array.type_name() == "int32" && array.device().type == pool.device.type &&
                         array.device().id == pool.device.id,
                     name,
                     ": expected a contiguous int32 array of one axis on the pool's device; "
                     "got ",
                     array.type_name(), " on device number ", array.device().id);
        size_ = array.dim(0);
        data_ = array.data<int32_t>();
        array_ = array;
        return;
      }
    }
    const PageIds host(pages, name);
    size_ = host.size();
    if (size_ == 0) return;
    KVLINK_CHECK(!cuda::is_captured(stream), name,
                 ": expected an array on the device while a graph is captured; got host memory");
    cuda::check_cuda(cudaMallocAsync(&copy_, size_ * 4, stream), "cudaMallocAsync");
    data_ = static_cast<const int32_t*>(copy_);
    cuda::check_cuda(
        cudaMemcpyAsync(copy_, host.run(0).pages, size_ * 4, cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
  }
  ~DevicePageIds() {
    if (copy_) cudaFreeAsync(copy_, stream_);
  }
  DevicePageIds(const DevicePageIds&) = delete;
  DevicePageIds& operator=(const DevicePageIds&) = delete;

  TokenRun run(int64_t first_slot) const {
    return {.pages = data_, .num_pages = size_, .first_slot = first_slot};
  }

 private:
  std::optional<Tensor> array_;
  void* copy_ = nullptr;
  const int32_t* data_ = nullptr;
  int64_t size_ = 0;
  cudaStream_t stream_;
};

void append_kv(const py::object& k, const py::object& v, const PoolView& pool,
               const py::object& layers, const py::object& slots, const py::object& rope,
               uintptr_t stream) {
  const DeviceGuard guard(pool);
  const ConsumerStream consumer(static_cast<int64_t>(stream));
  const AppendArgs args(k, v, pool, layers, slots, rope);
  const py::gil_scoped_release release;
  cuda::append_kv(args.params, as_stream(stream));
}

// What an operator has on a device alone, and the array it is told to write to.
struct DeviceArgs {
  DeviceArgs(const ReadyItems& ready, double ready_timeout, const std::vector<py::object>& raises,
             const py::object& digest_into, const PoolView& pool) {
    options.ready = ready_counters(ready, ready_timeout, pool.device);
    KVLINK_CHECK(raises.size() <= cuda::kMaxReady, "raises: expected at most ", cuda::kMaxReady,
                 " counters; got ", raises.size());
    for (const py::object& counter : raises) {
      options.raised.items[options.raised.num_items++] =
          counter_of(counter, "raises", pool.device, {.may_be_mapped = true, .writes = true});
    }
    if (digest_into.is_none()) return;
    options.digest_into = counter_of(digest_into, "digest_into", pool.device,
                                     {.may_be_mapped = false, .writes = true});
  }

  cuda::DeviceOptions options = {};
};

py::tuple relayout_pages(const PoolView& src, const py::object& src_pages, const PoolView& dst,
                         const py::object& dst_pages, const std::vector<int32_t>& src_layers,
                         const std::vector<int32_t>& dst_layers,
                         const std::vector<int32_t>& model_layers, int32_t num_heads,
                         int32_t src_head, int32_t dst_head, int32_t model_head, int64_t num_tokens,
                         int64_t src_start, int64_t dst_start, int64_t token_position, bool digest,
                         const py::object& digest_into, const ReadyItems& ready,
                         double ready_timeout, const std::vector<py::object>& raises,
                         uintptr_t stream) {
  const DeviceGuard guard(dst);
  const ConsumerStream consumer(static_cast<int64_t>(stream));
  const DeviceArgs on_device(ready, ready_timeout, raises, digest_into, dst);
  KVLINK_CHECK(src.device.type == dst.device.type && src.device.id == dst.device.id,
               "src_pool: expected the device of dst_pool, number ", dst.device.id,
               "; got device type ", src.device.type, " number ", src.device.id);
  const auto from = stored_layers(src, src_layers, "src_layers");
  const auto to = stored_layers(dst, dst_layers, "dst_layers");
  KVLINK_CHECK(from.size() == to.size() && from.size() == model_layers.size(),
               "dst_layers: expected ", from.size(), " layers; got ", to.size());
  const DevicePageIds src_ids(src_pages, "src_pages", src, as_stream(stream));
  const DevicePageIds dst_ids(dst_pages, "dst_pages", dst, as_stream(stream));
  const RelayoutParams params{.src_layers = from.data(),
                              .dst_layers = to.data(),
                              .model_layers = model_layers.data(),
                              .num_layers = static_cast<int32_t>(from.size()),
                              .num_heads = num_heads,
                              .src_head = src_head,
                              .dst_head = dst_head,
                              .model_head = model_head,
                              .src = src_ids.run(src_start),
                              .dst = dst_ids.run(dst_start),
                              .num_tokens = num_tokens,
                              .token_position = token_position,
                              .with_digest = digest};
  RelayoutResult result;
  {
    const py::gil_scoped_release release;
    result = cuda::relayout_pages(params, on_device.options, as_stream(stream));
  }
  return py::make_tuple(result.rows, result.digest);
}

py::tuple digest_pages(const PoolView& pool, const py::object& pages,
                       const std::vector<int32_t>& layers, const std::vector<int32_t>& model_layers,
                       int32_t num_heads, int32_t head, int32_t model_head, int64_t num_tokens,
                       int64_t start, int64_t token_position, const py::object& digest_into,
                       const ReadyItems& ready, double ready_timeout, uintptr_t stream) {
  const DeviceGuard guard(pool);
  const ConsumerStream consumer(static_cast<int64_t>(stream));
  const DeviceArgs on_device(ready, ready_timeout, {}, digest_into, pool);
  const auto views = stored_layers(pool, layers, "layers");
  KVLINK_CHECK(views.size() == model_layers.size(), "model_layers: expected ", views.size(),
               " layers; got ", model_layers.size());
  const DevicePageIds ids(pages, "pages", pool, as_stream(stream));
  const DigestParams params{.layers = views.data(),
                            .model_layers = model_layers.data(),
                            .num_layers = static_cast<int32_t>(views.size()),
                            .num_heads = num_heads,
                            .head = head,
                            .model_head = model_head,
                            .run = ids.run(start),
                            .num_tokens = num_tokens,
                            .token_position = token_position};
  RelayoutResult result;
  {
    const py::gil_scoped_release release;
    result = cuda::digest_pages(params, on_device.options, as_stream(stream));
  }
  return py::make_tuple(result.rows, result.digest);
}

// (devices, why there are none).
std::pair<int, std::string> devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return {count, ""};
  cudaGetLastError();
  return {0, status == cudaSuccess ? "no CUDA device" : cudaGetErrorString(status)};
}

}  // namespace

cuda::ReadyCounters ready_counters(const ReadyItems& ready, double timeout,
                                   const dlpack::Device& device) {
  constexpr double kLongest = 3600.0;  // s
  KVLINK_CHECK(timeout >= 0.0, "ready_timeout: expected seconds >= 0; got ", timeout);
  KVLINK_CHECK(ready.size() <= cuda::kMaxReady, "ready: expected at most ", cuda::kMaxReady,
               " counters; got ", ready.size());
  cuda::ReadyCounters counters;
  counters.timeout_ns = static_cast<uint64_t>(std::min(timeout, kLongest) * 1e9);
  for (const auto& [counter, target] : ready) {
    const uint64_t* const at =
        counter_of(counter, "ready", device, {.may_be_mapped = true, .writes = false});
    counters.items[counters.num_items++] = {at, target};
  }
  return counters;
}

}  // namespace kvlink::bindings

// _cuda, or what the build calls it instead.
PYBIND11_MODULE(KVLINK_CUDA_MODULE, module) {
  using namespace kvlink::bindings;
  module.doc() = "kvlink's CUDA operators. Import kvlink, not this.";
  py::module_::import("kvlink._C");  // registers PoolView
  register_exceptions();
  module.attr("architectures") = KVLINK_CUDA_ARCHS;  // as in setup.py: "80;90a;100"
  module.attr("runtime_version") = CUDART_VERSION;
  module.def("device_count", [] { return devices().first; }, "CUDA devices; 0 without a driver.");
  module.def(
      "unavailable_reason", [] { return devices().second; }, "Empty when there is a device.");
  module.def(
      "check_errors",
      [](int device) {
        const py::gil_scoped_release release;
        kvlink::cuda::check_cuda(cudaSetDevice(device), "cudaSetDevice");
        kvlink::cuda::check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        kvlink::cuda::report_errors();
      },
      py::arg("device"), "Waits for the device and raises what its kernels recorded.");
  module.def("append_kv", &append_kv, py::arg("k"), py::arg("v"), py::arg("pool"),
             py::arg("layers"), py::arg("slots"), py::arg("rope"), py::arg("stream"));
  module.def("relayout_pages", &relayout_pages, py::kw_only(), py::arg("src"), py::arg("src_pages"),
             py::arg("dst"), py::arg("dst_pages"), py::arg("src_layers"), py::arg("dst_layers"),
             py::arg("model_layers"), py::arg("num_heads"), py::arg("src_head"),
             py::arg("dst_head"), py::arg("model_head"), py::arg("num_tokens"),
             py::arg("src_start"), py::arg("dst_start"), py::arg("token_position"),
             py::arg("digest"), py::arg("digest_into"), py::arg("ready"), py::arg("ready_timeout"),
             py::arg("raises") = py::list(), py::arg("stream"),
             "(rows, digest). Layers are stored layers.");
  module.def("digest_pages", &digest_pages, py::kw_only(), py::arg("pool"), py::arg("pages"),
             py::arg("layers"), py::arg("model_layers"), py::arg("num_heads"), py::arg("head"),
             py::arg("model_head"), py::arg("num_tokens"), py::arg("start"),
             py::arg("token_position"), py::arg("digest_into"), py::arg("ready"),
             py::arg("ready_timeout"), py::arg("stream"),
             "(rows, digest). Layers are stored layers.");
  register_cuda_attention(module);
  register_cuda_rope(module);
  register_cuda_streams(module);
}
