// Matrices of any dtype and strides as the operands of tensor cores.
//
// A sum over k does not care about the order of k, so a lane takes neighbours in memory: 8 of a row fill its
// words of two products, where lanes p = 0..3 of a row hold 8p .. 8p + 7 of 32. No shared memory is needed.
#pragma once
#include "lora.h"
#include "mma.h"
#include "tile.h"

namespace pk::cuda {

template <class T>
__device__ __forceinline__ T element(const char* at, int alignment) {
  T x;
  if (alignment == kBytes)
    memcpy(&x, at, sizeof(T));
  else
    x = *reinterpret_cast<const T*>(at);
  return x;
}

/// Elements col .. of a row, up to `end`, 0 beyond and where not `kept`. `col` is a multiple of n.
template <class T, int n>
__device__ __forceinline__ Raw<T, n> load_row(const Matrix& m, int64_t row, int64_t col, int64_t end,
                                              unsigned kept) {
  Raw<T, n> raw;
  const char* at = m.data + (row * m.row + col * m.col) * int64_t(sizeof(T));
  if (m.alignment == kVectors && col + n <= end) {
    constexpr int bytes = n * int(sizeof(T)) < 16 ? n * int(sizeof(T)) : 16;
    using Piece = typename Chunk<bytes>::Type;
#pragma unroll
    for (int i = 0; i < n * int(sizeof(T)) / bytes; i++)
      reinterpret_cast<Piece*>(raw.x)[i] = reinterpret_cast<const Piece*>(at)[i];
  } else {
#pragma unroll
    for (int i = 0; i < n; i++) {
      raw.x[i] = T{};
      if (col + i < end) raw.x[i] = element<T>(at + i * m.col * int64_t(sizeof(T)), m.alignment);
    }
  }
  if (kept != ~0u)
#pragma unroll
    for (int i = 0; i < n; i++)
      if (!(kept >> i & 1)) raw.x[i] = T{};
  return raw;
}

/// n numbers, in parts, two to a word.
template <int parts, int n>
struct Words {
  uint32_t part[parts][n / 2];
};

/// bf16 or f16 beside the same: one product of tensor cores.
template <class T>
struct Native {
  static constexpr int kParts = 1;
  static constexpr int kBlocks = 2;
  template <int n>
  __device__ static __forceinline__ void load(Words<1, n>& words, const Matrix& m, int64_t row, int64_t col,
                                              int64_t end, unsigned kept = ~0u) {
    const Raw<T, n> raw = load_row<T, n>(m, row, col, end, kept);
    memcpy(words.part[0], raw.x, sizeof(words.part[0]));
  }
};

/// x as parts, word `at` of each.
template <int n>
__device__ __forceinline__ void put_parts(Words<kMostParts, n>& words, int at, float x, float y) {
  bf16 low[kMostParts], high[kMostParts];
  split(x, low);
  split(y, high);
#pragma unroll
  for (int i = 0; i < kMostParts; i++) words.part[i][at] = low[i].bits | uint32_t(high[i].bits) << 16;
}

/// Any dtypes: each number as up to three bf16, and the products of their parts.
struct Split {
  static constexpr int kParts = kMostParts;
  static constexpr int kBlocks = 1;
  template <int n>
  __device__ static __forceinline__ void load(Words<kMostParts, n>& words, const Matrix& m, int64_t row,
                                              int64_t col, int64_t end, unsigned kept = ~0u) {
    if (m.dtype == kF32) {
      const Raw<float, n> raw = load_row<float, n>(m, row, col, end, kept);
#pragma unroll
      for (int i = 0; i < n; i += 2) put_parts(words, i / 2, raw.x[i], raw.x[i + 1]);
    } else {
      const Raw<bf16, n> raw = load_row<bf16, n>(m, row, col, end, kept);
#pragma unroll
      for (int i = 0; i < n; i += 2)
        put_parts(words, i / 2, widen_as(m.dtype, raw.x[i].bits), widen_as(m.dtype, raw.x[i + 1].bits));
    }
  }

 private:
  __device__ static __forceinline__ float widen_as(int dtype, uint16_t bits) {
    return dtype == kBF16 ? widen(bf16{bits}) : widen(f16{bits});
  }
};

/// sum += left right over the pairs of parts that count, the smallest first.
template <int lefts, int rights>
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const uint32_t (&left)[lefts][4],
                                               const uint32_t (&right)[rights][2], int left_parts,
                                               int right_parts) {
  uint32_t calm_left[1][4], calm_right[1][2];  // of first parts, beside remainders
#pragma unroll
  for (int w = 0; w < 4; w++) calm_left[0][w] = rights > 1 ? calm(left[0][w]) : 0;
#pragma unroll
  for (int w = 0; w < 2; w++) calm_right[0][w] = lefts > 1 ? calm(right[0][w]) : 0;
#pragma unroll
  for (int both = kMostParts - 1; both >= 0; both--)
#pragma unroll
    for (int i = 0; i <= both; i++)
      if (i < lefts && both - i < rights)
        if (i < left_parts && both - i < right_parts) {
          const auto* a = i == 0 && both > 0 ? calm_left : left + i;
          const auto* b = i == both && both > 0 ? calm_right : right + (both - i);
          multiply_bf16(sum, *a, *b);
        }
}

template <class Kind>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32_t (&left)[Kind::kParts][4],
                                         const uint32_t (&right)[Kind::kParts][2], int left_parts,
                                         int right_parts) {
  if constexpr (std::is_same_v<Kind, Native<f16>>)
    multiply_f16(sum, left[0], right[0]);
  else if constexpr (std::is_same_v<Kind, Native<bf16>>)
    multiply_bf16(sum, left[0], right[0]);
  else
    multiply_parts(sum, left, right, left_parts, right_parts);
}

}  // namespace pk::cuda
