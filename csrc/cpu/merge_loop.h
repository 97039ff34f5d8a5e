// The streaming merge that linear, TIES with known cuts and DARE share: keep policy x combine policy.
#pragma once
#include "draws.h"

namespace pk::cpu::PK_ISA {

struct Every {};  // the mask of a policy that keeps all
PK_IN F multiply_where(Every, F a, F b) { return a * b; }

template <class T>
struct KeepAll {
  PK_MEMBER explicit KeepAll(const Merge&) {}
  PK_MEMBER void start(const Merge&, int64_t) {}
  PK_MEMBER void masks(const Model&, int, int64_t, Pair, Every&, Every&) const {}
  using Mask = Every;
};

/// By magnitude. Cuts never exceed the first NaN key, so a NaN is always kept and makes the result NaN.
template <class T>
struct KeepLarge {
  PK_MEMBER explicit KeepLarge(const Merge&) {}
  PK_MEMBER void start(const Merge&, int64_t) {}
  PK_MEMBER void masks(const Model& model, int, int64_t, Pair d, M& a, M& b) const {
    const U cut = broadcast(model.key);
    a = at_least(key(d.a), cut);
    b = at_least(key(d.b), cut);
  }
  using Mask = M;
};

/// At random: 16-bit draws, one tile of 128 elements at a time. A NaN is kept whatever its draw.
template <class T>
struct KeepRandom {
  alignas(64) uint32_t draws[kMaxModels][kTile / 2];

  PK_MEMBER explicit KeepRandom(const Merge&) {}
  PK_MEMBER void start(const Merge& job, int64_t tile_start) {
    const uint64_t counter = uint64_t(job.offset + tile_start) / kTile * 16;
    for (int m = 0; m < job.n; m++) draw_tile(counter, job.models[m].index, job.key0, job.key1, draws[m]);
  }
  PK_MEMBER void masks(const Model& model, int m, int64_t in_tile, Pair d, M& a, M& b) const {
    const U words = load_words(draws[m] + in_tile / 2);
    if (kParted<T>)
      below_parted(Below(model.threshold), words, a, b);
    else
      below_in_order(Below(model.threshold), words, a, b);
    a = a | is_nan(d.a);
    b = b | is_nan(d.b);
  }
  using Mask = M;
};

struct Sum {
  F sum = F::of(0);
  template <class Mask>
  PK_MEMBER void add(Mask kept, F delta, const Model& model) {
    sum = sum + multiply_where(kept, delta, broadcast(model.weight));
  }
  PK_MEMBER F value() const { return sum; }
};
struct Weighted {
  Elect<F> elect;
  template <class Mask>
  PK_MEMBER void add(Mask kept, F delta, const Model& model) {
    elect.add(multiply_where(kept, delta, broadcast(model.weight)), broadcast(model.share));
  }
  PK_MEMBER F value() const { return elect.mean(); }
};
struct Plain {
  ElectPlain<F> elect;
  template <class Mask>
  PK_MEMBER void add(Mask kept, F delta, const Model& model) {
    elect.add(multiply_where(kept, delta, broadcast(model.vote)), delta * broadcast(model.weight),
              broadcast(model.share));
  }
  PK_MEMBER F value() const { return elect.mean(); }
};

template <class T, template <class> class Keep, class Combine>
PK_IN void merge_tiles(const Merge& job, int64_t begin, int64_t end) {  // whole tiles
  const F lambda = broadcast(job.lambda);
  const Model* models = job.models;
  const int n = job.n;
  Keep<T> keep(job);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    keep.start(job, tile);
    for (int64_t i = tile; i < tile + kTile; i += kGroup) {
      const Pair base = load_or_zero<T>(job.base, i);
      Combine a, b;
      for (int m = 0; m < n; m++) {
        const Pair x = load(static_cast<const T*>(models[m].data) + i);
        const Pair d = {x.a - base.a, x.b - base.b};
        typename Keep<T>::Mask ka, kb;
        keep.masks(models[m], m, i - tile, d, ka, kb);
        a.add(ka, d.a, models[m]);
        b.add(kb, d.b, models[m]);
      }
      put_as<T>(job.out_dtype, job.out, i, {base.a + lambda * a.value(), base.b + lambda * b.value()},
                job.stream);
    }
  }
}

/// Elements [begin, end): whole tiles in place, the rest (< 128) through padded copies, so nothing outside is
/// touched.
template <class T, template <class> class Keep, class Combine>
static void merge(const Merge& job, int64_t begin, int64_t end) {
  const int64_t full = begin + (end - begin) / kTile * kTile;
  merge_tiles<T, Keep, Combine>(job, begin, full);
  if (full < end) {
    const size_t bytes = size_t(end - full) * sizeof(T);
    alignas(64) T tuned[kMaxModels][kTile], base[kTile];
    alignas(64) float out[kTile];
    Model models[kMaxModels];
    Merge rest = job;
    rest.out = out;
    rest.models = models;
    rest.offset = job.offset + full;
    rest.stream = false;
    if (job.base) {
      memset(static_cast<void*>(base), 0, sizeof base);
      memcpy(static_cast<void*>(base), static_cast<const T*>(job.base) + full, bytes);
      rest.base = base;
    }
    for (int m = 0; m < job.n; m++) {
      models[m] = job.models[m];
      memset(static_cast<void*>(tuned[m]), 0, sizeof tuned[m]);
      memcpy(static_cast<void*>(tuned[m]), static_cast<const T*>(models[m].data) + full, bytes);
      models[m].data = tuned[m];
    }
    merge_tiles<T, Keep, Combine>(rest, 0, kTile);
    const int64_t size = dtype_size(job.out_dtype);
    memcpy(static_cast<char*>(job.out) + full * size, out, size_t((end - full) * size));
  }
  if (job.stream) fence();
}

/// Picks the instance for the job's dtype.
template <template <class> class Keep, class Combine>
static void merge_any(const Merge& job, int64_t begin, int64_t end) {
  if (job.dtype == kF32) return merge<float, Keep, Combine>(job, begin, end);
  if (job.dtype == kBF16) return merge<bf16, Keep, Combine>(job, begin, end);
  return merge<f16, Keep, Combine>(job, begin, end);
}

}  // namespace pk::cpu::PK_ISA
