#include "kvlink/layout/serialise.hpp"

#include <bit>
#include <cstring>

#include "kvlink/base/check.hpp"

namespace kvlink {

namespace {

static_assert(std::endian::native == std::endian::little, "the canonical form is little-endian");

constexpr std::string_view kMagic = "KVLY";

struct Header {
  char magic[4];
  uint16_t version;
  uint8_t form, dtype, scale;
  uint8_t reserved[3];
  int32_t num_kv_heads, head_dim, head_dim_v, page_size;
};
static_assert(sizeof(Header) == 28 && sizeof(Plane) == 40);
static_assert(sizeof(Header) + 4 * sizeof(Plane) == kLayoutBytes);

}  // namespace

std::array<char, kLayoutBytes> layout_to_bytes(const KVLayout& layout) {
  Header header{};
  std::memcpy(header.magic, kMagic.data(), kMagic.size());
  header.version = kLayoutVersion;
  header.form = static_cast<uint8_t>(layout.form);
  header.dtype = static_cast<uint8_t>(layout.dtype);
  header.scale = static_cast<uint8_t>(layout.scale);
  header.num_kv_heads = layout.num_kv_heads;
  header.head_dim = layout.head_dim;
  header.head_dim_v = layout.head_dim_v;
  header.page_size = layout.page_size;
  std::array<char, kLayoutBytes> bytes;
  char* cursor = bytes.data();
  std::memcpy(cursor, &header, sizeof header);
  cursor += sizeof header;
  for (const Plane* plane : {&layout.k, &layout.v, &layout.k_scale, &layout.v_scale}) {
    std::memcpy(cursor, plane, sizeof *plane);
    cursor += sizeof *plane;
  }
  return bytes;
}

KVLayout layout_from_bytes(std::string_view bytes) {
  KVLINK_CHECK(bytes.size() == kLayoutBytes, "layout: expected ", kLayoutBytes, " bytes; got ",
               bytes.size());
  Header header;
  std::memcpy(&header, bytes.data(), sizeof header);
  KVLINK_CHECK(std::string_view(header.magic, 4) == kMagic, "layout: bad magic");
  KVLINK_CHECK(header.version == kLayoutVersion, "layout version: expected ", kLayoutVersion,
               "; got ", header.version);
  KVLINK_CHECK(header.form <= 3, "layout form: expected < 4; got ", int{header.form});
  KVLINK_CHECK(header.dtype < kNumDTypes, "layout dtype: expected < ", kNumDTypes, "; got ",
               int{header.dtype});
  KVLINK_CHECK(header.scale <= 3, "layout scale: expected < 4; got ", int{header.scale});
  KVLINK_CHECK(!(header.reserved[0] | header.reserved[1] | header.reserved[2]),
               "layout: reserved bytes are not zero");
  KVLayout layout;
  layout.form = static_cast<KVForm>(header.form);
  layout.dtype = static_cast<DType>(header.dtype);
  layout.scale = static_cast<ScaleGranularity>(header.scale);
  layout.num_kv_heads = header.num_kv_heads;
  layout.head_dim = header.head_dim;
  layout.head_dim_v = header.head_dim_v;
  layout.page_size = header.page_size;
  KVLINK_CHECK(layout.num_kv_heads > 0 && layout.head_dim > 0 && layout.head_dim_v >= 0 &&
                   layout.page_size > 0,
               "layout: dimensions must be positive; got num_kv_heads ", layout.num_kv_heads,
               ", head_dim ", layout.head_dim, ", head_dim_v ", layout.head_dim_v, ", page_size ",
               layout.page_size);
  KVLINK_CHECK((layout.form == KVForm::kOpaque) == (layout.head_dim_v == 0),
               "layout: head_dim_v is 0 exactly for opaque pages; got ", layout.head_dim_v);
  KVLINK_CHECK(layout.form != KVForm::kLatent || layout.head_dim_v <= layout.head_dim,
               "layout head_dim_v: V is the first part of K, at most ", layout.head_dim, "; got ",
               layout.head_dim_v);
  KVLINK_CHECK(
      layout.form == KVForm::kOpaque ? !layout.has_scales() : layout.dtype != DType::kUInt8,
      "layout: opaque pages have no scales, and uint8 is for opaque pages");
  const char* cursor = bytes.data() + sizeof header;
  for (Plane* plane : {&layout.k, &layout.v, &layout.k_scale, &layout.v_scale}) {
    std::memcpy(plane, cursor, sizeof *plane);
    cursor += sizeof *plane;
    for (int64_t value : {plane->offset_bytes, plane->stride_page, plane->stride_slot,
                          plane->stride_head, plane->stride_dim}) {
      KVLINK_CHECK(value >= 0 && value < (int64_t{1} << 48),
                   "layout: offsets and strides must be in [0, 2^48); got ", value);
    }
  }
  return layout;
}

}  // namespace kvlink
