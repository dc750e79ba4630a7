// One function per family; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace kvlink::bindings {

void register_cache_ops(pybind11::module_& module);  // append_kv, relayout_pages, digest_pages
void register_convert(pybind11::module_& module);    // scalar conversions, for tests
void register_attention(pybind11::module_& module);  // paged_attention, merge_states
void register_memory(pybind11::module_& module);     // Segment, array views, tensor_info
void register_readiness(pybind11::module_& module);  // Readiness
void register_pool(pybind11::module_& module);       // Layout, PoolView
void register_transport(pybind11::module_& module);  // slots and transfers, then each path
void register_transport_host_shm(pybind11::module_& module);
void register_transport_ucx(pybind11::module_& module);  // the same over UCX, if it was built
void register_probes(pybind11::module_& module);         // limits that benchmarks measure
void register_runtime(pybind11::module_& module);        // threads, SIMD level, build report

}  // namespace kvlink::bindings
