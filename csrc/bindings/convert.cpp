#include "kvlink/base/convert.hpp"

#include <pybind11/pybind11.h>

#include "kvlink/base/check.hpp"
#include "register.hpp"
#include "tensor.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

template <typename F>
void with_storage(const std::string& name, F body) {
  switch (dtype_from_name(name)) {
    case DType::kFloat32:
      return body(Storage<DType::kFloat32>());
    case DType::kFloat16:
      return body(Storage<DType::kFloat16>());
    case DType::kBFloat16:
      return body(Storage<DType::kBFloat16>());
    case DType::kFloat8E4M3:
      return body(Storage<DType::kFloat8E4M3>());
    case DType::kFloat8E5M2:
      return body(Storage<DType::kFloat8E5M2>());
    case DType::kInt8:
      return body(Storage<DType::kInt8>());
    case DType::kUInt8:
      throw InvalidArgument("dtype: uint8 has no values to convert");
  }
}

// src and dst: raw bytes of the elements.
void convert(const py::object& src, const std::string& src_dtype, const py::object& dst,
             const std::string& dst_dtype) {
  Symbols symbols;
  const TensorSpec::Strides contiguous = TensorSpec::Strides::kContiguous;
  const Tensor from = TensorSpec{"src", {"src bytes"}, {"uint8"}, contiguous}.import(src, symbols);
  const Tensor to =
      TensorSpec{"dst", {"dst bytes"}, {"uint8"}, contiguous, true}.import(dst, symbols);
  with_storage(src_dtype, [&]<typename Src>(Src) {
    with_storage(dst_dtype, [&]<typename Dst>(Dst) {
      const int64_t count = from.dim(0) / static_cast<int64_t>(sizeof(typename Src::Type));
      KVLINK_CHECK(to.dim(0) == count * static_cast<int64_t>(sizeof(typename Dst::Type)),
                   "dst: expected ", count, " elements; got ", to.dim(0), " bytes");
      for (int64_t i = 0; i < count; ++i) {
        to.data<typename Dst::Type>()[i] =
            Dst::store(Src::load(from.data<typename Src::Type>()[i]));
      }
    });
  });
}

}  // namespace

void register_convert(py::module_& module) {
  module.def("convert", &convert, py::arg("src"), py::arg("src_dtype"), py::arg("dst"),
             py::arg("dst_dtype"),
             "Converts elements, given as contiguous uint8 arrays, one by one through float32.");
}

}  // namespace kvlink::bindings
