#include "kvlink/transport/ucx/port.hpp"

#include <sched.h>

#include <algorithm>
#include <utility>

#include "kvlink/base/check.hpp"
#include "kvlink/transport/transport.hpp"

namespace kvlink::transport::ucx {

namespace {

constexpr unsigned kMessageId = 0;
// From here on the receiver says when and where to, if the network can write there by itself. TCP
// cannot: fetching costs it a round trip and a copy more.
constexpr size_t kRendezvousBytes = 64 << 10;

// UCX takes no length with an address, but follows those in it: zeros behind it, where they may
// lead. It aborts over a version that it does not know; 1.13 and later know these two.
constexpr int kAddressVersions = 2;
constexpr size_t kMinAddressBytes = 9;  // version and flags, the worker's number
constexpr size_t kAddressPadding = 128 << 10;

std::string describe(ucs_status_t status) { return api().ucs_status_string(status); }

}  // namespace

// One call that UCX has not completed yet.
struct Port::Operation {
  Port* port = nullptr;
  Operation *previous = nullptr, *next = nullptr;
  std::string header;
  std::vector<ucp_dt_iov_t> pieces;
  std::shared_ptr<void> keep, mapping;
  Done done;
};

// A message whose payload still lies at the sender.
struct Port::Arrival {
  std::string header;
  void* descriptor = nullptr;
  size_t size = 0;
};

std::shared_ptr<Port> Port::open(std::shared_ptr<Engine> engine) {
  auto port = std::make_shared<Port>(engine);
  engine->check_room();
  engine->call([&] {
    const Api& ucx = api();
    ucp_worker_params_t params{};
    params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE | UCP_WORKER_PARAM_FIELD_FLAGS;
    params.thread_mode = UCS_THREAD_MODE_SINGLE;
    params.flags = UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK;  // of peers that are gone
    check(ucx.ucp_worker_create(engine->context(), &params, &port->worker_), "ucp_worker_create");
    ucp_am_handler_param_t handler{};
    handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                         UCP_AM_HANDLER_PARAM_FIELD_ARG | UCP_AM_HANDLER_PARAM_FIELD_FLAGS;
    handler.id = kMessageId;
    handler.flags = UCP_AM_FLAG_WHOLE_MSG;
    handler.cb = &Port::on_active_message;
    handler.arg = port.get();
    check(ucx.ucp_worker_set_am_recv_handler(port->worker_, &handler),
          "ucp_worker_set_am_recv_handler");
    check(ucx.ucp_worker_get_efd(port->worker_, &port->event_fd_), "ucp_worker_get_efd");
    ucp_address_t* address = nullptr;
    size_t size = 0;
    check(ucx.ucp_worker_get_address(port->worker_, &address, &size), "ucp_worker_get_address");
    port->address_.assign(reinterpret_cast<const char*>(address), size);
    ucx.ucp_worker_release_address(port->worker_, address);
  });
  return port;
}

Port::Port(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}

Port::~Port() { close(0); }

void Port::set_handlers(Accept accept, OnMessage on_message, OnFailure on_failure,
                        TakeRoom take_room) {
  engine_->call([&] {
    accept_ = std::move(accept);
    on_message_ = std::move(on_message);
    on_failure_ = std::move(on_failure);
    take_room_ = std::move(take_room);
  });
}

void Port::connect(std::string address, bool same_host) {
  KVLINK_CHECK(address.size() >= kMinAddressBytes && (address[0] & 0xf) < kAddressVersions,
               "address: not one of a UCX worker");
  address.append(kAddressPadding, '\0');
  engine_->call([&] {
    KVLINK_CHECK(worker_ != nullptr && endpoint_ == nullptr, "port: closed, or connected before");
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(address.data());
    params.err_mode = same_host ? UCP_ERR_HANDLING_MODE_NONE : UCP_ERR_HANDLING_MODE_PEER;
    same_host_ = same_host;
    params.err_handler.cb = [](void* self, ucp_ep_h, ucs_status_t status) {
      static_cast<Port*>(self)->fail(describe(status));
    };
    params.err_handler.arg = this;
    check(api().ucp_ep_create(worker_, &params, &endpoint_), "ucp_ep_create");
    const auto names = transports();
    all_pass_ = std::all_of(names.begin(), names.end(),
                            [](const std::string& name) { return name.starts_with("tcp/"); });
    // Only now: what the peer says before could not be answered, and waits where it is.
    engine_->add(this);
    for (auto& [message, done] : unsent_) do_send(std::move(message), std::move(done));
    unsent_.clear();
  });
}

// --- operations ----------------------------------------------------------------------------------

void Port::start(Operation* operation, ucs_status_ptr_t request) {
  if (request == nullptr) return finish(operation, UCS_OK);
  if (UCS_PTR_IS_ERR(request)) return finish(operation, UCS_PTR_STATUS(request));
}

void Port::finish(Operation* operation, ucs_status_t status) {
  (operation->previous ? operation->previous->next : operations_) = operation->next;
  if (operation->next) operation->next->previous = operation->previous;
  const std::unique_ptr<Operation> owned(operation);
  if (owned->done) owned->done(status);
}

void Port::send(Outgoing message, Done done) {
  engine_->post(
      [self = shared_from_this(), message = std::move(message), done = std::move(done)]() mutable {
        if (self->endpoint_ == nullptr && self->worker_ != nullptr && !self->closing_) {
          self->unsent_.emplace_back(std::move(message), std::move(done));
        } else {
          self->do_send(std::move(message), std::move(done));
        }
      });
}

// Puts an operation into the list; gives what every call takes.
ucp_request_param_t Port::begin(Operation* operation) {
  operation->port = this;
  operation->next = operations_;
  if (operations_) operations_->previous = operation;
  operations_ = operation;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.user_data = operation;
  param.cb.send = [](void* request, ucs_status_t status, void* user_data) {
    auto* ended = static_cast<Operation*>(user_data);
    ended->port->finish(ended, status);
    api().ucp_request_free(request);
  };
  return param;
}

void Port::do_send(Outgoing message, Done done) {
  if (failed_ || endpoint_ == nullptr) {
    if (done) done(UCS_ERR_CONNECTION_RESET);
    return;
  }
  auto* operation = new Operation;
  ucp_request_param_t param = begin(operation);
  operation->header = std::move(message.header);
  operation->keep = std::move(message.keep);
  operation->mapping = message.mapping;
  operation->done = std::move(done);
  param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
  const bool fetched = message.size >= kRendezvousBytes && !all_pass();
  param.flags = fetched ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER;
  if (message.mapping) {
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
    param.memh = message.mapping->memh();
  }
  const void* data = message.data;
  size_t count = message.size;
  if (!message.pieces.empty()) {
    operation->pieces = std::move(message.pieces);
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE;
    param.datatype = ucp_dt_make_iov();
    data = operation->pieces.data();
    count = operation->pieces.size();
  }
  start(operation, api().ucp_am_send_nbx(endpoint_, kMessageId, operation->header.data(),
                                         operation->header.size(), data, count, &param));
}

void Port::put(std::vector<RemoteRun> runs, std::shared_ptr<void> keep, Done done) {
  move(std::move(runs), std::move(keep), std::move(done), true);
}

void Port::get(std::vector<RemoteRun> runs, std::shared_ptr<void> keep, Done done) {
  move(std::move(runs), std::move(keep), std::move(done), false);
}

void Port::move(std::vector<RemoteRun> runs, std::shared_ptr<void> keep, Done done, bool is_put) {
  // Ends when the last piece and the flush after them have.
  struct Batch {
    Done done;
    size_t left = 1;
    ucs_status_t status = UCS_OK;
    void end(ucs_status_t piece) {
      if (piece != UCS_OK) status = piece;
      if (--left == 0 && done) done(status);
    }
  };
  engine_->post([self = shared_from_this(), runs = std::move(runs), keep = std::move(keep),
                 done = std::move(done), is_put]() mutable {
    const auto batch = std::make_shared<Batch>(Batch{std::move(done)});
    Port* port = self.get();
    for (const RemoteRun& run : runs) {
      const bool usable = !port->failed_ && port->endpoint_ != nullptr &&
                          run.block < port->keys_.size() && port->keys_[run.block] != nullptr;
      if (!usable) {
        batch->status = UCS_ERR_CONNECTION_RESET;
        break;
      }
      ++batch->left;
      port->move_run(run, is_put, keep, [batch](ucs_status_t status) { batch->end(status); });
    }
    if (batch->status == UCS_OK && is_put) {
      ++batch->left;
      port->flush([batch, keep](ucs_status_t status) { batch->end(status); });
    }
    batch->end(UCS_OK);
  });
}

void Port::move_run(const RemoteRun& run, bool is_put, std::shared_ptr<void> keep, Done done) {
  auto* operation = new Operation;
  ucp_request_param_t param = begin(operation);
  operation->keep = std::move(keep);
  operation->done = std::move(done);
  const ucp_rkey_h key = keys_[run.block];
  start(operation,
        is_put ? api().ucp_put_nbx(endpoint_, run.local, run.size, run.remote, key, &param)
               : api().ucp_get_nbx(endpoint_, run.local, run.size, run.remote, key, &param));
}

void Port::flush(Done done) {
  auto* operation = new Operation;
  ucp_request_param_t param = begin(operation);
  operation->done = std::move(done);
  start(operation, api().ucp_ep_flush_nbx(endpoint_, &param));
}

void Port::add_key(uint32_t block, const std::string& packed) {
  engine_->call([&] {
    KVLINK_CHECK(endpoint_ != nullptr, "port: not connected");
    KVLINK_CHECK(block < 65536, "block: expected below 65536; got ", block);
    ucp_rkey_h key = nullptr;
    check(api().ucp_ep_rkey_unpack(endpoint_, packed.data(), &key), "ucp_ep_rkey_unpack");
    if (keys_.size() <= block) keys_.resize(block + 1, nullptr);
    if (keys_[block] != nullptr) api().ucp_rkey_destroy(keys_[block]);
    keys_[block] = key;
  });
}

const std::byte* Port::map_remote(uint64_t address, const std::string& packed) {
  if (endpoint_ == nullptr || closing_) return nullptr;
  auto [found, fresh] = mapped_keys_.emplace(packed, nullptr);
  if (fresh) {
    ucp_rkey_h key = nullptr;
    if (api().ucp_ep_rkey_unpack(endpoint_, packed.data(), &key) != UCS_OK) {
      mapped_keys_.erase(found);
      return nullptr;
    }
    found->second = key;
  }
  void* here = nullptr;
  if (api().ucp_rkey_ptr(found->second, address, &here) != UCS_OK) return nullptr;
  return static_cast<const std::byte*>(here);
}

// --- messages ------------------------------------------------------------------------------------

ucs_status_t Port::on_active_message(void* self, const void* header, size_t header_bytes,
                                     void* data, size_t size, const ucp_am_recv_param_t* param) {
  Port& port = *static_cast<Port*>(self);
  const std::string_view view(static_cast<const char*>(header), header_bytes);
  if (port.closing_ || !port.accept_ || !port.accept_(view, size)) return UCS_OK;
  if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) {
    port.waiting_.push_back({std::string(view), data, size});
    if (port.waiting_.size() == 1) port.fetch_waiting();
    return UCS_INPROGRESS;
  }
  port.on_message_(view, Payload::passing({static_cast<const std::byte*>(data), size}));
  return UCS_OK;
}

