// DARE: drop at random, then add up or elect and average.
// Traffic: reads base and n tuned tensors once, writes out once: (n + 2) * numel * sizeof(T). One pass; masks
// are drawn in registers. l1_norms reads (n + 1) * numel * sizeof(T) and writes 16 * n bytes per block of
// 4096 elements.
#include "merge_loop.h"
#include "tree.h"

namespace pk::cpu::PK_ISA {

void dare_merge(const Merge& job, int combine, int64_t begin, int64_t end) {
  if (combine == kSum) return merge_any<KeepRandom, Sum>(job, begin, end);
  if (combine == kWeighted) return merge_any<KeepRandom, Weighted>(job, begin, end);
  return merge_any<KeepRandom, Plain>(job, begin, end);
}

namespace {

/// Sums of |delta| and kept |delta| of one block (at most 4096 elements) of one model.
template <class T>
void block_norms(const Merge& one, int64_t begin, int64_t end, double* sums) {
  KeepRandom<T> keep(one);
  double all[kTree] = {}, kept[kTree] = {};
  for (int64_t tile = begin; tile < end; tile += kTile) {
    alignas(64) float magnitude[kTile] = {}, survivor[kTile] = {};
    alignas(64) T x[kTile] = {}, base[kTile] = {};
    const size_t bytes = size_t(end - tile < kTile ? end - tile : kTile) * sizeof(T);
    memcpy(static_cast<void*>(x), static_cast<const T*>(one.models[0].data) + tile, bytes);
    if (one.base) memcpy(static_cast<void*>(base), static_cast<const T*>(one.base) + tile, bytes);
    keep.start(one, tile);
    for (int64_t i = 0; i < kTile; i += kGroup) {
      const Pair t = load(x + i), b = load(base + i);
      Pair d = {t.a - b.a, t.b - b.b};
      M ka, kb;
      keep.masks(one.models[0], 0, i, d, ka, kb);
      d = {select(negative(d.a), -d.a, d.a), select(negative(d.b), -d.b, d.b)};
      Pair k = {multiply_where(ka, d.a, F::of(1)), multiply_where(kb, d.b, F::of(1))};
      if (kParted<T>) {
        d = interleave(d);
        k = interleave(k);
      }
      store(magnitude + i, d.a);
      store(magnitude + i + kLanes, d.b);
      store(survivor + i, k.a);
      store(survivor + i + kLanes, k.b);
    }
    for (int i = 0; i < kTile; i += kTree)
      for (int l = 0; l < kTree; l++) {
        all[l] += double(magnitude[i + l]);
        kept[l] += double(survivor[i + l]);
      }
  }
  sums[0] = tree(all);
  sums[1] = tree(kept);
}

}  // namespace

void l1_norms(const Merge& job, double* sums, int64_t begin, int64_t end) {
  for (int m = 0; m < job.n; m++) {
    Merge one = job;
    one.models = job.models + m;
    one.n = 1;
    if (job.dtype == kF32)
      block_norms<float>(one, begin, end, sums + 2 * m);
    else if (job.dtype == kBF16)
      block_norms<bf16>(one, begin, end, sums + 2 * m);
    else
      block_norms<f16>(one, begin, end, sums + 2 * m);
  }
}

}  // namespace pk::cpu::PK_ISA
