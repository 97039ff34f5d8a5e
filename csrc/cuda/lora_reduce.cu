// The gradients of LoRA's factors: out [r, n] = scale * the sum over an adapter's rows of low[row]^T a[row].
// Traffic: reads a once for every 32 ranks (m n elements, later times from the L2 where it fits) and low once
// for every 512 columns; per chunk of rows one sum [r, n] in float32 is written, and read by a second launch,
// which adds them up in their order. Predicted on an H200: m n * 2 bytes / 4.3 TB/s and a quarter for the
// sums, 20 us at m = 8192, n = 4096, r = 16.
#include <algorithm>

#include "lora_draws.h"
#include "lora_expand.h"
#include "lora_operands.h"
#include "lora_tiles.h"

namespace pk::cuda {
namespace {

constexpr int kColumns = 512;  // of a block, 64 of a warp
constexpr int kStaged = 64;    // rows that are staged at a time

struct ReduceDeal {
  int64_t chunks, column_blocks;
  int rank_blocks;
  float* partial;  // [chunk][padded rank][n]
};

struct ReduceRoom {
  int64_t rows[kStaged];
  uint2 low[kMostParts][kStaged / kStep][kWarpRanks / 8][32];
  uint8_t kept[kStaged * drawn_bytes(kColumns)];
};

__device__ __forceinline__ const Sink& sink_of(const LoraReduce& job, int adapter) {
  return job.many ? job.many[adapter] : job.few[adapter];
}

/// Ranks rank0 .. rank0 + 31 of low for 64 rows, as parts, in the order in which lanes read them.
__device__ __forceinline__ void stage_low(ReduceRoom& room, const LoraReduce& job, int rank0, int rank) {
  for (int i = int(threadIdx.x); i < kStaged / kStep * (kWarpRanks / 8) * 32; i += kThreads) {
    const int lane = i % 32, tile = i / 32 % (kWarpRanks / 8), step = i / 32 / (kWarpRanks / 8);
    const int r = rank0 + tile * 8 + lane / 4;
    float value[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int64_t row = room.rows[step * kStep + lane % 4 * 4 + e];
      value[e] = row >= 0 && r < rank ? job.low[row * job.low_step + r] : 0.0f;
    }
    Words<kMostParts, 4> words;
    put_parts(words, 0, value[0], value[1]);
    put_parts(words, 1, value[2], value[3]);
#pragma unroll
    for (int part = 0; part < kMostParts; part++)
      room.low[part][step][tile][lane] = {words.part[part][0], words.part[part][1]};
  }
}

/// Halves of two words beside each other: the lower ones, or the upper ones.
__device__ __forceinline__ uint32_t pair_of(uint32_t first, uint32_t second, int high) {
  return high ? first >> 16 | (second & 0xFFFF0000u) : (first & 0xFFFFu) | second << 16;
}

/// sum [64 columns][32 ranks] += a^T low over 16 staged rows.
template <class Kind>
__device__ __forceinline__ void reduce_step(float (&sum)[4][4][4], const LoraReduce& job,
                                            const ReduceRoom& room, int step, int64_t col0, int64_t col,
                                            int ranks) {
  const int lane = int(threadIdx.x % 32);
  Words<Kind::kParts, 8> word[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = step * kStep + lane % 4 * 4 + i;
    const int64_t row = room.rows[at];
    word[i] = {};
    if (row < 0 || col >= job.n) continue;
    const unsigned eight = job.drop.side != kRead ? ~0u
                                                  : eight_kept(room.kept + at * drawn_bytes(kColumns), row,
                                                               col0, int(col - col0), job.drop);
    Kind::template load<8>(word[i], job.a, row, col, job.n, eight);
  }
#pragma unroll
  for (int tile = 0; tile < 4; tile++) {
    uint32_t a[Kind::kParts][4];
#pragma unroll
    for (int part = 0; part < Kind::kParts; part++)
#pragma unroll
      for (int w = 0; w < 4; w++)
        a[part][w] = pair_of(word[w / 2 * 2].part[part][tile], word[w / 2 * 2 + 1].part[part][tile], w % 2);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j * 8 >= ranks) continue;
      uint32_t b[kMostParts][2];
#pragma unroll
      for (int part = 0; part < kMostParts; part++) {
        const uint2 two = room.low[part][step][j][lane];
        b[part][0] = two.x, b[part][1] = two.y;
      }
      multiply_parts(sum[tile][j], a, b, parts_of(job.a.dtype), job.parts);
    }
  }
}

/// Where a lane's sums go: [rank][n] of a chunk, eight columns side by side.
__device__ __forceinline__ void store_sums(float* to, const float (&sum)[4][4][4], int64_t n, int64_t col,
                                           int ranks) {
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int r = j * 8 + int(threadIdx.x % 4) * 2 + e;
      if (r >= ranks) continue;
#pragma unroll
      for (int c = 0; c < 8; c++)
        if (col + c < n) to[r * n + col + c] = sum[c / 2][j][c % 2 * 2 + e];
    }
}