void Port::fetch_waiting() {
  while (!waiting_.empty() && !failed_ && !closing_ && fetch(waiting_.front())) {
    waiting_.pop_front();
  }
}

bool Port::fetch(Arrival& arrival) {
  std::shared_ptr<Mapping> room = take_room_(arrival.size);
  if (!room) return false;
  auto* operation = new Operation;
  ucp_request_param_t param = begin(operation);
  operation->keep = room;
  operation->done = [this, header = std::move(arrival.header), room,
                     size = arrival.size](ucs_status_t status) {
    if (status == UCS_OK && !closing_) {
      on_message_(header, Payload({room->data(), size}, room));
    }
  };
  param.cb.recv_am = [](void* request, ucs_status_t status, size_t, void* user_data) {
    auto* ended = static_cast<Operation*>(user_data);
    ended->port->finish(ended, status);
    api().ucp_request_free(request);
  };
  param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
  param.memh = room->memh();
  start(operation, api().ucp_am_recv_data_nbx(worker_, arrival.descriptor, room->data(),
                                              arrival.size, &param));
  return true;
}

void Port::room_freed() {
  engine_->post([self = weak_from_this()] {
    if (const auto port = self.lock()) port->fetch_waiting();
  });
}

// --- state ---------------------------------------------------------------------------------------

