#include "tensor.hpp"

#include <algorithm>
#include <stdexcept>

#include "kvlink/base/check.hpp"

namespace kvlink::bindings {

namespace {

std::string describe(const std::vector<int64_t>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += concat(i ? ", " : "", values[i]);
  return text + "]";
}

template <typename Managed>
void release(void* pointer) {
  auto* owned = static_cast<Managed*>(pointer);
  if (owned->deleter) owned->deleter(owned);
}

// Takes the tensor out of a capsule and marks it consumed, as DLPack prescribes.
template <typename Managed>
std::shared_ptr<void> consume(PyObject* capsule, const char* name, const char* used_name,
                              Managed** managed) {
  *managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  if (!*managed) throw py::error_already_set();
  PyCapsule_SetName(capsule, used_name);
  return {*managed, &release<Managed>};
}

thread_local std::optional<int64_t> consumer_stream;

// What the producer is to be told of streams: nothing in host memory, as the protocol has it.
std::optional<int64_t> stream_for(const py::handle& object) {
  if (!consumer_stream || !py::hasattr(object, "__dlpack_device__")) return std::nullopt;
  const py::tuple device = object.attr("__dlpack_device__")();
  const auto type = device[0].cast<int32_t>();
  const bool on_cuda = type == dlpack::kDeviceCuda || type == dlpack::kDeviceCudaManaged;
  return on_cuda ? consumer_stream : std::nullopt;
}

py::object export_capsule(const py::handle& object, std::string_view name) {
  KVLINK_CHECK(py::hasattr(object, "__dlpack__"), name,
               ": expected an array with __dlpack__ (torch, numpy, cupy, ...); got ",
               std::string(py::str(py::type::handle_of(object))));
  // Immortal on purpose: no destructor runs after the interpreter is gone.
  static const auto* kMaxVersion = new py::object(py::make_tuple(1, 1));
  try {
    py::dict options;
    if (const auto stream = stream_for(object)) options["stream"] = *stream;
    const py::object produce = object.attr("__dlpack__");
    try {
      return produce(py::arg("max_version") = *kMaxVersion, **options);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
    }
    return produce(**options);  // producers older than DLPack 1.0 take no max_version
  } catch (py::error_already_set& error) {
    throw InvalidArgument(
        concat(name, ": the array could not be exported: ", std::string(py::str(error.value()))));
  }
}

// The API of exactly this type: a subclass may have made something else of its arrays.
const dlpack::ExchangeApi* exchange_api(PyObject* object) {
  static PyObject* const kName = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* const attributes = Py_TYPE(object)->tp_dict;
  PyObject* const capsule = attributes ? PyDict_GetItem(attributes, kName) : nullptr;
  if (!capsule || !PyCapsule_IsValid(capsule, "dlpack_exchange_api")) return nullptr;
  auto* header =
      static_cast<dlpack::ExchangeApiHeader*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  while (header && header->version.major > 1) header = header->previous;
  if (!header || header->version.major != 1) return nullptr;
  return reinterpret_cast<const dlpack::ExchangeApi*>(header);
}

// torch's check, which the API leaves out.
bool requires_grad(PyObject* object) {
  static PyObject* const kName = PyUnicode_InternFromString("requires_grad");
  const auto flag = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, kName));
  if (!flag) PyErr_Clear();
  return flag && flag.ptr() != Py_False;
}

}  // namespace

ConsumerStream::ConsumerStream(int64_t stream) : before_(consumer_stream) {
  consumer_stream = stream == 0 ? dlpack::kLegacyStream : stream;
}

ConsumerStream::~ConsumerStream() { consumer_stream = before_; }

Tensor::Tensor(const py::handle& object, std::string_view name) {
  if (!import_directly(object.ptr())) import_capsule(object, name);
}

// False: Python has to be asked, to order streams or to say what is wrong.
bool Tensor::import_directly(PyObject* object) {
  const dlpack::ExchangeApi* const api = exchange_api(object);
  if (!api || requires_grad(object)) return false;
  dlpack::ManagedTensorVersioned* managed = nullptr;
  if (api->managed_from_object(object, &managed) != 0 || !managed) {
    PyErr_Clear();
    return false;
  }
  managed_ = {managed, &release<dlpack::ManagedTensorVersioned>};
  const dlpack::Device device = managed->tensor.device;
  if (consumer_stream && *consumer_stream != dlpack::kNoStreams &&
      device.type == dlpack::kDeviceCuda) {
    void* stream = nullptr;
    if (api->current_work_stream(device.type, device.id, &stream) != 0) {
      PyErr_Clear();
      return false;
    }
    const auto current = static_cast<int64_t>(reinterpret_cast<uintptr_t>(stream));
    if ((current ? current : dlpack::kLegacyStream) != *consumer_stream) return false;
  }
  if (managed->version.major != 1) return false;
  read_only_ = managed->flags & dlpack::kFlagReadOnly;
  take(managed->tensor);
  return true;
}

void Tensor::import_capsule(const py::handle& object, std::string_view name) {
  const py::object capsule = export_capsule(object, name);
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    dlpack::ManagedTensorVersioned* managed;
    managed_ = consume(capsule.ptr(), "dltensor_versioned", "used_dltensor_versioned", &managed);
    KVLINK_CHECK(managed->version.major == 1, name, ": expected DLPack version 1; got ",
                 managed->version.major);
    read_only_ = managed->flags & dlpack::kFlagReadOnly;
    take(managed->tensor);
  } else {
    dlpack::ManagedTensor* managed;
    managed_ = consume(capsule.ptr(), "dltensor", "used_dltensor", &managed);
    take(managed->tensor);
  }
}

