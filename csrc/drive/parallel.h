// Loops over chunks by several threads: those of torch's OpenMP, where the process has it.
//
// After each of torch's parallel loops its threads wait awake for some milliseconds, one on every core, for
// the next. Threads of ours would share the cores with them; theirs start at once. But a loop of theirs ends
// when all of them were there, so whoever keeps the cores busy otherwise (a merge that reads and writes
// files) asks for ours, of which those that are free work.
#pragma once
#include <atomic>
#include <cstdint>

#include "process.h"

namespace pk {

/// Runs body(argument, slot) on the calling thread (slot 0) and on up to threads - 1 others; returns when all
/// that started have ended, and throws what the first of them threw. Safe from many threads at once; bodies
/// must share their work dynamically.
void parallel(int threads, void (*body)(void*, int slot), void* argument);

/// Whether the calling thread's loops keep to our threads from now on; returns whether they did before.
bool own_threads(bool own);

/// No loop of this process runs on torch's threads any more: in a forked child there are none.
void forget_team();

/// Calls work(chunk, slot) once for every chunk in [0, chunks); a slot sees its chunks in increasing order.
template <class Work>
void parallel_chunks(int64_t chunks, int threads, Work&& work) {
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
  parallel(
      threads,
      [](void* argument, int slot) {
        auto& s = *static_cast<Shared*>(argument);
        for (int64_t c; (c = s.next.fetch_add(1, std::memory_order_relaxed)) < s.chunks;) s.work(c, slot);
      },
      &shared);
}

}  // namespace pk
