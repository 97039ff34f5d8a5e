// Tensor cores: the product of a warp.
//
// A warp's product is sum [16][8] += left [16][16] @ right [16][8], products exact, sums in float32. Lane l
// holds, with g = l / 4 and p = l % 4, two neighbours to a word and that of the lower index in the low half:
//   left:  word 0 is row g, ranks 2p and 2p + 1; word 1 is row g + 8; words 2 and 3 are the same 8 ranks on;
//   right: word 0 is ranks 2p and 2p + 1 of column g; word 1 is the same 8 ranks on;
//   sum:   0 and 1 are row g, columns 2p and 2p + 1; 2 and 3 are row g + 8.
// Tensor cores align what they add to the largest and cut off what is below (Fasi et al., 2021, "Numerical
// behavior of NVIDIA tensor cores", section 4), so a product is off by at most kCut of the largest of what it
// adds: two steps of 8 products and a sum, each of nine numbers that lose half a unit of 2^-23 and a result
// that loses one; newer ones, which add 16 at once and keep more bits, lose less.
//
// Infinity times a remainder that is 0 would be a NaN, so beside remainders stands a first part with its
// infinities and NaN made finite (`calm`): what is not finite meets the other number's first part alone,
// which has the sign and, above 2^-133, the zeroness of the whole, and comes out as in float32 arithmetic.
#pragma once
#include <type_traits>

#include "device.h"
#include "parts.h"
#ifdef PK_EMULATED
#include "../emulated/mma.h"
#endif

namespace pk::cuda {

constexpr float kCut = 11 * 0x1p-23f;

#ifndef PK_EMULATED

// Volatile, as all lanes of a warp must take part: none may be moved behind a branch that only some take.
__device__ __forceinline__ void multiply_bf16(float (&sum)[4], const uint32_t (&left)[4],
                                              const uint32_t (&right)[2], const float (&start)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]), "f"(start[0]),
        "f"(start[1]), "f"(start[2]), "f"(start[3]));
}
__device__ __forceinline__ void multiply_f16(float (&sum)[4], const uint32_t (&left)[4],
                                             const uint32_t (&right)[2], const float (&start)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]), "f"(start[0]),
        "f"(start[1]), "f"(start[2]), "f"(start[3]));
}

/// Two bf16 of a word, each at most the largest that is finite; a NaN becomes that.
__device__ __forceinline__ uint32_t calm(uint32_t word) {
  asm("min.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(0x7F7F7F7Fu));
  asm("max.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(0xFF7FFF7Fu));
  return word;
}

/// Four matrices of 8 x 8 from shared memory: lane l gives the address, aligned to 16 bytes, of row l % 8 of
/// matrix l / 8; word m of lane l becomes row l / 4 of matrix m, columns 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}
/// The same turned: word m of lane l becomes rows 2 (l % 4) and the next of column l / 4.
__device__ __forceinline__ void load_turned(uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
}

#else

inline void multiply_bf16(float (&sum)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                          const float (&start)[4]) {
  for (int i = 0; i < 4; i++) sum[i] = start[i];
  emulated::multiply<bf16>(sum, left, right);
}
inline void multiply_f16(float (&sum)[4], const uint32_t (&left)[4], const uint32_t (&right)[2],
                         const float (&start)[4]) {
  for (int i = 0; i < 4; i++) sum[i] = start[i];
  emulated::multiply<f16>(sum, left, right);
}
inline uint32_t calm(uint32_t word) { return emulated::calm(word); }
inline void load_matrices(uint32_t (&word)[4], const void* row) { emulated::load_matrices(word, row, false); }
inline void load_turned(uint32_t (&word)[4], const void* row) { emulated::load_matrices(word, row, true); }

#endif

template <int n>
__device__ __forceinline__ void calm(uint32_t (&word)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) word[i] = calm(word[i]);
}

/// sum = start + left @ right; without a start, sum += left @ right.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&left)[4],
                                         const uint32_t (&right)[2], const float (&start)[4]) {
  if constexpr (std::is_same_v<T, bf16>)
    multiply_bf16(sum, left, right, start);
  else
    multiply_f16(sum, left, right, start);
}
__device__ __forceinline__ void multiply_bf16(float (&sum)[4], const uint32_t (&left)[4],
                                              const uint32_t (&right)[2]) {
  multiply_bf16(sum, left, right, sum);
}
__device__ __forceinline__ void multiply_f16(float (&sum)[4], const uint32_t (&left)[4],
                                             const uint32_t (&right)[2]) {
  multiply_f16(sum, left, right, sum);
}

/// Which parts of two numbers are multiplied, the smallest products first: body(i, j) for part i of the left
/// one and j of the right one where i + j <= 2.
template <class Body>
__device__ __forceinline__ void each_pair(int left_parts, int right_parts, Body&& body) {
#pragma unroll 1
  for (int sum = kMostParts - 1; sum >= 0; sum--)
#pragma unroll 1
    for (int i = 0; i <= sum; i++)
      if (i < left_parts && sum - i < right_parts) body(i, sum - i);
}

}  // namespace pk::cuda
