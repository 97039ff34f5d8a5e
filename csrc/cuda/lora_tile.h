// The product of all adapters on a tile of 64 x 128, which merges and norms of adapted weights share.
//
// A warp takes 32 x 32: lane l has rows l / 4 and every eighth behind, and the eight columns from 8 (l % 4)
// on, so that weights come and go as 16 bytes. To that end columns lie in shared memory in the order in which
// tensor cores want them: column 2j + i of eight number p is number 2p + i of product j.
#pragma once
#include "cluster.h"
#include "merge_lora.h"
#include "mma.h"
#include "stage.h"
#include "tile.h"

namespace pk::cuda {

constexpr int kDown = 2, kAcross = 4;  // products of a warp: 16 rows and 8 columns each
// Errands of a thread at a time, when shared memory is filled: as many as no register is spilled for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kErrands = 1;
#else
constexpr int kErrands = 2;
#endif

/// Eight elements of a row.
template <class T>
struct Eight {
  static constexpr int kWidth = 8;
  static constexpr int kPiece = 16 / int(sizeof(T));
  __device__ static int at(int first, int k) { return first + k; }
  __device__ static bool whole(int first, int count) { return first + kWidth <= count; }
};

/// Where a lane's elements are: rows `down` + 8 h of a tile, h < 4, and eight columns from `across` on.
struct Spot {
  int tile, strip;
  int down, across;
  int height, width;  // of the tile, as far as there are rows and columns
  __device__ Spot(const Layer& layer, int tile_, int strip_) : tile(tile_), strip(strip_) {
    const int thread = thread_asked(), lane = thread % 32, warp = thread / 32;
    down = warp / 4 * 32 + lane / 4;
    across = warp % 4 * 32 + lane % 4 * 8;
    const int64_t below = layer.rows - int64_t(tile) * kLoraRows,
                  right = layer.cols - int64_t(strip) * kLoraColumns;
    height = below < kLoraRows ? int(below) : kLoraRows;
    width = right < kLoraColumns ? int(right) : kLoraColumns;
  }
  __device__ int64_t row() const { return int64_t(tile) * kLoraRows + down; }
  __device__ int64_t column() const { return int64_t(strip) * kLoraColumns + across; }
  /// The element of the lane's first row that begins the strip.
  __device__ int64_t start(const Layer& layer) const {
    return row() * layer.cols + int64_t(strip) * kLoraColumns;
  }
};

/// Sums of a lane, as products have them.
using Sums = float[kDown][kAcross][4];

/// Of row `down` + 8 h and column `across` + k.
template <class S>
__device__ __forceinline__ auto& at(S& sums, int h, int k) {
  return sums[h / 2][k / 2][h % 2 * 2 + k % 2];
}

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
  for (int h = 0; h < 4; h++)
#pragma unroll
    for (int k = 0; k < 8; k++) at(sums, h, k) = 0;
}

/// Eight ranks of one row or column as they lie in memory, 0 behind `count`.
__device__ inline void read_octet(const char* data, int64_t step, int size, int count,
                                  uint32_t (&raw)[kOctet]) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (step == size && count == kOctet && address % 16 == 0) {
    const uint4* from = reinterpret_cast<const uint4*>(data);
    const uint4 a = from[0], b = size == 4 ? from[1] : uint4{};
    const uint32_t word[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int k = 0; k < kOctet; k++) raw[k] = size == 4 ? word[k] : word[k / 2] >> (16 * (k % 2)) & 0xFFFFu;
    return;
  }
  const bool aligned = address % unsigned(size) == 0;
#pragma unroll
  for (int k = 0; k < kOctet; k++) {
    raw[k] = 0;
    if (k >= count) continue;
    const char* at = data + k * step;
    uint16_t half;
    if (size == 4 && aligned)
      raw[k] = *reinterpret_cast<const uint32_t*>(at);
    else if (size == 4)
      memcpy(raw + k, at, 4);
    else if (aligned)
      raw[k] = *reinterpret_cast<const uint16_t*>(at);
    else
      memcpy(&half, at, 2), raw[k] = half;
  }
}