template <class Kind>
__global__ void __launch_bounds__(kThreads, Kind::kBlocks)
    reduce_rows(const __grid_constant__ LoraReduce job, const __grid_constant__ ReduceDeal deal) {
  PK_DYNAMIC_SHARED(char, shared);
  ReduceRoom& room = *reinterpret_cast<ReduceRoom*>(shared);
  const int64_t col0 = int64_t(blockIdx.x % deal.column_blocks) * kColumns;
  const int rank0 = int(blockIdx.x / deal.column_blocks % deal.rank_blocks) * kWarpRanks;
  const int64_t chunk = blockIdx.x / deal.column_blocks / deal.rank_blocks;
  const int64_t col = col0 + threadIdx.x / 32 * 64 + threadIdx.x % 32 / 4 * 8;
  const DealtRows dealt(job.m, job.places.adapters, job.rank);
  float sum[4][4][4] = {};
  int ranks = 0;
  for (int64_t done = 0; done < dealt.rows[1]; done += kStaged) {
    const Tile tile = find_rows(job.places, dealt, 1, chunk, done, kStaged, room.rows);
    if (tile.count == 0 || tile.adapter < 0 || !sink_of(job, tile.adapter).out) break;
    const int rank = sink_of(job, tile.adapter).rank;
    ranks = rank - rank0 < kWarpRanks ? rank - rank0 : kWarpRanks;
    if (ranks <= 0) return;
    __syncthreads();
    stage_low(room, job, rank0, rank);
    if (job.drop.side == kRead)
      draw(room.kept, room.rows, tile.count, col0, kColumns, job.drop, int(threadIdx.x), kThreads);
    __syncthreads();
    for (int step = 0; step * kStep < tile.count; step++)
      reduce_step<Kind>(sum, job, room, step, col0, col, ranks);
    __syncthreads();
  }
  if (ranks > 0)
    store_sums(deal.partial + (chunk * padded(job.rank) + rank0) * job.n, sum, job.n, col, ranks);
}

__device__ __forceinline__ void put_sum(const Sink& sink, int64_t at, float x) {
  if (sink.dtype == kF32) {
    narrow(x, static_cast<float*>(sink.out) + at);
  } else if (sink.dtype == kBF16) {
    narrow(x, static_cast<bf16*>(sink.out) + at);
  } else {
    narrow(x, static_cast<f16*>(sink.out) + at);
  }
}

/// Adds up an adapter's chunks, in their order; zeros where it has none.
__global__ void __launch_bounds__(kThreads)
    add_chunks(const __grid_constant__ LoraReduce job, const __grid_constant__ ReduceDeal deal) {
  const int64_t area = job.rank * job.n, blocks = divide_up(area, kThreads);
  const int adapter = int(blockIdx.x / blocks);
  const int64_t e = blockIdx.x % blocks * kThreads + threadIdx.x, r = e / job.n, n = e % job.n;
  const Sink& sink = sink_of(job, adapter);
  if (!sink.out || r >= sink.rank) return;
  const DealtRows dealt(job.m, job.places.adapters, job.rank);
  int64_t begin = 0, end = deal.chunks;
  if (job.places.table) {
    begin = job.places.table[dealt.before(1) + adapter];
    end = job.places.table[dealt.before(1) + adapter + 1];
  }
  float sum = 0;
  for (int64_t chunk = begin; chunk < end; chunk++)
    sum += deal.partial[(chunk * padded(job.rank) + r) * job.n + n];
  put_sum(sink, r * sink.row + n * sink.col, sum * sink.scale);
}

ReduceDeal deal_of(const LoraReduce& job) {
  const DealtRows dealt(job.m, job.places.adapters, job.rank);
  ReduceDeal d{};
  d.chunks = job.places.index ? dealt.most[1] : divide_up(job.m, dealt.rows[1]);
  d.column_blocks = divide_up(job.n, kColumns);
  d.rank_blocks = int(divide_up(job.rank, kWarpRanks));
  return d;
}

template <class Kind>
void launch_reduce(const LoraReduce& job, const ReduceDeal& deal, cudaStream_t stream) {
  const int64_t blocks = deal.chunks * deal.column_blocks * deal.rank_blocks;
  launch(reduce_rows<Kind>, dim3(unsigned(blocks)), kThreads, sizeof(ReduceRoom), stream, job, deal);
}

}  // namespace

int64_t lora_scratch(const LoraReduce& job, int) {
  return deal_of(job).chunks * padded(job.rank) * job.n * 4;
}

void lora_reduce(const LoraReduce& job, void* scratch, int, cudaStream_t stream) {
  if (job.m == 0 || job.n == 0 || job.rank == 0) return;
  ReduceDeal deal = deal_of(job);
  deal.partial = static_cast<float*>(scratch);
  if (job.a.dtype == kBF16)
    launch_reduce<Native<bf16>>(job, deal, stream);
  else
    launch_reduce<Split>(job, deal, stream);
  const int64_t blocks = divide_up(job.rank * job.n, kThreads) * (job.places.index ? job.places.adapters : 1);
  launch(add_chunks, dim3(unsigned(blocks)), kThreads, 0, stream, job, deal);
}

}  // namespace pk::cuda
