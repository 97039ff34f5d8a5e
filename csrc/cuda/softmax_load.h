// From 16-byte vectors at any alignment to shared memory, and from there to logits as floats.
#pragma once
#include "block_sums.h"
#include "softmax_sum.h"
#include "tile.h"

namespace pk::cuda {

/// Sixteen bits of a type that the kernel is told: one compilation serves both.
struct Half {
  uint16_t bits;
};
__device__ __forceinline__ float widen_as(int, float x) { return x; }
__device__ __forceinline__ float widen_as(int dtype, Half x) {
  return dtype == kBF16 ? widen(bf16{x.bits}) : widen(f16{x.bits});
}
/// -inf, or 0, as an element.
__device__ __forceinline__ void set_least(int, float* x) { *x = kMinusInfinity; }
__device__ __forceinline__ void set_least(int dtype, Half* x) {
  x->bits = dtype == kBF16 ? 0xFF80u : 0xFC00u;
}

template <class T>
constexpr int kWide = 16 / int(sizeof(T));  // elements of a vector
template <class T>
constexpr int kVectorsOf = kBatch / kWide<T>;  // of a batch

/// One element at any address.
template <class T>
__device__ __forceinline__ T element_at(const void* data, int64_t at, bool aligned) {
  T x;
  const char* from = static_cast<const char*>(data) + at * int64_t(sizeof(T));
  if (aligned)
    x = *reinterpret_cast<const T*>(from);
  else
    memcpy(&x, from, sizeof(T));
  return x;
}
__device__ __forceinline__ float float_at(int dtype, const void* data, int64_t at, bool aligned) {
  return dtype == kF32 ? element_at<float>(data, at, aligned)
                       : widen_as(dtype, element_at<Half>(data, at, aligned));
}

/// 16 bytes of registers to shared memory.
template <class T>
__device__ __forceinline__ void hold(char* shared, const Raw<T, kWide<T>>& raw) {
  uint4 word;
  memcpy(&word, raw.x, 16);
  *reinterpret_cast<uint4*>(shared) = word;
}

/// Begins to copy elements [at, at + count) of `data` to 16 bytes of shared memory; `nothing` beyond.
template <class T>
__device__ __forceinline__ void fetch(char* shared, const void* data, int64_t at, int count, bool aligned,
                                      T nothing) {
  const char* from = static_cast<const char*>(data) + at * int64_t(sizeof(T));
  if (count >= kWide<T> && reinterpret_cast<uintptr_t>(from) % 16 == 0) return copy_16(shared, from);
  Raw<T, kWide<T>> raw;
#pragma unroll
  for (int k = 0; k < kWide<T>; k++) raw.x[k] = k < count ? element_at<T>(from, k, aligned) : nothing;
  hold(shared, raw);
}

/// The same of elements of any dtype, as floats: 16 bytes each `step` bytes apart.
template <class T>
__device__ __forceinline__ void fetch_floats(char* shared, int64_t step, int dtype, const void* data,
                                             int64_t at, int count, bool aligned) {
#pragma unroll
  for (int half = 0; half < kWide<T>; half += 4) {
    Raw<float, 4> raw;
#pragma unroll
    for (int k = 0; k < 4; k++)
      raw.x[k] = half + k < count ? float_at(dtype, data, at + half + k, aligned) : 0;
    hold(shared + half / 4 * step, raw);
  }
}

/// The floats of a vector in shared memory.
template <class T>
__device__ __forceinline__ void widen_vector(int dtype, const char* shared, float* z) {
  Raw<T, kWide<T>> raw;
  const uint4 word = *reinterpret_cast<const uint4*>(shared);
  memcpy(static_cast<void*>(raw.x), &word, 16);
#pragma unroll
  for (int k = 0; k < kWide<T>; k++) z[k] = widen_as(dtype, raw.x[k]);
}

#ifdef __CUDA_ARCH__
/// Two floats, neither of them NaN, rounded by the hardware.
__device__ __forceinline__ unsigned narrow_two(float a, float b, bf16) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
  return y;
}
__device__ __forceinline__ unsigned narrow_two(float a, float b, f16) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
  return y;
}
#else
template <class O>
unsigned narrow_two(float a, float b, O) {
  O y[2];
  narrow(a, y), narrow(b, y + 1);
  return unsigned(y[0].bits) | unsigned(y[1].bits) << 16;
}
#endif

