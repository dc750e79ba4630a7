#include <pybind11/pybind11.h>

#include "errors.hpp"
#include "register.hpp"

PYBIND11_MODULE(_C, module) {
  using namespace kvlink::bindings;
  module.doc() = "kvlink's CPU operators and transports. Import kvlink, not this.";
  register_exceptions();
  register_runtime(module);
  register_convert(module);
  register_memory(module);
  register_pool(module);
  register_readiness(module);
  register_attention(module);
  register_probes(module);
  register_cache_ops(module);
  register_transport(module);
}
