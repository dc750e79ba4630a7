// What fault tests ask of a link.
#include "kvlink/transport/ucx/link.hpp"

namespace kvlink::transport::ucx {

namespace {

// For a pull that moves nothing.
KVLayout no_layout() {
  KVLayout layout;
  layout.form = KVForm::kOpaque;
  layout.dtype = DType::kUInt8;
  layout.num_kv_heads = layout.head_dim = layout.page_size = 1;
  return layout;
}

}  // namespace

bool Link::take_fault(Fault fault) {
  std::atomic<int>& left = faults_[static_cast<size_t>(fault)];
  int seen = left.load();
  while (seen > 0 && !left.compare_exchange_weak(seen, seen - 1)) {
  }
  return seen > 0;
}

void Link::inject(Fault fault, int count) { faults_[static_cast<size_t>(fault)].store(count); }

Status Link::enter(SlotKey key, SlotKind kind, int32_t model_layer, int32_t model_head,
                   int64_t deadline_ns) {
  const auto beginning = std::make_shared<Beginning>();
  Header header;
  header.type = Type::kBegin;
  header.slot = key.slot;
  header.generation = key.generation;
  header.kind = kind;
  std::string payload;
  if (kind == SlotKind::kOffer)
    payload = Target{.layout = no_layout(), .num_layers = 1, .scales = {}}.bytes();
  {
    std::lock_guard lock(mutex_);
    header.transfer = next_number_++;
    beginnings_[header.transfer] = beginning;
  }
  Status status = ask(header, std::move(payload), beginning, deadline_ns);
  if (status == Status::kOk) {
    header.type = Type::kEnter;
    header.seq = 1;
    header.model_layer = model_layer;
    header.model_head = model_head;
    header.num_heads = 1;
    header.count = 1;
    status = ask(header, {}, beginning, deadline_ns);
  }
  std::lock_guard lock(mutex_);
  beginnings_.erase(header.transfer);
  entered_ = header;
  return status;
}

void Link::leave() {
  Header header;
  {
    std::lock_guard lock(mutex_);
    header = entered_;
  }
  header.type = Type::kLeave;
  header.status = Status::kCancelled;
  send(header);
  header.type = Type::kFinish;
  send(header);
}

}  // namespace kvlink::transport::ucx
