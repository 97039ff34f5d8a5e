// A Task as the kernels take it: one cpu::Merge over the whole tensor, and its chunks.
#pragma once
#include <algorithm>

#include "../cpu/jobs.h"
#include "merge.h"

namespace pk {

struct Job {
  cpu::Model models[cpu::kMaxModels];
  cpu::Merge merge;
  int64_t numel;

  explicit Job(const Task& t) : numel(t.in.numel) {
    for (int m = 0; m < t.in.n; m++) {
      const auto at = size_t(m);
      models[m] = {t.in.data[m],
                   at < t.weight.size() ? t.weight[at] : 1,
                   at < t.vote.size() ? t.vote[at] : 1,
                   at < t.share.size() ? t.share[at] : 0,  // no shares: the divisor 0 becomes 1
                   0,
                   at < t.threshold.size() ? t.threshold[at] : 0,
                   at < t.index.size() ? t.index[at] : 0};
    }
    // Written past the caches when the result would not stay in them anyway.
    const bool stream = numel * dtype_size(t.out_dtype) >= (int64_t(1) << 20) && uintptr_t(t.out) % 64 == 0;
    merge = {t.out,    t.in.base, models,   t.in.n,          t.in.dtype,           t.out_dtype,
             t.lambda, stream,    t.offset, uint32_t(t.key), uint32_t(t.key >> 32)};
  }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  int64_t chunks() const { return (numel + cpu::kChunk - 1) / cpu::kChunk; }
  int64_t begin(int64_t chunk) const { return chunk * cpu::kChunk; }
  int64_t end(int64_t chunk) const { return std::min(numel, (chunk + 1) * cpu::kChunk); }
};

/// Merges elements [begin, end) with cuts: one kernel call per stretch in which every model's threshold is
/// constant.
void merge_with_cuts(const cpu::Merge& merge, int combine, const Cut* cuts, int64_t begin, int64_t end);

}  // namespace pk
