#include "page_ids.hpp"

#include <algorithm>

#include "kvlink/base/check.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

// An id beyond int32 stays one that no pool has; it is an error only if the entry is used.
int32_t saturate(int64_t page) {
  return static_cast<int32_t>(std::clamp<int64_t>(page, INT32_MIN, INT32_MAX));
}

}  // namespace

PageIds::PageIds(const py::object& pages, const std::string& name) {
  if (py::hasattr(pages, "__dlpack__")) {
    Symbols symbols;
    array_ = TensorSpec{name.c_str(), {"num_pages"}, {"int32", "int64"}, TensorSpec::Strides::kAny}
                 .import(pages, symbols);
    size_ = array_->dim(0);
    if (array_->type_name() == "int32" && array_->is_contiguous()) {
      data_ = array_->data<int32_t>();
      return;
    }
    copied_.reserve(size_);
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t at = i * array_->stride(0);
      copied_.push_back(array_->type_name() == "int32" ? array_->data<int32_t>()[at]
                                                       : saturate(array_->data<int64_t>()[at]));
    }
  } else {
    for (const py::handle& page : py::reinterpret_borrow<py::object>(pages)) {
      try {
        copied_.push_back(saturate(page.cast<int64_t>()));
      } catch (const py::cast_error&) {
        throw InvalidArgument(concat(name, "[", copied_.size(), "]: expected an integer; got ",
                                     std::string(py::repr(page))));
      }
    }
    size_ = copied_.size();
  }
  data_ = copied_.data();
}

std::vector<LayerView> stored_layers(const PoolView& pool, const std::vector<int32_t>& layers,
                                     const char* name) {
  std::vector<LayerView> views;
  for (const int32_t layer : layers) {
    KVLINK_CHECK(layer >= 0 && layer < static_cast<int64_t>(pool.stored_layers.size()), name,
                 ": expected stored layers 0 to ", pool.stored_layers.size() - 1, "; got ", layer);
    views.push_back(pool.stored_layers[layer]);
  }
  return views;
}

}  // namespace kvlink::bindings
