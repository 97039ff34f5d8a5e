// The lane type of the instruction set that this file is compiled for, in a namespace of its own.
//
// Every kernel source is compiled once per instruction set with PK_ISA set to avx512, avx2 or baseline.
// Nothing here may have external linkage under a name that two instruction sets share: the linker would keep
// one of the copies.
#pragma once
#if defined(PK_AVX512) || defined(PK_AVX2)
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>

#include "../math/dtype.h"
#include "../math/elect.h"
#include "../math/philox.h"
#include "jobs.h"

#define PK_IN static inline __attribute__((always_inline))
#define PK_MEMBER inline __attribute__((always_inline))

namespace pk::cpu::PK_ISA {

#if defined(PK_AVX512)
#include "lanes_avx512.h"
#elif defined(PK_AVX2)
#include "lanes_avx2.h"
#else
#include "lanes_baseline.h"
#endif

constexpr int kGroup =
    2 * kLanes;  // elements of a Pair: lanes a are the even elements of bfloat16, else the first half

template <class T>
constexpr bool kParted = false;
template <>
constexpr bool kParted<bf16> = true;

PK_IN Pair zero_pair() { return {F::of(0), F::of(0)}; }
template <class T>
PK_IN Pair load_or_zero(const void* data, int64_t i) {
  return data ? load(static_cast<const T*>(data) + i) : zero_pair();
}
template <class T>
PK_IN float element(const void* data, int64_t i) {
  if (!data) return 0;
  T x;
  memcpy(&x, static_cast<const T*>(data) + i, sizeof(T));
  return to_float(x);
}

/// Masks of a pair as bits in element order.
template <class T>
PK_IN uint32_t element_bits(M a, M b) {
  if (!kParted<T>) return bits(a) | bits(b) << kLanes;
#if defined(PK_AVX512) || defined(PK_AVX2)
  return _pdep_u32(bits(a), 0x55555555u) | _pdep_u32(bits(b), 0xAAAAAAAAu);
#else
  uint32_t x = 0;
  for (int i = 0; i < kLanes; i++)
    x |= ((bits(a) >> i) & 1u) << (2 * i) | ((bits(b) >> i) & 1u) << (2 * i + 1);
  return x;
#endif
}

/// Round a pair as T's load orders it and write it as elements i.. of an output of any dtype; no NaN but the
/// canonical one.
template <class T>
PK_IN void put_numbers(int out_dtype, void* out, int64_t i, Pair x, bool stream) {
  if (out_dtype == kBF16) {
    put(static_cast<bf16*>(out) + i, kParted<T> ? x : part(x), stream);
    return;
  }
  if (kParted<T>) x = interleave(x);
  if (out_dtype == kF32)
    put(static_cast<float*>(out) + i, x, stream);
  else
    put(static_cast<f16*>(out) + i, x, stream);
}

/// The same of any pair.
template <class T>
PK_IN void put_as(int out_dtype, void* out, int64_t i, Pair x, bool stream) {
  put_numbers<T>(out_dtype, out, i, {canonical(x.a), canonical(x.b)}, stream);
}

}  // namespace pk::cpu::PK_ISA
