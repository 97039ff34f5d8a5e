// How the threads of a block share a tile, and how elements come from and go to memory at any alignment.
#pragma once
#include "jobs.h"
#include "lanes.h"

namespace pk::cuda {

/// A weight of +0 says that a model takes no part; -0 is a weight that became 0, so that its NaN counts.
__device__ __forceinline__ bool takes_part(const Model& model) { return float_bits(model.weight) != 0; }

/// Every thread takes 16 bytes side by side.
template <class T>
struct Contiguous {
  static constexpr int kWidth = 16 / int(sizeof(T));
  static constexpr int kPiece = kWidth;  // elements side by side
  __device__ static int first(int slot) { return slot * kWidth; }
  __device__ static int at(int first, int k) { return first + k; }
  __device__ static bool whole(int first, int count) { return first + kWidth <= count; }
};

/// Every thread takes the eight elements of one lane of Philox: two neighbours in each of four groups of 32.
template <class T>
struct Paired {
  static constexpr int kWidth = 8;
  static constexpr int kPiece = 2;
  __device__ static int first(int slot) { return slot / 16 * 128 + slot % 16 * 2; }
  __device__ static int at(int first, int k) { return first + k / 2 * 32 + k % 2; }
  __device__ static bool whole(int first, int count) { return (first | 127) < count; }
};

template <int bytes>
struct Chunk;
template <>
struct Chunk<4> {
  using Type = unsigned;
};
template <>
struct Chunk<8> {
  using Type = uint2;
};
template <>
struct Chunk<16> {
  using Type = uint4;
};

/// What a thread holds of one tensor, as it lies in memory.
template <class T, int width>
struct __align__(16) Raw {
  T x[width];
};

/// Elements `first`.. of a tile that has `count`; 0 beyond. `data` is the address of the tile.
template <class T, class Layout>
__device__ __forceinline__ Raw<T, Layout::kWidth> load(const char* data, int first, int count,
                                                       int alignment) {
  Raw<T, Layout::kWidth> raw;
  if (alignment == kVectors && Layout::whole(first, count)) {
    using Piece = typename Chunk<Layout::kPiece* int(sizeof(T))>::Type;
#pragma unroll
    for (int k = 0; k < Layout::kWidth; k += Layout::kPiece)
      *reinterpret_cast<Piece*>(raw.x + k) =
          __ldcs(reinterpret_cast<const Piece*>(data + Layout::at(first, k) * int(sizeof(T))));
  } else {
#pragma unroll
    for (int k = 0; k < Layout::kWidth; k++) {
      const int i = Layout::at(first, k);
      T x{};
      if (i < count && alignment == kBytes)
        memcpy(&x, data + i * int(sizeof(T)), sizeof(T));
      else if (i < count)
        x = *reinterpret_cast<const T*>(data + i * int(sizeof(T)));
      raw.x[k] = x;
    }
  }
  return raw;
}

#ifdef __CUDA_ARCH__
// Halves by the hardware, whose conversions are exact or round once to nearest even.
__device__ __forceinline__ float widen(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
__device__ __forceinline__ void narrow(float x, f16* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
  if (is_nan(x)) out->bits = 0x7E00u;
}
#else
inline float widen(f16 x) { return to_float(x); }
inline void narrow(float x, f16* out) { round_to(x, out); }
#endif
__device__ __forceinline__ float widen(bf16 x) { return to_float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ void narrow(float x, bf16* out) { round_to(x, out); }
__device__ __forceinline__ void narrow(float x, float* out) { *out = is_nan(x) ? bits_float(kNaN) : x; }

template <class O, class Layout>
__device__ __forceinline__ void store_as(char* out, const float* x, int first, int count, int alignment) {
  Raw<O, Layout::kWidth> raw;
#pragma unroll
  for (int k = 0; k < Layout::kWidth; k++) narrow(x[k], raw.x + k);
  if (alignment == kVectors && Layout::whole(first, count)) {
    constexpr int kBytesOfPiece = Layout::kPiece * int(sizeof(O));
    using Piece = typename Chunk<(kBytesOfPiece > 16 ? 16 : kBytesOfPiece)>::Type;
    constexpr int kStep = int(sizeof(Piece) / sizeof(O));
#pragma unroll
    for (int k = 0; k < Layout::kWidth; k += kStep)
      __stcs(reinterpret_cast<Piece*>(out + Layout::at(first, k) * int(sizeof(O))),
             *reinterpret_cast<const Piece*>(raw.x + k));
  } else {
#pragma unroll
    for (int k = 0; k < Layout::kWidth; k++) {
      const int i = Layout::at(first, k);
      if (i < count && alignment == kBytes)
        memcpy(out + i * int(sizeof(O)), raw.x + k, sizeof(O));
      else if (i < count)
        *reinterpret_cast<O*>(out + i * int(sizeof(O))) = raw.x[k];
    }
  }
}

/// Rounds once and writes elements `first`.. of a tile whose output begins at `out`.
template <class Layout>
__device__ __forceinline__ void store(char* out, const float* x, int first, int count, const Head& head) {
  if (head.out_dtype == kF32)
    store_as<float, Layout>(out, x, first, count, head.out_alignment);
  else if (head.out_dtype == kBF16)
    store_as<bf16, Layout>(out, x, first, count, head.out_alignment);
  else
    store_as<f16, Layout>(out, x, first, count, head.out_alignment);
}

}  // namespace pk::cuda
