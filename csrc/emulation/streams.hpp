// What tests say of streams and ask of device memory; launches are over when they return all the
// same.
#pragma once

namespace kvlink::emulation {

// A test has said that what is queued on the stream of that number does not end.
bool is_busy(unsigned long long stream);

// What cudaMallocAsync has given out, and what it got back.
void count_allocation();
void count_free();

}  // namespace kvlink::emulation
