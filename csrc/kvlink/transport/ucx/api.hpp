// UCX's C API, found at run time: a table of the functions that this path calls. One build works
// with whichever UCX is there (1.13 or later), and without one.
#pragma once

#include <ucp/api/ucp.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace kvlink::transport::ucx {

// The oldest interface that has what we use; a library of a later version serves it too.
inline constexpr unsigned kApiMajor = 1, kApiMinor = 13;

#define KVLINK_UCX_FUNCTIONS(X)     \
  X(ucp_am_data_release)            \
  X(ucp_am_recv_data_nbx)           \
  X(ucp_am_send_nbx)                \
  X(ucp_cleanup)                    \
  X(ucp_config_modify)              \
  X(ucp_config_print)               \
  X(ucp_config_read)                \
  X(ucp_config_release)             \
  X(ucp_context_print_info)         \
  X(ucp_ep_close_nbx)               \
  X(ucp_ep_create)                  \
  X(ucp_ep_flush_nbx)               \
  X(ucp_ep_print_info)              \
  X(ucp_ep_query)                   \
  X(ucp_ep_rkey_unpack)             \
  X(ucp_get_nbx)                    \
  X(ucp_get_version)                \
  X(ucp_init_version)               \
  X(ucp_mem_map)                    \
  X(ucp_mem_query)                  \
  X(ucp_mem_unmap)                  \
  X(ucp_put_nbx)                    \
  X(ucp_request_cancel)             \
  X(ucp_request_free)               \
  X(ucp_rkey_buffer_release)        \
  X(ucp_rkey_destroy)               \
  X(ucp_rkey_pack)                  \
  X(ucp_rkey_ptr)                   \
  X(ucp_worker_arm)                 \
  X(ucp_worker_create)              \
  X(ucp_worker_destroy)             \
  X(ucp_worker_get_address)         \
  X(ucp_worker_get_efd)             \
  X(ucp_worker_progress)            \
  X(ucp_worker_release_address)     \
  X(ucp_worker_set_am_recv_handler) \
  X(ucs_status_string)

struct Api {
#define KVLINK_UCX_MEMBER(name) decltype(&::name) name = nullptr;
  KVLINK_UCX_FUNCTIONS(KVLINK_UCX_MEMBER)
#undef KVLINK_UCX_MEMBER
  std::string path;     // the file that was loaded
  std::string version;  // "1.22.0"
};

// Loads the first candidate that can be loaded; once per process, later calls give the same.
// Throws Unsupported, which tells why each of them could not.
const Api& load_api(const std::vector<std::string>& candidates);
// What was loaded; throws Unsupported before.
const Api& api();

// The transports and devices that a context of this library sees here ("tcp/eth0", "posix/memory").
std::vector<std::string> available_transports();

// What `print` writes, line by line.
std::vector<std::string> printed(const std::function<void(FILE*)>& print);

// Throws std::runtime_error that names the call.
void check(ucs_status_t status, const char* call);

}  // namespace kvlink::transport::ucx
