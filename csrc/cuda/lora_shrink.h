// The first half of what LoRA adds: low = x down^T over a block's columns, float32, summed over its warps.
#pragma once
#include "lora_draws.h"
#include "lora_operands.h"
#include "lora_tiles.h"

namespace pk::cuda {

constexpr int kWarps = kThreads / 32;
constexpr int kWarpRows = 32, kWarpRanks = 32;  // of a warp's sums

PK_HD constexpr int padded(int rank) { return (rank + kStep - 1) / kStep * kStep; }

/// How the warps of a block share its rows, ranks and columns.
struct WarpGrid {
  int rows, ranks, columns;
  PK_HD WarpGrid(int tile_rows, int rank) : rows(tile_rows > kWarpRows ? 2 : 1), ranks(1) {
    while (rows * ranks < kWarps && ranks * kWarpRanks < rank) ranks *= 2;
    columns = kWarps / (rows * ranks);
  }
};

/// Sums of all warps along the columns, at most, for adapters of up to `rank`: one of 32 ranks keeps as many
/// warps there as it has room for, where one of 33 keeps half of them.
PK_HD int planes_of(int tile_rows, int rank) {
  const WarpGrid grid(tile_rows, rank);
  const int own = grid.columns * padded(rank), full = kWarps / grid.rows * kWarpRanks;
  return tile_rows * (rank > kWarpRanks && own < full ? full : own);
}

/// The draws of the rows of a warp, which must have read those before; `rows` are 32 at the most.
__device__ __forceinline__ void draw_by_warp(uint8_t* kept, const int64_t* rows, int count, int64_t col,
                                             const Dropout& drop) {
  __syncwarp();
  draw(kept, rows, count, col, kDrawn, drop, int(threadIdx.x % 32), 32);
  __syncwarp();
}

/// 32 columns of x and of down: one product after another, two to a vector of 8.
template <class Kind>
__device__ __forceinline__ void shrink_step(float (&sum)[2][4][4], const Matrix& x, const Matrix& down,
                                            const int64_t* rows, int count, int rank0, int rank, int64_t col,
                                            int64_t end, const Dropout& drop, const uint8_t* kept) {
  const int lane = int(threadIdx.x % 32), group = lane / 4, at = lane % 4 * 8;
  Words<Kind::kParts, 8> left[2][2], right[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = i * 8 + group;
    left[i / 2][i % 2] = {};
    if (r >= count) continue;
    const int64_t from = col / kDrawn * kDrawn;
    const unsigned eight = drop.side != kRead ? ~0u
                                              : eight_kept(kept + r * drawn_bytes(kDrawn), rows[r], from,
                                                           int(col - from) + at, drop);
    Kind::template load<8>(left[i / 2][i % 2], x, rows[r], col + at, end, eight);
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    right[j] = {};
    if (rank0 + j * 8 + group < rank)
      Kind::template load<8>(right[j], down, rank0 + j * 8 + group, col + at, end);
  }
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      if (tile * 16 >= count) continue;
      uint32_t a[Kind::kParts][4];
#pragma unroll
      for (int part = 0; part < Kind::kParts; part++)
#pragma unroll
        for (int w = 0; w < 4; w++) a[part][w] = left[tile][w % 2].part[part][2 * half + w / 2];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (rank0 + j * 8 >= rank) continue;
        uint32_t b[Kind::kParts][2];
#pragma unroll
        for (int part = 0; part < Kind::kParts; part++)
#pragma unroll
          for (int w = 0; w < 2; w++) b[part][w] = right[j].part[part][2 * half + w];
        multiply<Kind>(sum[tile][j], a, b, parts_of(x.dtype), parts_of(down.dtype));
      }
    }
}

/// low [tile rows, padded rank] of the columns begin .. end of x, to the front of `planes`, which has room
/// for one such sum for every warp along the columns; all threads must call. `kept`: room for all warps'
/// draws.
template <class Kind>
__device__ __forceinline__ void shrink(const LoraRows& job, const Adapter& adapter, const int64_t* rows,
                                       int count, int tile_rows, int64_t begin, int64_t end, float* planes,
                                       uint8_t* kept) {
  const WarpGrid grid(tile_rows, adapter.rank);
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  const int row0 = warp % grid.rows * kWarpRows, along = warp / (grid.rows * grid.ranks);
  const int width = padded(adapter.rank), mine = count - row0 < kWarpRows ? count - row0 : kWarpRows;
  const int unit = job.drop.side == kRead ? kDrawn : 32;
  kept += warp * kWarpRows * drawn_bytes(kDrawn);
  for (int rank0 = warp / grid.rows % grid.ranks * kWarpRanks; rank0 < width;
       rank0 += grid.ranks * kWarpRanks) {
    float sum[2][4][4] = {};
    for (int64_t col = begin + along * unit; col < end && mine > 0; col += grid.columns * unit) {
      if (job.drop.side == kRead) draw_by_warp(kept, rows + row0, mine, col, job.drop);
      for (int64_t c = col; c < col + unit && c < end; c += 32)
        shrink_step<Kind>(sum, job.x, adapter.down, rows + row0, mine, rank0, adapter.rank, c, end, job.drop,
                          kept);
    }
    float* to = planes + (along * tile_rows + row0 + lane / 4) * width + rank0 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {  // tile of rows, tile of ranks
      if (rank0 + i % 4 * 8 >= width || row0 + i / 4 * 16 >= tile_rows) continue;
#pragma unroll
      for (int e = 0; e < 4; e++)
        to[(i / 4 * 16 + e / 2 * 8) * width + i % 4 * 8 + e % 2] = sum[i / 4][i % 4][e];
    }
  }
  __syncthreads();
  const int all = tile_rows * width;
  for (int e = int(threadIdx.x); e < all; e += kThreads) {
    float total = planes[e];
    for (int plane = 1; plane < grid.columns; plane++) total += planes[plane * all + e];
    planes[e] = total;
  }
  __syncthreads();
}

}  // namespace pk::cuda