bool Port::progress() { return api().ucp_worker_progress(worker_) != 0; }

bool Port::arm() { return api().ucp_worker_arm(worker_) == UCS_OK; }

void Port::fail(const std::string& why) {
  if (failed_) return;
  failed_ = true;
  if (!closing_ && on_failure_) on_failure_(why);
}

std::vector<std::string> Port::transports() {
  std::vector<std::string> found;
  const auto add = [&](const std::string& name) {
    if (std::find(found.begin(), found.end(), name) == found.end()) found.push_back(name);
  };
  engine_->call([&] {
    if (endpoint_ == nullptr || failed_) return;
    ucp_transport_entry_t entries[32] = {};
    ucp_ep_attr_t attr{};
    attr.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
    attr.transports = {.entries = entries, .num_entries = 32, .entry_size = sizeof entries[0]};
    if (api().ucp_ep_query(endpoint_, &attr) != UCS_OK) return;
    for (unsigned i = 0; i < attr.transports.num_entries && entries[i].transport_name; ++i) {
      add(concat(entries[i].transport_name, "/", entries[i].device_name));
    }
    if (!found.empty()) return;
    // UCX 1.13 tells it in words alone: "lane[0]:  2:tcp/eth0.0 md[1] ..."
    for (const std::string& line :
         printed([&](FILE* stream) { api().ucp_ep_print_info(endpoint_, stream); })) {
      const size_t lane = line.find("lane[");
      const size_t slash = lane == std::string::npos ? lane : line.find('/', lane);
      if (slash == std::string::npos) continue;
      const size_t first = line.find_last_of(": ", slash) + 1;
      add(line.substr(first, line.find_first_of(". ", slash) - first));
    }
  });
  return found;
}

