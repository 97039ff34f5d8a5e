// What lives as long as the process: a pool of threads and recycled scratch memory. A forked child gets fresh
// ones.
#pragma once
#include <fenv.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace pk {

/// Rounding to nearest, denormals kept, whatever mode the calling thread or its parent was in; put back at
/// the end. Without it the bits of a result would depend on which thread a chunk fell to.
class PlainFloats {
 public:
  PlainFloats();
  ~PlainFloats();
  PlainFloats(const PlainFloats&) = delete;
  PlainFloats& operator=(const PlainFloats&) = delete;

 private:
#ifdef __SSE__
  unsigned saved_;
#else
  fenv_t saved_;
#endif
};

/// Runs body(argument, slot) on the calling thread (slot 0) and on up to threads - 1 pool threads, whichever
/// are free; returns when all that started have ended, and throws what the first of them threw. Safe from
/// many threads at once; bodies must share their work dynamically.
void pool(int threads, void (*body)(void*, int slot), void* argument);

/// Recycled memory on huge pages where the system has them; contents are undefined. Up to 64 MiB is kept for
/// later calls, because the first touch of fresh pages costs more than the kernels do.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(Scratch&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
  size_t bytes_;
};

/// Asks for huge pages behind a large fresh buffer.
void advise_huge(void* data, size_t bytes);

}  // namespace pk
