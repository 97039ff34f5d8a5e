// The launchers, one per op; each runs all tensors of a table. `stream` is the caller's.
#pragma once
#include "device.h"
#include "jobs.h"

namespace pk::cuda {

/// All tensors of a launch share dtype and number of models. `tiles`: of 4096 elements, over all tensors.
struct Launch {
  const Table& table;
  int dtype;
  int n;
  int jobs;
  int64_t tiles;
  int64_t largest;  // elements of the largest tensor
  cudaStream_t stream;
};

/// Writes host bytes to device memory through the arguments of launches.
void upload(char* to, const char* from, int64_t bytes, cudaStream_t stream);

void linear_merge(const Launch&);
void ties_merge(const Launch&, int combine);
void dare_merge(const Launch&, int combine);
/// head.cut_key and cut_last become the cuts of head.models[].rank. `keep_equals`: the tie rule "keep".
void kth_magnitude(const Launch&, bool keep_equals);
/// Bytes that kth_magnitude needs at head.scratch.
int64_t kth_scratch(int64_t numel, int n);
/// head.out: int64 [n][65536], zeroed by the caller; `prefix` per model is in models[].key, unless `all`.
void magnitude_histogram(const Launch&, int shift, bool all);
/// head.out: float64 [tiles][n][2].
void l1_norms(const Launch&);
/// head.out: float64 [tiles][n].
void dot_products(const Launch&);
/// head.out: int8.
void elect_sign(const Launch&, int combine);

}  // namespace pk::cuda
