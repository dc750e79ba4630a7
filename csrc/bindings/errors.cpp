#include "errors.hpp"

#include <pybind11/pybind11.h>

#include <system_error>

#include "kvlink/base/check.hpp"
#include "kvlink/base/readiness.hpp"

namespace kvlink::bindings {

namespace py = pybind11;

namespace {

void raise(const char* class_name, const char* message) {
  const py::object error = py::module_::import("kvlink.errors").attr(class_name);
  PyErr_SetString(error.ptr(), message);
}

}  // namespace

void register_exceptions() {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const InvalidArgument& error) {
      raise("InvalidArgument", error.what());
    } catch (const PageTableError& error) {
      raise("PageTableError", error.what());
    } catch (const Unsupported& error) {
      raise("Unsupported", error.what());
    } catch (const NotReady& error) {
      raise("NotReady", error.what());
    } catch (const NeverReady& error) {
      raise("NeverReady", error.what());
    } catch (const std::system_error& error) {
      py::object os_error =
          py::reinterpret_borrow<py::object>(PyExc_OSError)(error.code().value(), error.what());
      PyErr_SetObject(PyExc_OSError, os_error.ptr());
    }
  });
}

}  // namespace kvlink::bindings
