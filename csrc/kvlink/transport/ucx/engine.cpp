#include "kvlink/transport/ucx/engine.hpp"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cstdlib>
#include <system_error>

#include "kvlink/base/check.hpp"
#include "kvlink/transport/transport.hpp"
#include "kvlink/transport/ucx/port.hpp"

namespace kvlink::transport::ucx {

namespace {

constexpr int kMaxSleepMs = 200;
// UCX's posix transport keeps some 4 MiB a worker in /dev/shm. Where they only just do not fit, UCX
// 1.22 ends the process (uct_mm_iface_recv_desc_init); SysV's memory, which has no such place, does
// as well. So it is used where there is much room, and as long as there is some.
constexpr size_t kMuchShm = size_t{512} << 20, kSomeShm = size_t{64} << 20;

size_t free_shm() {
  struct statvfs found;
  return statvfs("/dev/shm", &found) == 0 ? size_t{found.f_bavail} * found.f_frsize : 0;
}

// Options that the environment does not set itself.
void set_default(ucp_config_t* config, const char* name, const char* value) {
  const std::string variable = std::string("UCX_") + name;
  if (std::getenv(variable.c_str()) != nullptr) return;
  api().ucp_config_modify(config, name, value);  // an option that a version lacks changes nothing
}

}  // namespace

Mapping::~Mapping() { engine_->unmap(memh_); }

const std::string& Mapping::rkey() {
  std::call_once(packed_, [&] {
    engine_->call([&] {
      void* buffer = nullptr;
      size_t size = 0;
      check(api().ucp_rkey_pack(engine_->context(), memh_, &buffer, &size), "ucp_rkey_pack");
      rkey_.assign(static_cast<const char*>(buffer), size);
      api().ucp_rkey_buffer_release(buffer);
    });
  });
  return rkey_;
}

std::shared_ptr<Engine> Engine::create() {
  const Api& ucx = api();
  ucp_config_t* config = nullptr;
  check(ucx.ucp_config_read(nullptr, nullptr, &config), "ucp_config_read");
  // NOTE: a stopped process can later go on writing through cma, xpmem and knem whatever its peer
  // does, so no memory of ours may be reached that way.
  const bool much_shm = free_shm() >= kMuchShm;
  set_default(config, "TLS", much_shm ? "^cma,xpmem,knem" : "^cma,xpmem,knem,posix");
  // What TCP sends at once: a chunk and its headers, or UCX would put it together by another copy.
  const std::string segment = std::to_string(kPassingChunkBytes + 4096);
  set_default(config, "TCP_TX_SEG_SIZE", segment.c_str());
  set_default(config, "TCP_RX_SEG_SIZE", segment.c_str());
  set_default(config, "TCP_MAX_IOV", std::to_string(kMaxPieces + 8).c_str());  // and headers
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_RMA | UCP_FEATURE_WAKEUP;
  params.name = "kvlink";
  ucp_context_h context = nullptr;
  const ucs_status_t status = ucx.ucp_init_version(kApiMajor, kApiMinor, &params, config, &context);
  ucx.ucp_config_release(config);
  check(status, "ucp_init");
  std::shared_ptr<Engine> engine(new Engine(context), [](Engine* last) {
    // The thread's own command may drop the last reference; it cannot wait for itself.
    if (last->on_thread()) {
      std::thread([last] { delete last; }).detach();
    } else {
      delete last;
    }
  });
  engine->uses_shm_ = much_shm && std::getenv("UCX_TLS") == nullptr;
  return engine;
}

void Engine::check_room() const {
  const size_t free = uses_shm_ ? free_shm() : kSomeShm;
  if (free >= kSomeShm) return;
  throw std::runtime_error(
      concat("UCX needs ", kSomeShm >> 20, " MiB free in /dev/shm, there are ", free >> 20));
}

Engine::Engine(ucp_context_h context) : context_(context) {
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  epoll_event event{.events = EPOLLIN, .data = {.u64 = 0}};
  if (epoll_fd_ < 0 || wake_fd_ < 0 || epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, wake_fd_, &event) != 0) {
    throw std::system_error(errno, std::generic_category(), "ucx engine: epoll");
  }
  thread_ = std::thread([this] { loop(); });
  pthread_setname_np(thread_.native_handle(), "kvlink-ucx");
}

