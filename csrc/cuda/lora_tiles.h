// A block's way to its rows: those of one adapter.
#pragma once
#include "block.h"
#include "lora.h"

namespace pk::cuda {

constexpr int kNoAdapter = -1, kNonsense = -2;

struct Tile {
  int adapter;  // or kNoAdapter; kNonsense: the index names none
  int count;    // rows; 0: past the last tile
};

/// The bucket of a value: adapters, then -1, then what means nothing.
__device__ inline int bucket_of(int64_t value, int adapters) {
  return value >= 0 && value < adapters ? int(value) : value == -1 ? adapters : adapters + 1;
}
__device__ inline int adapter_of(int bucket, int adapters) {
  return bucket < adapters ? bucket : bucket == adapters ? kNoAdapter : kNonsense;
}

/// Every warp looks at the index: the tiles are the adapters in the order in which rows first name them.
__device__ inline Tile tile_by_warp(const Places& places, int64_t m, int64_t tile, int64_t* rows) {
  const int lane = int(threadIdx.x % 32);
  const bool there = lane < m;
  const int bucket = there ? bucket_of(places.index[lane * places.step], places.adapters) : -1;
  const unsigned alike = __match_any_sync(kAllLanes, bucket), before = (1u << lane) - 1;
  const unsigned leaders = __ballot_sync(kAllLanes, there && !(alike & before));
  const bool mine = (leaders >> lane & 1) && __popc(leaders & before) == tile;
  const unsigned found = __ballot_sync(kAllLanes, mine);
  if (!found) return {kNoAdapter, 0};
  const int leader = __ffs(int(found)) - 1;
  const unsigned members = __shfl_sync(kAllLanes, alike, leader);
  if (threadIdx.x < 32 && (members >> lane & 1)) rows[__popc(members & before)] = lane;
  return {adapter_of(__shfl_sync(kAllLanes, bucket, leader), places.adapters), __popc(members)};
}

/// The rows of a tile, or (`list` 1) the first of a chunk, to shared memory, -1 behind the last; all threads
/// must call, and meet before they read. `skip`: rows of the chunk that were had before.
__device__ inline Tile find_rows(const Places& places, const DealtRows& dealt, int list, int64_t tile,
                                 int64_t skip, int most, int64_t* rows) {
  const int thread = int(threadIdx.x);
  if (thread < most) rows[thread] = -1;
  if (places.index && !places.table) {
    __syncthreads();
    return tile_by_warp(places, dealt.m, tile, rows);
  }
  int64_t first = tile * dealt.rows[list], count = dealt.m - first, adapter = 0;
  if (count > dealt.rows[list]) count = dealt.rows[list];
  if (places.table) {
    if (tile >= places.table[dealt.before(list) + dealt.buckets]) return {kNoAdapter, 0};
    const int64_t* entry = places.table + dealt.list(list) + 3 * tile;
    adapter = adapter_of(int(entry[0]), places.adapters);
    first = entry[1], count = entry[2];
  }
  first += skip, count -= skip;
  if (thread < most && thread < count)
    rows[thread] = places.table ? places.table[first + thread] : first + thread;
  return {int(adapter), int(count < most ? count < 0 ? 0 : count : most)};
}

}  // namespace pk::cuda
