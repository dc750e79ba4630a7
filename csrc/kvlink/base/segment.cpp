#include "kvlink/base/segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "kvlink/base/check.hpp"

namespace kvlink {

namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

std::byte* map(size_t num_bytes, int flags, int fd) {
  void* data = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (data == MAP_FAILED) fail(concat("could not map ", num_bytes, " bytes"));
  madvise(data, num_bytes, MADV_HUGEPAGE);  // best effort: hosts decide, shared memory apart
  return static_cast<std::byte*>(data);
}

}  // namespace

Segment Segment::create(size_t num_bytes, bool shared) {
  KVLINK_CHECK(num_bytes > 0, "num_bytes: expected > 0; got 0");
  if (!shared) {
    return {map(num_bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1), num_bytes, -1};
  }
  const int fd = memfd_create("kvlink", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) fail("memfd_create");
  try {
    if (ftruncate(fd, static_cast<off_t>(num_bytes)) != 0) {
      fail(concat("could not size shared memory to ", num_bytes, " bytes"));
    }
    // Sealed: whoever maps it knows that it cannot shrink under them.
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail("F_ADD_SEALS");
    return {map(num_bytes, MAP_SHARED, fd), num_bytes, fd};
  } catch (...) {
    close(fd);
    throw;
  }
}

Segment Segment::attach(int fd, size_t num_bytes) {
  struct stat status;
  if (fstat(fd, &status) != 0) fail(concat("fstat of shared memory descriptor ", fd));
  KVLINK_CHECK(static_cast<size_t>(status.st_size) >= num_bytes,
               "shared memory: expected at least ", num_bytes, " bytes; got ", status.st_size);
  const int seals = fcntl(fd, F_GET_SEALS);
  KVLINK_CHECK(seals >= 0 && (seals & F_SEAL_SHRINK), "shared memory: descriptor ", fd,
               " is not sealed against shrinking");
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0) fail("F_DUPFD_CLOEXEC");
  try {
    return {map(num_bytes, MAP_SHARED, own), num_bytes, own};
  } catch (...) {
    close(own);
    throw;
  }
}

Segment::Segment(Segment&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      fd_(std::exchange(other.fd_, -1)) {}

Segment::~Segment() {
  if (data_) munmap(data_, size_);
  if (fd_ >= 0) close(fd_);
}

}  // namespace kvlink
