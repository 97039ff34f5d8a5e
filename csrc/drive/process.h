// What lives as long as the process: a pool of threads and recycled scratch memory. A forked child gets fresh
// ones.
#pragma once
#include <fenv.h>

#include <atomic>
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
void parallel(int threads, void (*body)(void*, int slot), void* argument);

/// Calls work(chunk, slot) once for every chunk in [0, chunks), by `start`, which is as `parallel`; a slot
/// sees its chunks in increasing order.
template <class Work>
void chunks_by(decltype(parallel)& start, int64_t chunks, int threads, Work& work) {
  if (threads > chunks) threads = int(chunks);
  if (threads <= 1) {
    const PlainFloats plain;
    for (int64_t c = 0; c < chunks; c++) work(c, 0);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t chunks;
    Work& work;
  } shared{{}, chunks, work};
  start(
      threads,
      [](void* argument, int slot) {
        auto& s = *static_cast<Shared*>(argument);
        for (int64_t c; (c = s.next.fetch_add(1, std::memory_order_relaxed)) < s.chunks;) s.work(c, slot);
      },
      &shared);
}

/// The same by the pool.
template <class Work>
void parallel_chunks(int64_t chunks, int threads, Work&& work) {
  chunks_by(parallel, chunks, threads, work);
}

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
