// The DLPack ABI (https://dmlc.github.io/dlpack): the structures that arrays travel in. Declared
// here because the extension needs no more of DLPack than these; both the legacy and the versioned
// form.
#pragma once

#include <cstdint>

namespace kvlink::dlpack {

inline constexpr int32_t kDeviceCpu = 1;
inline constexpr int32_t kDeviceCuda = 2;
inline constexpr int32_t kDeviceCudaHost = 3;
inline constexpr int32_t kDeviceCudaManaged = 13;

inline constexpr uint8_t kInt = 0;
inline constexpr uint8_t kUInt = 1;
inline constexpr uint8_t kFloat = 2;
inline constexpr uint8_t kBFloat = 4;
inline constexpr uint8_t kBool = 6;
inline constexpr uint8_t kFloat8E4M3FN = 10;
inline constexpr uint8_t kFloat8E5M2 = 12;

inline constexpr uint64_t kFlagReadOnly = 1;

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // elements; null: row-major
  uint64_t byte_offset;
};

struct ManagedTensor {  // capsule "dltensor"
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor*);
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ManagedTensorVersioned {  // capsule "dltensor_versioned"
  Version version;
  void* manager;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};

// What a type may have as `__dlpack_c_exchange_api__` (capsule "dlpack_exchange_api", DLPack 1.3):
// exchange without Python in between, and without ordering streams. Functions return 0, or raise.
struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;
};

struct ExchangeApi {
  ExchangeApiHeader header;
  void* allocate;
  int (*managed_from_object)(void* object, ManagedTensorVersioned** out);
  void* managed_to_object;
  void* tensor_from_object;
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

// Streams as `__dlpack__` is told of them; others are handles.
inline constexpr int64_t kNoStreams = -1;  // nothing is to be ordered
inline constexpr int64_t kLegacyStream = 1;

}  // namespace kvlink::dlpack
