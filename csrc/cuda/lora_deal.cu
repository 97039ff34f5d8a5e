// Rows of a batch sorted by the adapter that each takes, without the host: a stable counting sort by one
// block, and the lists of tiles that have one adapter.
// Traffic: reads the index twice, m * 8 bytes, and writes the order, as many; counts of 32 warps per adapter.
#include "block.h"
#include "lora.h"
#include "lora_tiles.h"

namespace pk::cuda {
namespace {

constexpr int kSorters = 1024;

/// Every warp walks a stretch of the rows, 32 at a time, and counts in counts[bucket][warp]; a row is visited
/// with its bucket's count of those before it.
template <class Visit>
__device__ void walk(const int64_t* index, int64_t step, const DealtRows& dealt, int64_t* counts,
                     Visit visit) {
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  const int64_t stretch = (dealt.m + kSorters - 1) / kSorters * 32, begin = warp * stretch;
  for (int64_t at = begin; at < begin + stretch && at < dealt.m; at += 32) {
    const int64_t row = at + lane;
    const bool there = row < dealt.m;
    const int bucket = there ? bucket_of(index[row * step], int(dealt.buckets) - 2) : -1;
    const unsigned alike = __match_any_sync(kAllLanes, bucket), before = alike & ((1u << lane) - 1);
    if (there) visit(row, counts[32 * bucket + warp] + __popc(before));
    __syncwarp();
    if (there && !before) counts[32 * bucket + warp] += __popc(alike);
    __syncwarp();
  }
  __syncthreads();
}

/// values[0 .. count) become the sums of those before; returns the sum of all. All threads must call.
template <class Value, class Put>
__device__ int64_t scan(int64_t count, Value value, Put put) {
  int64_t sum = 0;
  for (int64_t at = 0; at < count; at += kSorters) {
    const int64_t i = at + threadIdx.x;
    Count total;
    const int64_t mine = i < count ? value(i) : 0, before = int64_t(sum_before(Count(mine), total));
    if (i < count) put(i, sum + before, mine);
    sum += int64_t(total);
  }
  __syncthreads();
  return sum;
}

__global__ void __launch_bounds__(kSorters, 1)
    sort_rows(int64_t* table, const int64_t* index, int64_t step, DealtRows dealt) {
  int64_t* counts = table + dealt.counts();
  for (int64_t i = threadIdx.x; i < 32 * dealt.buckets; i += kSorters) counts[i] = 0;
  __syncthreads();
  walk(index, step, dealt, counts, [](int64_t, int64_t) {});
  scan(
      32 * dealt.buckets, [&](int64_t i) { return counts[i]; },
      [&](int64_t i, int64_t sum, int64_t) { counts[i] = sum; });
  for (int s = 0; s < 2; s++) {
    int64_t *before = table + dealt.before(s), *list = table + dealt.list(s), size = dealt.rows[s];
    const auto begin_of = [&](int64_t b) { return b < dealt.buckets ? counts[32 * b] : dealt.m; };
    const int64_t all = scan(
        dealt.buckets, [&](int64_t b) { return divide_up(begin_of(b + 1) - begin_of(b), size); },
        [&](int64_t b, int64_t first, int64_t tiles) {
          before[b] = first;
          for (int64_t i = 0; i < tiles; i++) {
            const int64_t row = begin_of(b) + i * size, left = begin_of(b + 1) - row;
            int64_t* entry = list + 3 * (first + i);
            entry[0] = b, entry[1] = row, entry[2] = left < size ? left : size;
          }
        });
    if (threadIdx.x == 0) before[dealt.buckets] = all;
  }
  __syncthreads();
  walk(index, step, dealt, counts, [&](int64_t row, int64_t at) { table[at] = row; });
}

}  // namespace

void lora_deal(int64_t* table, const int64_t* index, int64_t step, int64_t m, int adapters, int rank,
               cudaStream_t stream) {
  launch(sort_rows, dim3(1), kSorters, 0, stream, table, index, step, DealtRows(m, adapters, rank));
}

}  // namespace pk::cuda
