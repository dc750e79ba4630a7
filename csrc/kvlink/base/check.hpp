// Errors that reach the user. Each message names the argument, what was expected and what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kvlink {

// A value the caller passed is wrong. Python: kvlink.errors.InvalidArgument (a ValueError).
struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A page id names no page of the pool, or an unmapped entry would have been read.
// Python: kvlink.errors.PageTableError (an IndexError).
struct PageTableError : std::out_of_range {
  using std::out_of_range::out_of_range;
};

// The request is meaningful, but this backend has no instance for it.
// Python: kvlink.errors.Unsupported (a NotImplementedError).
struct Unsupported : std::logic_error {
  using std::logic_error::logic_error;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace kvlink

#define KVLINK_CHECK(condition, ...)                                                  \
  do {                                                                                \
    if (!(condition)) throw ::kvlink::InvalidArgument(::kvlink::concat(__VA_ARGS__)); \
  } while (0)
