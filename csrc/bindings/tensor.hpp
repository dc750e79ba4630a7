// Arrays from any DLPack producer (torch, numpy, cupy, ...), checked declaratively.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "dlpack.hpp"
#include "kvlink/base/dtype.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

// While it lives, arrays that this thread imports from CUDA devices are for work on this stream (a
// cudaStream_t, or dlpack::kNoStreams: for their addresses alone). Producers are told, so that the
// stream waits for what theirs have still to do.
class ConsumerStream {
 public:
  explicit ConsumerStream(int64_t stream);
  ~ConsumerStream();
  ConsumerStream(const ConsumerStream&) = delete;
  ConsumerStream& operator=(const ConsumerStream&) = delete;

 private:
  std::optional<int64_t> before_;
};

// A borrowed array; keeps its producer's memory alive.
class Tensor {
 public:
  // Imports `object`; errors name it `name`. Throws InvalidArgument.
  Tensor(const py::handle& object, std::string_view name);

  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  int64_t dim(size_t axis) const { return shape_[axis]; }
  int64_t stride(size_t axis) const { return strides_[axis]; }  // elements
  const std::vector<int64_t>& shape() const { return shape_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  int64_t num_elements() const;
  dlpack::DataType type() const { return type_; }
  dlpack::Device device() const { return device_; }
  bool read_only() const { return read_only_; }
  bool on_host() const {
    return device_.type == dlpack::kDeviceCpu || device_.type == dlpack::kDeviceCudaHost;
  }
  bool is_contiguous() const;  // row-major without gaps
  std::string type_name() const;
  // The storage type, when it is one a layout can have.
  std::optional<DType> dtype() const;

 private:
  bool import_directly(PyObject* object);
  void import_capsule(const py::handle& object, std::string_view name);
  void take(const dlpack::Tensor& tensor);

  void* data_ = nullptr;
  dlpack::Device device_{};
  dlpack::DataType type_{};
  std::vector<int64_t> shape_, strides_;
  bool read_only_ = false;
  std::shared_ptr<void> managed_;  // releases the producer's tensor
};

// Sizes bound by name on first use; every later use must agree.
class Symbols {
 public:
  void bind(std::string_view symbol, int64_t value, std::string_view used_by);
  void match(std::string_view symbol, int64_t value, std::string_view used_by);
  int64_t operator[](std::string_view symbol) const;

 private:
  struct Binding {
    std::string symbol;
    int64_t size;
    std::string bound_by;
  };
  const Binding* find(std::string_view symbol) const;

  std::vector<Binding> sizes_;  // few: looked through faster than looked up
};

// What one argument must look like. An axis is a symbol or a fixed size.
struct TensorSpec {
  using Axis = std::variant<const char*, int64_t>;

  const char* name;
  std::vector<Axis> axes;
  std::vector<const char*> dtypes;  // names as type_name() gives them
  enum class Strides { kContiguous, kLastContiguous, kAny } strides = Strides::kLastContiguous;
  bool writable = false;
  bool host = true;

  // Imports and checks `object`. Throws InvalidArgument naming the argument, expected and got.
  Tensor import(const py::handle& object, Symbols& symbols) const;
  // None gives an empty optional.
  std::optional<Tensor> import_optional(const py::handle& object, Symbols& symbols) const;

 private:
  std::string describe_shape() const;
};

// The storage type of that canonical name. Throws InvalidArgument.
DType dtype_from_name(const std::string& name);

inline const std::vector<const char*> kFloatTypes = {"float32", "float16", "bfloat16"};

}  // namespace kvlink::bindings