template <class O>
__device__ __forceinline__ void pack(const float* y, int count, bool numbers, O* to) {
  if (numbers) {
#pragma unroll
    for (int k = 0; k < count; k += 2) {
      const unsigned two = narrow_two(y[k], y[k + 1], O{});
      to[k].bits = uint16_t(two), to[k + 1].bits = uint16_t(two >> 16);
    }
  } else {
#pragma unroll
    for (int k = 0; k < count; k++) narrow(y[k], to + k);
  }
}
__device__ __forceinline__ void pack(const float* y, int count, bool, float* to) {
#pragma unroll
  for (int k = 0; k < count; k++) narrow(y[k], to + k);
}

/// Rounds `width` floats and writes the first `count` of them. `numbers`: none is NaN.
template <int width, class O>
__device__ __forceinline__ void put_as(void* out, int64_t at, const float* y, int count, bool aligned,
                                       bool numbers) {
  Raw<O, width> raw;
  pack(y, width, numbers, raw.x);
  constexpr int kBytes = width * int(sizeof(O));
  using Piece = typename Chunk<(kBytes > 16 ? 16 : kBytes)>::Type;
  char* to = static_cast<char*>(out) + at * int64_t(sizeof(O));
  if (count >= width && reinterpret_cast<uintptr_t>(to) % sizeof(Piece) == 0) {
#pragma unroll
    for (int b = 0; b < kBytes; b += int(sizeof(Piece))) {
      Piece piece;
      memcpy(&piece, reinterpret_cast<const char*>(raw.x) + b, sizeof(Piece));
      __stcs(reinterpret_cast<Piece*>(to + b), piece);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < width; k++)
    if (k < count && aligned)
      reinterpret_cast<O*>(to)[k] = raw.x[k];
    else if (k < count)
      memcpy(to + k * int(sizeof(O)), raw.x + k, sizeof(O));
}
template <int width>
__device__ __forceinline__ void put(int dtype, void* out, int64_t at, const float* y, int count, bool aligned,
                                    bool numbers) {
  if (dtype == kF32)
    put_as<width, float>(out, at, y, count, aligned, numbers);
  else if (dtype == kBF16)
    put_as<width, bf16>(out, at, y, count, aligned, numbers);
  else
    put_as<width, f16>(out, at, y, count, aligned, numbers);
}
__device__ inline void put_one(int dtype, void* out, int64_t at, float y) {
  const auto write = [&](auto x) {
    narrow(y, &x);
    memcpy(static_cast<char*>(out) + at * int64_t(sizeof x), &x, sizeof x);
  };
  if (dtype == kF32)
    write(0.0f);
  else if (dtype == kBF16)
    write(bf16{});
  else
    write(f16{});
}

/// x / t, rounded once. Two corrections of x * (1 / t) are as exact as the division and take half as long,
/// where nothing over- or underflows on the way (Markstein, 1990).
__device__ __forceinline__ float quotient(float x, float t, float reciprocal) {
  const float size = x < 0 ? -x : x;
  if (!(size > 0x1p-80f && size < 0x1p80f) || reciprocal == 0) return x / t;
  const float q = x * reciprocal;
  const float r = __builtin_fmaf(__builtin_fmaf(-q, t, x), reciprocal, q);
  return __builtin_fmaf(__builtin_fmaf(-r, t, x), reciprocal, r);
}

/// Softcap, temperature and mask. `at(j)`: where element j's mask stands, -1 where there is no element j.
template <class At>
__device__ __forceinline__ void apply_options(const Softmax& job, At at, float (&z)[kBatch]) {
  if (job.softcap != 0) {
#pragma unroll 1
    for (int i = 0; i < kBatch; i++) {  // registers cannot be indexed, and sixteen copies are many
      float x = z[0];
#pragma unroll
      for (int j = 1; j < kBatch; j++) x = i == j ? z[j] : x;
      x = capped(x, double(job.softcap));
#pragma unroll
      for (int j = 0; j < kBatch; j++) z[j] = i == j ? x : z[j];
    }
  }
  if (job.temperature != 1) {
#pragma unroll
    for (int j = 0; j < kBatch; j++) z[j] = quotient(z[j], job.temperature, job.reciprocal);
  }
  if (job.mask_kind == kBoolMask) {
    const uint8_t* keep = static_cast<const uint8_t*>(job.mask);
#pragma unroll
    for (int j = 0; j < kBatch; j++)
      if (at(j) >= 0) z[j] = keep[at(j)] ? z[j] : kMinusInfinity;
  } else if (job.mask_kind != kNoMask) {
#pragma unroll
    for (int j = 0; j < kBatch; j++)
      if (at(j) >= 0) z[j] += float_at(job.mask_kind, job.mask, at(j), job.mask_aligned);
  }
#pragma unroll
  for (int j = 0; j < kBatch; j++)
    if (at(j) < 0) z[j] = kMinusInfinity;
}

}  // namespace pk::cuda