__device__ inline float value_of(uint32_t raw, int dtype) {
  return dtype == kF32 ? bits_float(raw) : widen(f16{uint16_t(raw)});
}

/// Parts of eight numbers to where they lie, `apart` bytes between parts.
__device__ inline void write_parts(char* to, const uint32_t (&raw)[kOctet], int dtype, int parts, int apart) {
  if (parts == 1) {
    *reinterpret_cast<uint4*>(to) = {raw[0] | raw[1] << 16, raw[2] | raw[3] << 16, raw[4] | raw[5] << 16,
                                     raw[6] | raw[7] << 16};
    return;
  }
  uint32_t word[kMostParts][kOctet / 2] = {};
#pragma unroll
  for (int k = 0; k < kOctet; k++) {
    bf16 part[kMostParts];
    split(value_of(raw[k], dtype), part);
#pragma unroll
    for (int p = 0; p < kMostParts; p++) word[p][k / 2] |= uint32_t(part[p].bits) << (16 * (k % 2));
  }
#pragma unroll
  for (int p = 0; p < kMostParts; p++)
    if (p < parts)
      *reinterpret_cast<uint4*>(to + p * apart) = {word[p][0], word[p][1], word[p][2], word[p][3]};
}

/// A column's place among the 32 of a warp.
__device__ inline int place_of(int column) {
  return (column & ~31) + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

/// Where eight ranks of a row or column come from, and where they go.
struct Errand {
  const char* from;
  char* to;
  int64_t step;  // bytes to the next rank
  int ranks, dtype, parts;
};

/// Number `i` of the errands for one side of groups: `items` rows (or columns) from `first` on, 0 behind.
template <int kItems, bool kRight>
__device__ __forceinline__ Errand errand(char* room, const Group* groups, int i, int64_t first,
                                         int64_t items) {
  const Group& g = groups[i / (2 * kItems)];
  const int within = i % (2 * kItems), dtype = kRight ? g.right_dtype : g.left_dtype;
  const int64_t step = kRight ? g.right_step : g.left_step, rank = kRight ? g.right_rank : g.left_rank;
  const int size = dtype_size(dtype);
  const int item = rank == 1 ? within / 2 : within % kItems;  // what lies side by side is read together
  const int half = rank == 1 ? within % 2 : within / kItems;
  const int ranks = first + item < items ? g.ranks - half * kOctet : 0;
  const char* data = static_cast<const char*>(kRight ? g.right : g.left);
  const int place = kRight ? place_of(item) : item;
  return {data + ((first + item) * step + half * kOctet * rank) * size,
          room + g.slot * (kItems * kStep * 2) + (half * kItems + place) * 16,
          rank * size,
          ranks < kOctet ? ranks : kOctet,
          dtype,
          kRight ? g.right_parts : g.left_parts};
}

/// One side of `count` groups into shared memory. Several errands of a thread are under way at a time: all
/// are asked for before the first is written.
template <int kItems, bool kRight>
__device__ inline void fill(char* room, const Group* groups, int count, int64_t first, int64_t items) {
  const int all = count * 2 * kItems;
#pragma unroll 1
  for (int begin = thread_asked(); begin < all; begin += kErrands * kLoraThreads) {
    uint32_t raw[kErrands][kOctet];
#pragma unroll
    for (int e = 0; e < kErrands; e++) {
      const int i = begin + e * kLoraThreads;
      if (i >= all) continue;
      const Errand x = errand<kItems, kRight>(room, groups, i, first, items);
      read_octet(x.from, x.step, dtype_size(x.dtype), x.ranks, raw[e]);
    }
#pragma unroll
    for (int e = 0; e < kErrands; e++) {
      const int i = begin + e * kLoraThreads;
      if (i >= all) continue;
      const Errand x = errand<kItems, kRight>(room, groups, i, first, items);
      write_parts(x.to, raw[e], x.dtype, x.parts, kItems * kStep * 2);
    }
  }
}

/// sums = start + left @ right of 16 ranks, for one part of each: fragments from shared memory, eight
/// products. `calm_left`, `calm_right`: the other one is a remainder.
template <class T>
__device__ __forceinline__ void multiply_parts(const char* left, const char* right, const Sums& start,
                                               Sums& sums, bool calm_left = false, bool calm_right = false) {
  const int thread = thread_asked(), warp = thread / 32, row = thread % 8, matrix = thread % 32 / 8;
  uint32_t a[kDown][4];
#pragma unroll
  for (int m = 0; m < kDown; m++)
    load_matrices(a[m], left + (matrix / 2 * kLoraRows + warp / 4 * 32 + m * 16 + matrix % 2 * 8 + row) * 16);
  if (calm_left) calm(a[0]), calm(a[1]);
#pragma unroll
  for (int j = 0; j < kAcross; j += 2) {
    uint32_t b[4];
    load_matrices(b, right + (matrix % 2 * kLoraColumns + warp % 4 * 32 + (j + matrix / 2) * 8 + row) * 16);
    if (calm_right) calm(b);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint32_t column[2] = {b[k / 2 * 2], b[k / 2 * 2 + 1]};
      multiply<T>(sums[k % 2][j + k / 2], a[k % 2], column, start[k % 2][j + k / 2]);
    }
  }
}

