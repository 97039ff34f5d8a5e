// The second half of what LoRA adds: out = bias + scale low up^T, rounded once.
#pragma once
#include "lora_shrink.h"

namespace pk::cuda {

/// Parts of low that count: two leave out 2^-15 of a term, beside a result that has eight bits.
PK_HD constexpr int low_parts_of(int out_dtype) { return out_dtype == kBF16 ? 2 : 3; }

/// low [tile rows, width] as parts, in the order in which lanes read them: [part][step][tile of rows][lane].
/// `low_at(e)` is its element e.
template <class LowAt>
__device__ __forceinline__ void stage_parts(uint4* staged, int tile_rows, int width, int parts,
                                            LowAt low_at) {
  const int tiles = tile_rows / 16, all = width / kStep * tiles * 32;
  for (int i = int(threadIdx.x); i < all; i += kThreads) {
    const int lane = i % 32, row = i / 32 % tiles * 16 + lane / 4,
              rank = i / 32 / tiles * kStep + lane % 4 * 4;
    Words<kMostParts, 8> words;  // row and row + 8, of four ranks
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const int e = (row + w / 2 * 8) * width + rank + w % 2 * 2;
      put_parts(words, w, low_at(e), low_at(e + 1));
    }
    for (int part = 0; part < kMostParts; part++)
      if (part < parts) {
        const uint32_t* word = words.part[part];
        staged[part * all + i] = {word[0], word[2], word[1], word[3]};
      }
  }
}

/// Eight neighbours of a row of the result, which is read again soon: no streaming past the L2.
template <class O>
__device__ __forceinline__ void store_eight(const LoraRows& job, int64_t row, int64_t col,
                                            const float* value) {
  Raw<O, 8> raw;
#pragma unroll
  for (int e = 0; e < 8; e++) narrow(value[e], raw.x + e);
  char* to = static_cast<char*>(job.out) + (row * job.n + col) * int64_t(sizeof(O));  // at any address
  if (job.out_alignment == kVectors && col + 8 <= job.n) {
#pragma unroll
    for (int i = 0; i < int(sizeof(raw) / 16); i++)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(raw.x)[i];
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (col + e < job.n) memcpy(to + e * int64_t(sizeof(O)), raw.x + e, sizeof(O));
  }
}

__device__ __forceinline__ float bias_at(const LoraRows& job, int64_t col) {
  if (!job.bias || col >= job.n) return 0;
  const char* at = static_cast<const char*>(job.bias) + col * dtype_size(job.out_dtype);
  if (job.out_dtype == kF32) return element<float>(at, kBytes);
  return job.out_dtype == kBF16 ? widen(element<bf16>(at, kBytes)) : widen(element<f16>(at, kBytes));
}

/// sum [32 rows][32 columns] of a warp; `staged` is that of its first tile of rows.
template <class Up>
__device__ __forceinline__ void expand_sum(float (&sum)[2][4][4], const Matrix& up, const uint4* staged,
                                           int tiles, int steps, int parts, int count, int rank, int64_t col,
                                           int64_t end) {
  const int lane = int(threadIdx.x % 32), group = lane / 4;
  for (int step = 0; step < steps; step++) {
    Words<Up::kParts, 4> right[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {  // so that a lane ends up with eight columns side by side
      const int64_t n = col + group / 2 * 8 + j * 2 + group % 2;
      right[j] = {};
      if (n < end) Up::template load<4>(right[j], up, n, step * kStep + lane % 4 * 4, rank);
    }
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      if (tile * 16 >= count) continue;
      uint32_t a[kMostParts][4];
#pragma unroll
      for (int part = 0; part < kMostParts; part++) {
        uint4 words{};
        if (part < parts) words = staged[((part * steps + step) * tiles + tile) * 32 + lane];
        a[part][0] = words.x, a[part][1] = words.y, a[part][2] = words.z, a[part][3] = words.w;
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (col + j * 2 >= end) continue;
        uint32_t b[Up::kParts][2];
#pragma unroll
        for (int part = 0; part < Up::kParts; part++)
          b[part][0] = right[j].part[part][0], b[part][1] = right[j].part[part][1];
        multiply_parts(sum[tile][j], a, b, parts, parts_of(up.dtype));
      }
    }
  }
}

/// 32 columns of a warp's rows, from `col` on. `adapter` null: nothing is added; `staged` as in expand_sum.
template <class Up>
__device__ __forceinline__ void expand_chunk(const LoraRows& job, const Adapter* adapter, const uint4* staged,
                                             const int64_t* rows, int count, int tile_rows, int64_t col,
                                             float fill, const uint8_t* kept) {
  const int lane = int(threadIdx.x % 32);
  float sum[2][4][4] = {};
  float scale = 0;
  if (adapter) {
    scale = adapter->scale;
    expand_sum<Up>(sum, adapter->up, staged, tile_rows / 16, padded(adapter->rank) / kStep,
                   low_parts_of(job.out_dtype), count, adapter->rank, col, job.n);
  }
  const int64_t mine = col + lane % 4 * 8;
  if (mine >= job.n) return;
  float bias[8];
#pragma unroll
  for (int i = 0; i < 8; i++) bias[i] = fill + bias_at(job, mine + i);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = i * 8 + lane / 4;
    if (r >= count) continue;
    unsigned eight = ~0u;
    if (job.drop.side == kWritten) {
      const int64_t from = col / kDrawn * kDrawn;
      eight = eight_kept(kept + r * drawn_bytes(kDrawn), rows[r], from, int(mine - from), job.drop);
    }
    alignas(16) float value[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const float added = scale * sum[i / 2][e / 2][i % 2 * 2 + e % 2];
      value[e] = bias[e] + (eight >> e & 1 ? added : 0.0f);
    }
    if (job.out_dtype == kF32)
      store_eight<float>(job, rows[r], mine, value);
    else if (job.out_dtype == kBF16)
      store_eight<bf16>(job, rows[r], mine, value);
    else
      store_eight<f16>(job, rows[r], mine, value);
  }
}

/// Columns begin .. end of a tile's rows, dealt to the warps; `kept`: room for all warps' draws.
template <class Up>
__device__ __forceinline__ void expand(const LoraRows& job, const Adapter* adapter, const uint4* staged,
                                       const int64_t* rows, int count, int tile_rows, int64_t begin,
                                       int64_t end, float fill, uint8_t* kept) {
  const int warp = int(threadIdx.x / 32), groups = (count + kWarpRows - 1) / kWarpRows;
  const bool drops = job.drop.side == kWritten && adapter;
  const int unit = drops ? kDrawn : 32;
  const int64_t units = (end - begin + unit - 1) / unit;
  kept += warp * kWarpRows * drawn_bytes(kDrawn);
  for (int64_t item = warp; item < units * groups; item += kWarps) {
    const int row0 = int(item % groups) * kWarpRows,
              mine = count - row0 < kWarpRows ? count - row0 : kWarpRows;
    const int64_t col = begin + item / groups * unit;
    if (drops) draw_by_warp(kept, rows + row0, mine, col, job.drop);
    for (int64_t c = col; c < col + unit && c < end; c += 32)
      expand_chunk<Up>(job, adapter, staged + row0 / 16 * 32, rows + row0, mine, tile_rows, c, fill, kept);
  }
}

}  // namespace pk::cuda
