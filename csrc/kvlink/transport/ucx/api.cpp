#include "kvlink/transport/ucx/api.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <sstream>

#include "kvlink/base/check.hpp"

namespace kvlink::transport::ucx {

namespace {

std::mutex load_mutex;
std::unique_ptr<const Api> loaded;  // never unloaded: UCX has threads and handlers of its own

// Null, and *why, when the library cannot be used.
std::unique_ptr<Api> try_load(const std::string& candidate, std::string* why) {
  void* library = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    *why = dlerror();
    return nullptr;
  }
  auto found = std::make_unique<Api>();
#define KVLINK_UCX_FIND(name)                                                     \
  found->name = reinterpret_cast<decltype(found->name)>(dlsym(library, #name));   \
  if (found->name == nullptr) {                                                   \
    *why = concat(candidate, ": has no ", #name, "; expected UCX 1.13 or later"); \
    dlclose(library);                                                             \
    return nullptr;                                                               \
  }
  KVLINK_UCX_FUNCTIONS(KVLINK_UCX_FIND)
#undef KVLINK_UCX_FIND
  unsigned major = 0, minor = 0, release = 0;
  found->ucp_get_version(&major, &minor, &release);
  if (major != kApiMajor || minor < kApiMinor) {
    *why = concat(candidate, ": expected UCX 1.13 or later; got ", major, ".", minor);
    dlclose(library);
    return nullptr;
  }
  // What goes wrong between peers is told by kvlink, on its own channels.
  using SetOption = ucs_status_t(const char*, const char*);
  auto* set_option = reinterpret_cast<SetOption*>(dlsym(library, "ucs_global_opts_set_value"));
  if (set_option != nullptr && std::getenv("UCX_LOG_LEVEL") == nullptr) {
    set_option("LOG_LEVEL", "fatal");
  }
  found->version = concat(major, ".", minor, ".", release);
  Dl_info info{};
  const bool known = dladdr(reinterpret_cast<void*>(found->ucp_init_version), &info) != 0;
  found->path = known && info.dli_fname != nullptr ? info.dli_fname : candidate;
  return found;
}

}  // namespace

const Api& load_api(const std::vector<std::string>& candidates) {
  std::lock_guard lock(load_mutex);
  if (loaded) return *loaded;
  std::string reasons;
  for (const std::string& candidate : candidates) {
    std::string why;
    loaded = try_load(candidate, &why);
    if (loaded) return *loaded;
    reasons += (reasons.empty() ? "" : "; ") + why;
  }
  throw Unsupported("no UCX library could be loaded: " + reasons);
}

const Api& api() {
  std::lock_guard lock(load_mutex);
  if (!loaded) throw Unsupported("no UCX library has been loaded");
  return *loaded;
}

void check(ucs_status_t status, const char* call) {
  if (status == UCS_OK) return;
  throw std::runtime_error(concat(call, ": ", api().ucs_status_string(status)));
}

std::vector<std::string> printed(const std::function<void(FILE*)>& print) {
  std::vector<std::string> lines;
  char* text = nullptr;
  size_t size = 0;
  FILE* stream = open_memstream(&text, &size);
  if (stream == nullptr) return lines;
  print(stream);
  std::fclose(stream);
  std::istringstream all(std::string(text, size));
  std::free(text);
  for (std::string line; std::getline(all, line);) lines.push_back(line);
  return lines;
}

std::vector<std::string> available_transports() {
  const Api& ucx = api();
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_RMA;
  ucp_context_h context = nullptr;
  check(ucx.ucp_init_version(kApiMajor, kApiMinor, &params, nullptr, &context), "ucp_init");
  std::vector<std::string> found;
  // "#     resource 0  :  md 0  dev 0  flags -- tcp/eth0"
  for (const std::string& line :
       printed([&](FILE* stream) { ucx.ucp_context_print_info(context, stream); })) {
    const size_t last = line.find_last_of(' ');
    if (line.find("resource ") != std::string::npos && last != std::string::npos &&
        line.find('/', last) != std::string::npos) {
      found.push_back(line.substr(last + 1));
    }
  }
  ucx.ucp_cleanup(context);
  return found;
}

}  // namespace kvlink::transport::ucx