/// total = scale * x + total for all of a lane's numbers x(h, k), by a scale per row or column that is read
/// where the lane's elements are.
template <class X>
__device__ __forceinline__ void add_scaled(const float* scale, bool by_column, const Spot& spot, X&& x,
                                           Sums& total) {
  if (by_column) {
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const float s = spot.across + k < spot.width ? scale[spot.column() + k] : 0;
#pragma unroll
      for (int h = 0; h < 4; h++) at(total, h, k) = fmaf(s, x(h, k), at(total, h, k));
    }
    return;
  }
#pragma unroll
  for (int h = 0; h < 4; h++) {
    const float s = spot.down + 8 * h < spot.height ? scale[spot.row() + 8 * h] : 0;
#pragma unroll
    for (int k = 0; k < 8; k++) at(total, h, k) = fmaf(s, x(h, k), at(total, h, k));
  }
}

/// The groups in shared memory, one after another: pairs of parts, the smallest first, from 0; then scaled.
__device__ inline void multiply_groups(const Layer& layer, const Group* groups, int count, const char* left,
                                       const char* right, int tile, int strip, Sums& total) {
#pragma unroll 1
  for (int n = 0; n < count; n++) {
    const Group& g = groups[n];
    const char *of_left = left + g.slot * kLeftSlot, *of_right = right + g.slot * kRightSlot;
    Sums sums;
    if (g.halves) {
      multiply_parts<f16>(of_left, of_right, {}, sums);
    } else if (g.left_parts * g.right_parts == 1) {
      multiply_parts<bf16>(of_left, of_right, {}, sums);
    } else {
      clear(sums);
      each_pair(g.left_parts, g.right_parts, [&](int i, int j) {
        multiply_parts<bf16>(of_left + i * kLeftSlot, of_right + j * kRightSlot, sums, sums, j > 0, i > 0);
      });
    }
    if (g.scale_at) {
      const Spot spot(layer, tile, strip);
      add_scaled(g.scale_at, layer.by_column, spot, [&](int h, int k) { return at(sums, h, k); }, total);
      continue;
    }
#pragma unroll
    for (int h = 0; h < 4; h++)
#pragma unroll
      for (int k = 0; k < 8; k++) at(total, h, k) = fmaf(g.scale, at(sums, h, k), at(total, h, k));
  }
}

/// What a block does: tiles `first` .. `end` of a strip of a layer. In shared memory, as registers are
/// scarce.
struct Walk {
  Layer layer;
  const Group* groups;
  int strip, first, end;
};

