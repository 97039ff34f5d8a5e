// Threads for products that stand between torch's own: those of torch's OpenMP, where the process has it.
//
// After each of torch's parallel loops its threads wait awake for some milliseconds, one on every core, for
// the next. Threads of ours would share the cores with them, and a product of 10 ms took 16. Theirs start at
// once.
#pragma once
#include "process.h"

namespace pk {

/// As `parallel`; and by it, where there is no such runtime, it has fewer threads, or it is at work.
void team(int threads, void (*body)(void*, int slot), void* argument);

/// As parallel_chunks.
template <class Work>
void team_chunks(int64_t chunks, int threads, Work&& work) {
  chunks_by(team, chunks, threads, work);
}

}  // namespace pk