void Tensor::take(const dlpack::Tensor& tensor) {
  data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
  device_ = tensor.device;
  type_ = tensor.dtype;
  shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides) {
    strides_.assign(tensor.strides, tensor.strides + tensor.ndim);
  } else {
    strides_.resize(shape_.size());
    int64_t stride = 1;
    for (size_t i = shape_.size(); i-- > 0; stride *= shape_[i]) strides_[i] = stride;
  }
}

int64_t Tensor::num_elements() const {
  int64_t count = 1;
  for (int64_t size : shape_) count *= size;
  return count;
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (size_t i = shape_.size(); i-- > 0; expected *= shape_[i]) {
    if (shape_[i] != 1 && strides_[i] != expected) return num_elements() == 0;
  }
  return true;
}

std::string Tensor::type_name() const {
  const auto sized = [&](const char* kind) { return kind + std::to_string(type_.bits); };
  switch (type_.code) {
    case dlpack::kInt:
      return sized("int");
    case dlpack::kUInt:
      return sized("uint");
    case dlpack::kFloat:
      return sized("float");
    case dlpack::kBFloat:
      return sized("bfloat");
    case dlpack::kBool:
      return "bool";
    case dlpack::kFloat8E4M3FN:
      return "float8_e4m3";
    case dlpack::kFloat8E5M2:
      return "float8_e5m2";
    default:
      return concat("DLPack type (", int{type_.code}, ", ", int{type_.bits}, " bits)");
  }
}

std::optional<DType> Tensor::dtype() const {
  const std::string name = type_name();
  for (int i = 0; i < kNumDTypes; ++i) {
    if (name == dtype_name(static_cast<DType>(i))) return static_cast<DType>(i);
  }
  return std::nullopt;
}

DType dtype_from_name(const std::string& name) {
  for (int i = 0; i < kNumDTypes; ++i) {
    if (name == dtype_name(static_cast<DType>(i))) return static_cast<DType>(i);
  }
  throw InvalidArgument(concat("dtype: unknown name '", name, "'"));
}

const Symbols::Binding* Symbols::find(std::string_view symbol) const {
  const auto found = std::find_if(sizes_.begin(), sizes_.end(),
                                  [&](const Binding& each) { return each.symbol == symbol; });
  return found == sizes_.end() ? nullptr : &*found;
}

void Symbols::bind(std::string_view symbol, int64_t value, std::string_view used_by) {
  sizes_.push_back({std::string(symbol), value, std::string(used_by)});
}

void Symbols::match(std::string_view symbol, int64_t value, std::string_view used_by) {
  const Binding* const found = find(symbol);
  if (!found) return bind(symbol, value, used_by);
  KVLINK_CHECK(found->size == value, used_by, ": expected ", symbol, " = ", found->size, " as in ",
               found->bound_by, "; got ", value);
}

int64_t Symbols::operator[](std::string_view symbol) const {
  const Binding* const found = find(symbol);
  if (!found) throw std::out_of_range("no such symbol");
  return found->size;
}

std::string TensorSpec::describe_shape() const {
  std::string wanted = "[";
  for (size_t i = 0; i < axes.size(); ++i) {
    wanted += i ? ", " : "";
    const auto* symbol = std::get_if<const char*>(&axes[i]);
    wanted += symbol ? *symbol : std::to_string(std::get<int64_t>(axes[i]));
  }
  return wanted + "]";
}

Tensor TensorSpec::import(const py::handle& object, Symbols& symbols) const {
  Tensor tensor(object, name);
  KVLINK_CHECK(tensor.shape().size() == axes.size(), name, ": expected shape ", describe_shape(),
               "; got ", describe(tensor.shape()));
  const std::string type = tensor.type_name();
  if (std::find(dtypes.begin(), dtypes.end(), type) == dtypes.end()) {
    std::string names;
    for (const char* dtype : dtypes) names += concat(names.empty() ? "" : " or ", dtype);
    throw InvalidArgument(concat(name, ": expected dtype ", names, "; got ", type));
  }
  KVLINK_CHECK(!host || tensor.on_host(), name,
               ": expected an array in host memory; got device type ", tensor.device().type);
  KVLINK_CHECK(!writable || !tensor.read_only(), name, ": is written to, but is read-only");
  for (size_t i = 0; i < axes.size(); ++i) {
    if (const auto* symbol = std::get_if<const char*>(&axes[i])) {
      symbols.match(*symbol, tensor.dim(i), name);
    } else {
      KVLINK_CHECK(tensor.dim(i) == std::get<int64_t>(axes[i]), name, ": expected shape ",
                   describe_shape(), "; got ", describe(tensor.shape()));
    }
  }
  for (size_t i = 0; writable && tensor.num_elements() > 0 && i < axes.size(); ++i) {
    KVLINK_CHECK(tensor.stride(i) != 0 || tensor.dim(i) <= 1, name, ": is written to, but axis ", i,
                 " repeats the same elements (stride 0)");
  }
  if (strides == Strides::kContiguous) {
    KVLINK_CHECK(tensor.is_contiguous(), name, ": expected a contiguous array; got strides ",
                 describe(tensor.strides()));
  } else if (strides == Strides::kLastContiguous && !axes.empty()) {
    const size_t last = axes.size() - 1;
    KVLINK_CHECK(tensor.dim(last) <= 1 || tensor.stride(last) == 1 || tensor.num_elements() == 0,
                 name, ": expected a contiguous last axis; got strides ",
                 describe(tensor.strides()));
  }
  return tensor;
}

std::optional<Tensor> TensorSpec::import_optional(const py::handle& object,
                                                  Symbols& symbols) const {
  if (object.is_none()) return std::nullopt;
  return import(object, symbols);
}

}  // namespace kvlink::bindings