/// The layer that owns a block; all threads must call.
__device__ inline void stage_walk(const Layers& table, int64_t block, Walk& walk) {
  const Layer* from = &table.one;
  if (table.layers) {
    int step = 1, at = 0;
    while (step * 32 < table.count) step *= 32;
    for (; step > 0; step /= 32) {  // a warp looks at 32 layers at a time
      const int i = at + int(threadIdx.x % 32) * step;
      const bool begun = i < table.count && table.layers[i].first_block <= block;
      at += (__popc(__ballot_sync(0xFFFFFFFFu, begun)) - 1) * step;
    }
    from = table.layers + at;
  }
  copy_words<uint64_t>(&walk.layer, from, int(sizeof(Layer)));
  if (threadIdx.x == 0) {
    const int64_t number = block - from->first_block;
    const int tiles = int((from->rows + kLoraRows - 1) / kLoraRows);
    walk.groups = (table.layers ? table.groups : table.few) + from->first_group;
    walk.strip = int(number % from->strips);
    walk.first = int(number / from->strips) * from->deep;
    walk.end = walk.first + from->deep < tiles ? walk.first + from->deep : tiles;
  }
  __syncthreads();
}

/// A lane's weights: rows 8 h on from its first.
template <class T>
using Weights = Raw<T, 8>[4];

/// Has a tile of weights brought near, without registers for it.
template <class T>
__device__ __forceinline__ void ask_for_tile(const Layer& layer, int tile, int strip) {
  constexpr int kSector = 32, kSectors = kLoraColumns * int(sizeof(T)) / kSector;
  const int64_t row = int64_t(tile) * kLoraRows, column = int64_t(strip) * kLoraColumns;
  const char* from =
      static_cast<const char*>(layer.weight) + (row * layer.cols + column) * int64_t(sizeof(T));
#pragma unroll
  for (int i = thread_asked(); i < kLoraRows * kSectors; i += kLoraThreads) {
    const int down = i / kSectors, across = i % kSectors * (kSector / int(sizeof(T)));
    if (row + down < layer.rows && column + across < layer.cols)
      ask_for(from + (down * layer.cols + across) * int64_t(sizeof(T)));
  }
}

template <class T>
__device__ __forceinline__ void load_weights(const Layer& layer, const Spot& spot, Weights<T>& weights) {
  const char* from = static_cast<const char*>(layer.weight) + spot.start(layer) * int64_t(sizeof(T));
#pragma unroll
  for (int h = 0; h < 4; h++)
    weights[h] = load<T, Eight<T>>(from + 8 * h * layer.cols * int64_t(sizeof(T)), spot.across,
                                   spot.down + 8 * h < spot.height ? spot.width : 0, layer.in_alignment);
}

/// Every tile of a block: its weights are asked for one tile ahead, adapters are multiplied while those are
/// on their way, and `Finish` makes of both what is wanted. Columns of the right factors are in shared memory
/// once for all tiles, unless there is no room for all groups.
template <class T, class Finish>
__device__ inline void sweep(const Layers& table, char* room) {
  __shared__ Walk walk;
  __shared__ Group groups[kMostSlots];
  stage_walk(table, blockIdx.x, walk);
  const Layer& layer = walk.layer;
  ask_for_tile<T>(layer, walk.first, walk.strip);
#pragma unroll 1
  for (int tile = walk.first; tile < walk.end; tile++) {
    if (tile + 1 < walk.end) ask_for_tile<T>(layer, tile + 1, walk.strip);
    char *left = room, *right = room + table.slots * kLeftSlot;
    Sums total;
    clear(total);
    int count = 0;
#pragma unroll 1
    for (int at = 0; at < layer.groups; at += count) {
      const bool anew = tile == walk.first || layer.in_chunks;
      count = walk.groups[at].chunk;
      __syncthreads();  // all have read what was there before
      if (anew) {
        copy_words<uint64_t>(groups, walk.groups + at, count * int(sizeof(Group)));
        __syncthreads();
        fill<kLoraColumns, true>(right, groups, count, int64_t(walk.strip) * kLoraColumns, layer.cols);
      }
      fill<kLoraRows, false>(left, groups, count, int64_t(tile) * kLoraRows, layer.rows);
      __syncthreads();
      multiply_groups(layer, groups, count, left, right, tile, walk.strip, total);
    }
    const Spot spot(layer, tile, walk.strip);
    Weights<T> weights;
    load_weights<T>(layer, spot, weights);
    Finish::finish(layer, spot, weights, total);
  }
}

}  // namespace pk::cuda