void Port::close(int64_t grace_ns) {
  try {
    // What the engine's thread is handling now may still post its answer, which is to go first.
    if (grace_ns > 0) engine_->call([] {});
    engine_->call([&] { destroy(grace_ns); });
  } catch (const std::exception&) {
    // The engine has stopped: nothing runs any more.
  }
}

void Port::destroy(int64_t grace_ns) {
  if (worker_ == nullptr) return;
  const Api& ucx = api();
  // NOTE: this thread serves every link, so it never waits here for longer than the bounds say.
  const auto progress_until = [&](auto&& done, int64_t bound_ns) {
    const int64_t end = now_ns() + bound_ns;
    while (!done() && now_ns() < end) {
      if (ucx.ucp_worker_progress(worker_) == 0) sched_yield();
    }
  };
  closing_ = true;
  for (auto& [message, done] : std::exchange(unsent_, {})) {
    if (done) done(UCS_ERR_CANCELED);
  }
  for (const Arrival& arrival : std::exchange(waiting_, {})) {
    ucx.ucp_am_data_release(worker_, arrival.descriptor);
  }
  if (endpoint_ != nullptr) {
    const auto done = std::make_shared<bool>(false);
    if (!failed_ && grace_ns > 0) {
      flush([done](ucs_status_t) { *done = true; });
      progress_until([&] { return *done; }, grace_ns);
    }
    if (!same_host_) {  // else the worker takes its end with it
      auto* operation = new Operation;
      ucp_request_param_t param = begin(operation);
      param.op_attr_mask |= UCP_OP_ATTR_FIELD_FLAGS;
      param.flags = UCP_EP_CLOSE_FLAG_FORCE;
      start(operation, ucx.ucp_ep_close_nbx(endpoint_, &param));
      progress_until([&] { return operations_ == nullptr; }, 500'000'000);
    }
    endpoint_ = nullptr;
    engine_->remove(this);
  }
  for (ucp_rkey_h key : keys_) {
    if (key != nullptr) ucx.ucp_rkey_destroy(key);
  }
  for (const auto& [packed, key] : mapped_keys_) ucx.ucp_rkey_destroy(key);
  keys_.clear();
  mapped_keys_.clear();
  ucx.ucp_worker_destroy(worker_);
  worker_ = nullptr;
  while (operations_ != nullptr) finish(operations_, UCS_ERR_CANCELED);
  accept_ = {};
  on_message_ = {};
  on_failure_ = {};
  take_room_ = {};
}

}  // namespace kvlink::transport::ucx
