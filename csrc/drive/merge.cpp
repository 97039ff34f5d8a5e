#include "merge.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "job.h"
#include "parallel.h"

namespace pk {

using cpu::kChunk;

void linear_merge(const Task& task) {
  const Job job(task);
  parallel_chunks(job.chunks(), task.threads,
                  [&](int64_t c, int) { kernels().linear_merge(job.merge, job.begin(c), job.end(c)); });
}

void dare_merge(const Task& task) {
  const Job job(task);
  parallel_chunks(job.chunks(), task.threads, [&](int64_t c, int) {
    kernels().dare_merge(job.merge, task.combine, job.begin(c), job.end(c));
  });
}

void ties_merge(const Task& task, const std::vector<Cut>& cuts) {
  const Job job(task);
  parallel_chunks(job.chunks(), task.threads, [&](int64_t c, int) {
    merge_with_cuts(job.merge, task.combine, cuts.data(), job.begin(c), job.end(c));
  });
}

void l1_norms(const Task& task, double* sums) {
  const Job job(task);
  const int64_t blocks = (task.in.numel + cpu::kBlock - 1) / cpu::kBlock;
  parallel_chunks(blocks, task.threads, [&](int64_t b, int) {
    kernels().l1_norms(job.merge, sums + b * task.in.n * 2, b * cpu::kBlock,
                       std::min(task.in.numel, (b + 1) * cpu::kBlock));
  });
}

void dot_products(const Task& task, int grad_dtype, const void* grad, double* sums) {
  const Job job(task);
  const int64_t blocks = (task.in.numel + cpu::kBlock - 1) / cpu::kBlock;
  parallel_chunks(blocks, task.threads, [&](int64_t b, int) {
    kernels().dot_products(job.merge, grad_dtype, grad, sums + b * task.in.n, b * cpu::kBlock,
                           std::min(task.in.numel, (b + 1) * cpu::kBlock));
  });
}

void elect_sign(int8_t* out, const Task& task) {
  const Job job(task);
  parallel_chunks(job.chunks(), task.threads, [&](int64_t c, int) {
    kernels().elect_sign(out, job.merge, task.combine, job.begin(c), job.end(c));
  });
}

void merge_with_cuts(const cpu::Merge& merge, int combine, const Cut* cuts, int64_t begin, int64_t end) {
  cpu::Model models[cpu::kMaxModels];
  cpu::Merge job = merge;
  job.models = models;
  while (begin < end) {
    int64_t stop = end;
    for (int m = 0; m < job.n; m++) {
      models[m] = merge.models[m];
      const uint32_t key = std::min(cuts[m].key, kInfinity + 1);  // a NaN is never cut away
      const int64_t edge = cuts[m].last >= merge.offset + end ? end : cuts[m].last + 1 - merge.offset;
      models[m].key = begin < edge ? key : std::min(key + 1, kInfinity + 1);
      if (begin < edge) stop = std::min(stop, edge);
    }
    job.stream = merge.stream && (begin * dtype_size(job.out_dtype)) % 64 == 0;
    kernels().ties_merge(job, combine, begin, stop);
    begin = stop;
  }
}

}  // namespace pk