Engine::~Engine() {
  stop();
  api().ucp_cleanup(context_);
  close(epoll_fd_);
  close(wake_fd_);
}

void Engine::unmap(ucp_mem_h memh) {
  if (post([this, memh] { api().ucp_mem_unmap(context_, memh); })) return;
  std::lock_guard lock(stop_mutex_);  // until the thread has gone
  api().ucp_mem_unmap(context_, memh);
}

void Engine::stop() {
  std::lock_guard stop_lock(stop_mutex_);
  {
    std::lock_guard lock(mutex_);
    stopped_ = true;
  }
  eventfd_write(wake_fd_, 1);
  if (thread_.joinable() && !on_thread()) thread_.join();
}

bool Engine::post(std::function<void()> command) {
  {
    std::lock_guard lock(mutex_);
    if (stopped_) return false;
    commands_.push_back(std::move(command));
  }
  if (asleep_.exchange(false)) eventfd_write(wake_fd_, 1);
  return true;
}

void Engine::call(const std::function<void()>& command) {
  if (on_thread()) return command();
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr error;
  const bool posted = post([&] {
    try {
      command();
    } catch (...) {
      error = std::current_exception();
    }
    std::lock_guard lock(mutex);
    done = true;
    changed.notify_one();
  });
  if (!posted) throw std::runtime_error("ucx engine: stopped");
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return done; });
  if (error) std::rethrow_exception(error);
}

std::shared_ptr<Mapping> Engine::map(void* address, size_t size) {
  std::shared_ptr<Mapping> mapping;
  call([&] {
    ucp_mem_map_params_t params{};
    params.field_mask = UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_ADDRESS |
                        UCP_MEM_MAP_PARAM_FIELD_FLAGS;
    params.address = address;
    params.length = size;
    params.flags =
        UCP_MEM_MAP_NONBLOCK | (address == nullptr ? unsigned{UCP_MEM_MAP_ALLOCATE} : 0u);
    ucp_mem_h memh = nullptr;
    check(api().ucp_mem_map(context_, &params, &memh), "ucp_mem_map");
    ucp_mem_attr_t attr{};
    attr.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS | UCP_MEM_ATTR_FIELD_LENGTH;
    check(api().ucp_mem_query(memh, &attr), "ucp_mem_query");
    mapping = std::make_shared<Mapping>(shared_from_this(), memh,
                                        address == nullptr ? attr.address : address, size);
  });
  return mapping;
}

void Engine::add(Port* port) {
  ports_.push_back(port);
  epoll_event event{.events = EPOLLIN, .data = {.u64 = 1}};
  if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, port->event_fd(), &event) != 0) {
    throw std::system_error(errno, std::generic_category(), "ucx engine: epoll");
  }
}

void Engine::remove(Port* port) {
  std::erase(ports_, port);
  epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, port->event_fd(), nullptr);
}

bool Engine::run_commands() {
  std::vector<std::function<void()>> commands;
  {
    std::lock_guard lock(mutex_);
    commands.swap(commands_);
  }
  for (auto& command : commands) command();
  return !commands.empty();
}

bool Engine::arm() {
  for (Port* port : ports_) {
    if (!port->arm()) return false;
  }
  return true;
}

void Engine::loop() {
  while (true) {
    bool busy = run_commands();
    // A port may close itself meanwhile.
    for (size_t i = 0; i < ports_.size(); ++i) busy |= ports_[i]->progress();
    if (busy) continue;
    // NOTE: sleeps at once. Looking again for a while first takes a core from those who move: a
    // third of the time of a transfer between two processes on two cores.
    {
      std::lock_guard lock(mutex_);
      if (stopped_ && commands_.empty()) return;
      if (!commands_.empty()) continue;
      asleep_.store(true);
    }
    if (arm()) {
      epoll_event events[8];
      epoll_wait(epoll_fd_, events, 8, kMaxSleepMs);
      eventfd_t count;
      eventfd_read(wake_fd_, &count);
    }
    asleep_.store(false);
  }
}

}  // namespace kvlink::transport::ucx
