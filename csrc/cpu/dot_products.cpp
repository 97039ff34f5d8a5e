// Gradient times task vectors, for learned merging coefficients.
// Traffic: reads grad, base and n tuned tensors once: numel * sizeof(G) + (n + 1) * numel * sizeof(T); writes
// 8 * n bytes per block of 4096 elements. One pass: a block of grad and base stays in the first-level cache
// while the models go by.
#include "lanes.h"
#include "tree.h"

namespace pk::cpu::PK_ISA {
namespace {

/// One tile of x - base (x itself when `base` is null) as floats in element order.
template <class T>
PK_IN void whole_tile(const T* x, const T* base, float* out) {
  for (int i = 0; i < kTile; i += kGroup) {
    const Pair t = load(x + i), b = base ? load(base + i) : zero_pair();
    Pair d = {t.a - b.a, t.b - b.b};
    if (kParted<T>) d = interleave(d);
    store(out + i, d.a);
    store(out + i + kLanes, d.b);
  }
}

/// The same for elements [at, at + count) of a tensor; fewer than a tile's are followed by zeros.
template <class T>
PK_IN void tile_of_deltas(const void* data, const void* base, int64_t at, int64_t count, float* out) {
  const T *x = static_cast<const T*>(data) + at, *y = base ? static_cast<const T*>(base) + at : nullptr;
  if (count >= kTile) return whole_tile(x, y, out);
  alignas(64) T few[kTile] = {}, under[kTile] = {};
  memcpy(static_cast<void*>(few), x, size_t(count) * sizeof(T));
  if (y) memcpy(static_cast<void*>(under), y, size_t(count) * sizeof(T));
  whole_tile(few, under, out);
}

template <class T>
double block_dot(const float* grad, const void* data, const void* base, int64_t begin, int64_t end) {
  double lane[kTree] = {};
  for (int64_t tile = begin; tile < end; tile += kTile, grad += kTile) {
    alignas(64) float d[kTile];
    tile_of_deltas<T>(data, base, tile, end - tile, d);
    for (int i = 0; i < kTile; i += kTree)
      for (int l = 0; l < kTree; l++) lane[l] += double(grad[i + l]) * double(d[i + l]);
  }
  return tree(lane);
}

template <class G>
void widen(const void* grad, int64_t begin, int64_t end, float* out) {
  for (int64_t tile = begin; tile < end; tile += kTile, out += kTile)
    tile_of_deltas<G>(grad, nullptr, tile, end - tile, out);
}

}  // namespace

void dot_products(const Merge& job, int grad_dtype, const void* grad, double* sums, int64_t begin,
                  int64_t end) {
  alignas(64) float wide[kBlock];
  if (grad_dtype == kF32)
    widen<float>(grad, begin, end, wide);
  else if (grad_dtype == kBF16)
    widen<bf16>(grad, begin, end, wide);
  else
    widen<f16>(grad, begin, end, wide);
  for (int m = 0; m < job.n; m++) {
    const void* data = job.models[m].data;
    if (job.dtype == kF32)
      sums[m] = block_dot<float>(wide, data, job.base, begin, end);
    else if (job.dtype == kBF16)
      sums[m] = block_dot<bf16>(wide, data, job.base, begin, end);
    else
      sums[m] = block_dot<f16>(wide, data, job.base, begin, end);
  }
}

}  // namespace pk::cpu::PK_ISA
