// What LoRA adds to the rows of a linear layer, or of the gradient of its input, in one launch: a cluster
// takes a tile of rows that share an adapter, each block a slice of x's columns; the blocks add up low in
// each other's shared memory, then each writes a slice of the result's columns. Without clusters: two
// launches. Traffic: reads x once and a tile's adapter from the L2 once a tile, writes out and low once: (m k
// + m n) * sizeof(T). One pass; x and out are what the frozen product reads and adds to next. Predicted on an
// H200: m (k + n) * 2 bytes / 4.3 TB/s, 31 us at m = 8192, k = n = 4096; at m = 1 about 3 us, two latencies
// of memory (a block asks for all that it will read at once), one of another block's and a barrier.
#include <algorithm>

#include "cluster.h"
#include "lora_expand.h"
#include "softmax.h"
#include "stage.h"

namespace pk::cuda {
namespace {

constexpr int64_t kMostShared = 97 << 10;  // any device from sm_80 on has as much; float32 takes it all
constexpr int kDrawsBytes = kWarps * kWarpRows * drawn_bytes(kDrawn);
constexpr int64_t kFewRows = 512;  // more of them find factors in the L2, where those before brought them
constexpr int kAsked = 8;          // sectors of a matrix that a thread asks for at the most

/// How a launch deals its work: block b is member b % cluster of cluster b / cluster; `groups` clusters share
/// a tile and all of them find its low.
struct RowsDeal {
  int stage;
  int tile_rows, cluster, groups;
  int64_t slice, columns;  // of x and of out that a block takes
  int64_t tiles;
  float* partial;  // between the stages: [tile][member][tile rows][padded rank]
};

/// Whether every block of a cluster adds up all of a small low by itself, which takes one barrier instead of
/// two. Not where `planes` are written anew while others may still read them.
PK_HD bool adds_alone(const RowsDeal& deal, int rank, int side) {
  return deal.cluster > 1 && side != kWritten && deal.tile_rows * padded(rank) <= 2 * kThreads;
}

/// Where things lie in a block's shared memory, in bytes. Draws lie where nothing else does at that time.
struct RowsRoom {
  int64_t adapter, planes, total, staged, bytes;
};
PK_HD RowsRoom room_of(const RowsDeal& deal, int rank, int side, int parts) {
  const int64_t area = int64_t(deal.tile_rows) * padded(rank);
  const auto at_least = [](int64_t a, int64_t b) { return a > b ? a : b; };
  RowsRoom room;
  room.adapter = deal.tile_rows * 8;
  room.planes = room.adapter + (sizeof(Adapter) + 15) / 16 * 16;
  room.total =
      room.planes + at_least(planes_of(deal.tile_rows, rank) * 4, side == kWritten ? kDrawsBytes : 0);
  const int own = adds_alone(deal, rank, side) ? 1 : deal.cluster;
  room.staged = room.total + (deal.cluster > 1 ? area * 4 / own : 0);
  room.bytes = room.staged + at_least(parts * area * 2, side == kRead ? kDrawsBytes : 0);
  return room;
}

/// low of a tile: all of it in a block's own `total`, or a slice of it in every block's.
struct Low {
  const float* total;
  int slice;  // 0: all of it is here
  __device__ float operator()(int e) const {
    return slice ? of_block(total, e / slice)[e % slice] : total[e];
  }
};

/// Element e of all blocks' `planes`, added up in the order of the blocks; all are asked for at once.
__device__ __forceinline__ float sum_blocks(const float* planes, int cluster, int e) {
  float part[kLargestCluster], sum = 0;
#pragma unroll
  for (int b = 0; b < kLargestCluster; b++) part[b] = b < cluster ? of_block(planes, b)[e] : 0.0f;
#pragma unroll
  for (int b = 0; b < kLargestCluster; b++) sum += part[b];
  return sum;
}

/// Adds up what the blocks of a cluster have in `planes`.
__device__ __forceinline__ Low add_cluster(const RowsDeal& deal, const float* planes, float* total, int area,
                                           int member, bool alone) {
  if (deal.cluster == 1) return {planes, 0};
  const int slice = alone ? area : area / deal.cluster, first = alone ? 0 : member * slice;
  cluster_arrive();
  cluster_wait();
  for (int e = int(threadIdx.x); e < slice; e += kThreads)
    total[e] = sum_blocks(planes, deal.cluster, first + e);
  if (alone) {
    __syncthreads();
    return {total, 0};
  }
  cluster_arrive();
  cluster_wait();
  return {total, slice};
}

/// The adapter in shared memory: loops read its numbers anew for every address, and arguments of a launch
/// that are reached through a pointer lie as far away as any memory.
__device__ __forceinline__ const Adapter* stage_adapter(const LoraRows& job, int number, char* shared) {
  if (job.many)
    copy_words<uint64_t>(shared, job.many + number, int(sizeof(Adapter)));
  else
    copy_words<uint64_t>(shared, job.few + number, int(sizeof(Adapter)));
  return reinterpret_cast<const Adapter*>(shared);
}

/// Has columns begin .. end of `count` rows brought near, all at once: a warp's own loads would come from
/// memory one latency after another. Only where a row lies side by side.
template <class RowAt>
__device__ __forceinline__ void ask_for_part(const Matrix& m, int count, int64_t begin, int64_t end,
                                             RowAt row_at) {
  if (m.col != 1 || begin >= end) return;
  const int size = dtype_size(m.dtype), sectors = int(divide_up((end - begin) * size, 32));
  const int all =
      count < kAsked * kThreads / sectors ? count * sectors : kAsked * kThreads / sectors * sectors;
  for (int i = int(threadIdx.x); i < all; i += kThreads)
    ask_for(m.data + (row_at(i / sectors) * m.row + begin) * size + i % sectors * 32);
}

/// What a block will read: its columns of x, and of few rows its share of the factors.
__device__ __forceinline__ void ask_for_all(const LoraRows& job, const RowsDeal& deal, const Adapter& adapter,
                                            const int64_t* rows, int count, int64_t begin, int64_t end,
                                            int64_t column) {
  const int64_t left = job.n - column < deal.columns ? job.n - column : deal.columns;
  if (deal.stage != kFinish) {
    ask_for_part(job.x, count, begin, end, [&](int i) { return rows[i]; });
    if (job.m <= kFewRows)
      ask_for_part(adapter.down, adapter.rank, begin, end, [](int i) -> int64_t { return i; });
  }
  if (deal.stage != kSums && job.out && job.m <= kFewRows && left > 0)
    ask_for_part(adapter.up, int(left), 0, adapter.rank, [&](int i) { return column + i; });
}

/// The same from a launch before.
__device__ __forceinline__ Low add_partial(const RowsDeal& deal, const float* partial, float* planes,
                                           int area) {
  for (int e = int(threadIdx.x); e < area; e += kThreads) {
    float sum = 0;
    for (int b = 0; b < deal.cluster; b++) sum += partial[int64_t(b) * area + e];
    planes[e] = sum;
  }
  __syncthreads();
  return {planes, 0};
}

template <class Kind, class Up>
__global__ void __launch_bounds__(kThreads, Kind::kBlocks < Up::kBlocks ? Kind::kBlocks : Up::kBlocks)
    add_low_rank(const __grid_constant__ LoraRows job, const __grid_constant__ RowsDeal deal) {
  PK_DYNAMIC_SHARED(char, shared);
  const RowsRoom room = room_of(deal, job.rank, job.drop.side, low_parts_of(job.out_dtype));
  int64_t* const row = reinterpret_cast<int64_t*>(shared);
  float* const planes = reinterpret_cast<float*>(shared + room.planes);
  uint4* const staged = reinterpret_cast<uint4*>(shared + room.staged);
  const int64_t block = blockIdx.x / unsigned(deal.cluster), t = block / deal.groups,
                group = block % deal.groups;
  const int member = int(blockIdx.x % unsigned(deal.cluster));
  const DealtRows dealt(job.m, job.places.adapters, job.rank);
  const Tile tile = find_rows(job.places, dealt, 0, t, 0, deal.tile_rows, row);
  if (tile.count == 0) return;
  const Adapter* adapter = nullptr;
  if (tile.adapter >= 0) adapter = stage_adapter(job, tile.adapter, shared + room.adapter);
  __syncthreads();
  if (adapter) {
    const int width = padded(adapter->rank), area = deal.tile_rows * width;
    float* partial = deal.partial + t * deal.cluster * deal.tile_rows * padded(job.rank);
    const int64_t begin = member * deal.slice, end = begin + deal.slice < job.k ? begin + deal.slice : job.k;
    ask_for_all(job, deal, *adapter, row, tile.count, begin, end,
                (group * deal.cluster + member) * deal.columns);
    if (deal.stage != kFinish) {
      shrink<Kind>(job, *adapter, row, tile.count, deal.tile_rows, begin, end, planes,
                   reinterpret_cast<uint8_t*>(staged));
    }
    if (deal.stage == kSums) {
      for (int e = int(threadIdx.x); e < area; e += kThreads) partial[int64_t(member) * area + e] = planes[e];
      return;
    }
    const Low low = deal.stage == kFinish
                        ? add_partial(deal, partial, planes, area)
                        : add_cluster(deal, planes, reinterpret_cast<float*>(shared + room.total), area,
                                      member, adds_alone(deal, job.rank, job.drop.side));
    if (group == 0)
      for (int e = int(threadIdx.x) + member * kThreads; e < area; e += deal.cluster * kThreads)
        if (row[e / width] >= 0 && e % width < adapter->rank)
          job.low[row[e / width] * job.low_step + e % width] = low(e);
    if (job.out) stage_parts(staged, deal.tile_rows, width, low_parts_of(job.out_dtype), low);
  }
  const bool shares = adapter && deal.stage == kWhole && deal.cluster > 1;
  if (shares) cluster_leave();
  __syncthreads();
  const int64_t begin = (group * deal.cluster + member) * deal.columns;
  if (job.out && deal.stage != kSums)
    expand<Up>(job, adapter, staged, row, tile.count, deal.tile_rows, begin,
               begin + deal.columns < job.n ? begin + deal.columns : job.n,
               tile.adapter == kNonsense ? bits_float(kNaN) : 0.0f, reinterpret_cast<uint8_t*>(planes));
  if (shares) cluster_wait();  // the others read what is here
}

RowsDeal deal_of(const LoraRows& job) {
  RowsDeal d{};
  d.tile_rows = tile_rows_of(job.m, job.rank);
  d.cluster = 1;
  const int64_t longest = std::max(job.k, job.out ? job.n : 0);
  while (d.cluster < kLargestCluster && longest > d.cluster * lora_regimes.block) d.cluster *= 2;
  const DealtRows dealt(job.m, job.places.adapters, job.rank);
  d.tiles = divide_up(job.m, d.tile_rows);
  if (job.places.index) d.tiles = dealt.most[0];
  d.slice = divide_up(divide_up(job.k, d.cluster), kDrawn) * kDrawn;
  const int unit = job.drop.side == kWritten ? kDrawn : 32;
  const int64_t n = job.out ? job.n : 1, blocks = d.tiles * d.cluster;
  d.groups =
      int(std::max<int64_t>(1, std::min(lora_regimes.blocks / blocks, divide_up(n, d.cluster * unit))));
  d.columns = divide_up(divide_up(n, int64_t(d.cluster) * d.groups), unit) * unit;
  return d;
}

template <class Kind, class Up>
void launch_rows(const LoraRows& job, RowsDeal deal, bool clusters, cudaStream_t stream) {
  const auto start = [&](int stage, int groups, int together) {
    deal.stage = stage;
    deal.groups = groups;
    const RowsRoom room = room_of(deal, job.rank, job.drop.side, low_parts_of(job.out_dtype));
    launch_clusters(add_low_rank<Kind, Up>, dim3(unsigned(deal.tiles * groups * deal.cluster)), kThreads,
                    size_t(room.bytes), kMostShared, together, stream, job, deal);
  };
  const int groups = deal.groups;
  if (deal.cluster == 1 || clusters) return start(kWhole, groups, deal.cluster);
  start(kSums, 1, 1);
  start(kFinish, groups, 1);
}

}  // namespace

int64_t lora_scratch(const LoraRows& job, int device) {
  const RowsDeal d = deal_of(job);
  return d.cluster == 1 || limits_of(device).clusters
             ? 0
             : d.tiles * d.cluster * d.tile_rows * padded(job.rank) * 4;
}

void lora_rows(const LoraRows& job, void* scratch, int device, cudaStream_t stream) {
  if (job.m == 0) return;
  RowsDeal deal = deal_of(job);
  deal.partial = static_cast<float*>(scratch);
  const bool clusters = limits_of(device).clusters;
  if (!job.native || job.x.dtype == kF32) return launch_rows<Split, Split>(job, deal, clusters, stream);
  if (job.x.dtype == kBF16) return launch_rows<Native<bf16>, Native<bf16>>(job, deal, clusters, stream);
  launch_rows<Native<f16>, Split>(job, deal, clusters, stream);
}

}  // namespace pk::cuda
