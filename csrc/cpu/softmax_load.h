// From elements to z = mask(softcap(x) / temperature) - shift, as floats in element order, a stretch at a
// time.
#pragma once
#include "softmax.h"

namespace pk::cpu::PK_ISA {
namespace {

/// Floats of `count` elements; writes whole pairs.
template <class T>
PK_IN void widen(const T* x, int64_t count, float* z) {
  for (int64_t i = 0; i < count; i += kGroup) {
    const Pair p = count - i < kGroup ? load_first(x + i, int(count - i), T{}) : load(x + i);
    put(z + i, kParted<T> ? interleave(p) : p, false);
  }
}
inline void widen_any(int dtype, const void* data, int64_t at, int64_t count, float* z) {
  if (dtype == kF32) return widen(static_cast<const float*>(data) + at, count, z);
  if (dtype == kBF16) return widen(static_cast<const bf16*>(data) + at, count, z);
  return widen(static_cast<const f16*>(data) + at, count, z);
}

template <class Function>
PK_IN void over_floats(float* z, int64_t count, Function f) {
  for (int64_t i = 0; i < count; i += kLanes) store(z + i, f(load_floats(z + i)));
}

template <class T>
PK_IN void add_mask(const void* mask, int64_t at, int64_t step, int64_t count, float* z) {
  for (int64_t i = 0; i < count; i++) z[i] += element<T>(mask, at + i * step);
}

inline void apply_mask(const Softmax& job, int64_t at, int64_t step, int64_t count, float* z) {
  if (job.mask_kind == kF32) return add_mask<float>(job.mask, at, step, count, z);
  if (job.mask_kind == kBF16) return add_mask<bf16>(job.mask, at, step, count, z);
  if (job.mask_kind == kF16) return add_mask<f16>(job.mask, at, step, count, z);
  const uint8_t* keep = static_cast<const uint8_t*>(job.mask) + at;
  if (step == 1)
    for (int64_t i = 0; i < count; i++) z[i] = keep[i] ? z[i] : kMinusInfinity;
  else
    for (int64_t i = 0; i < count; i++) z[i] = keep[i * step] ? z[i] : kMinusInfinity;
}

/// `count` elements from flat index `at`, whose mask starts at `mask_at` and goes on by `mask_step`. Some of
/// the kSlack floats behind z are written too.
inline void load_z(const Softmax& job, int64_t at, int64_t mask_at, int64_t mask_step, int64_t count,
                   float shift, float* z) {
  widen_any(job.dtype, job.x, at, count, z);
  if (job.softcap != 0)
    for (int64_t i = 0; i < count; i++) z[i] = capped(z[i], double(job.softcap));
  if (job.temperature != 1) {
    const F t = F::of(job.temperature);
    over_floats(z, count, [=](F x) PK_ALWAYS { return x / t; });
  }
  if (job.mask_kind != kNoMask) apply_mask(job, mask_at, mask_step, count, z);
  if (shift != 0) {
    const F s = F::of(shift);
    over_floats(z, count, [=](F x) PK_ALWAYS { return x - s; });
  }
}

/// Elements [begin, begin + count) of a row of the last dimension.
PK_IN void load_row(const Softmax& job, int64_t row, int64_t begin, int64_t count, float shift, float* z) {
  load_z(job, row * job.n + begin, row * job.mask_stride[0] + begin * job.mask_stride[1], job.mask_stride[1],
         count, shift, z);
}

}  // namespace
}  // namespace pk::cpu::PK_ISA
