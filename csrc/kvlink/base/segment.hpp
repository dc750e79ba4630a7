// Page-aligned, zeroed memory: private to the process, or shared through a file descriptor that has
// no name, so that nothing outlives the last process that maps it.
#pragma once

#include <cstddef>

namespace kvlink {

class Segment {
 public:
  // shared: backed by a memfd whose descriptor other processes may receive. Throws
  // std::system_error.
  static Segment create(size_t num_bytes, bool shared);
  // Maps a descriptor received from elsewhere (which stays the caller's; it is duplicated).
  // Throws InvalidArgument when the file is shorter than num_bytes or can still be shrunk under us.
  static Segment attach(int fd, size_t num_bytes);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&&) = delete;
  ~Segment();

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  int fd() const { return fd_; }  // -1 when private

 private:
  Segment(std::byte* data, size_t size, int fd) : data_(data), size_(size), fd_(fd) {}

  std::byte* data_;
  size_t size_;
  int fd_;
};

}  // namespace kvlink
