// What the threads of a block do together: prefix sums, counts per bin, and the element of a given rank.
#pragma once
#include "device.h"
#include "jobs.h"

namespace pk::cuda {

using Count = unsigned long long;

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kBins = 2048;
constexpr int kDigits = 3;  // a key has 31 bits: digits of 11, 11 and 9
__device__ inline int shift_of(int digit) { return digit == 0 ? 20 : digit == 1 ? 9 : 0; }
__device__ inline uint32_t digit_of(uint32_t key, int digit) {
  return (key >> shift_of(digit)) & (digit == 2 ? 511u : 2047u);
}
__device__ inline uint32_t append_digit(uint32_t prefix, uint32_t value, int digit) {
  return prefix << (digit == 2 ? 9 : 11) | value;
}

/// The sum over all threads before this one; `total` becomes that over all.
__device__ inline Count sum_before(Count x, Count& total) {
  __shared__ Count warps[32];
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  Count inclusive = x;
  for (int d = 1; d < 32; d *= 2) {
    const Count lower = __shfl_up_sync(kAllLanes, inclusive, d);
    if (lane >= d) inclusive += lower;
  }
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  Count before = inclusive - x;
  total = 0;
  for (int w = 0; w < int(blockDim.x / 32); w++) {
    if (w < warp) before += warps[w];
    total += warps[w];
  }
  __syncthreads();
  return before;
}

/// Adds one to bins[bin] for every lane that is valid. Lanes that agree with the first one are added up
/// before, as most of a warp often holds the same value. Whole warps must call.
template <class Bin>
__device__ inline void count_into(Bin* bins, bool valid, uint32_t bin) {
  const unsigned voters = __ballot_sync(kAllLanes, valid);
  if (voters == 0) return;
  const int first = __ffs(int(voters)) - 1;
  const uint32_t common = __shfl_sync(kAllLanes, bin, first);
  const unsigned same = __ballot_sync(kAllLanes, valid && bin == common);
  if (int(threadIdx.x % 32) == first)
    atomicAdd(bins + common, Bin(__popc(same)));
  else if (valid && bin != common)
    atomicAdd(bins + bin, Bin(1));
}

/// The bin that holds the element of rank `rank` (1 is in the highest bin); `rank` becomes that within it.
/// `bins` is in shared memory, every thread must call, and a rank that is not there gives bin 0.
__device__ inline uint32_t find_bin(const unsigned* bins, int64_t& rank) {
  __shared__ uint32_t found;
  __shared__ int64_t left;
  if (threadIdx.x == 0) found = 0, left = 1;
  const int each = kBins / int(blockDim.x), top = kBins - 1 - int(threadIdx.x) * each;
  Count mine = 0, total;
  for (int j = 0; j < each; j++) mine += bins[top - j];
  Count above = sum_before(mine, total);
  if (int64_t(above) < rank && rank <= int64_t(above + mine)) {
    int bin = top;
    for (; int64_t(above + bins[bin]) < rank; bin--) above += bins[bin];
    found = uint32_t(bin);
    left = rank - int64_t(above);
  }
  __syncthreads();
  rank = left;
  const uint32_t bin = found;
  __syncthreads();
  return bin;
}

/// The key of rank `rank` among `count` keys, counted from the largest; `rank` becomes that among its equals.
template <class KeyAt>
__device__ uint32_t select_key(int64_t count, int64_t& rank, KeyAt key_at) {
  __shared__ unsigned bins[kBins];
  uint32_t prefix = 0;
  for (int digit = 0; digit < kDigits; digit++) {
    for (int b = int(threadIdx.x); b < kBins; b += int(blockDim.x)) bins[b] = 0;
    __syncthreads();
    const int64_t rounds = (count + blockDim.x - 1) / blockDim.x;
    for (int64_t r = 0; r < rounds; r++) {
      const int64_t i = r * blockDim.x + threadIdx.x;
      const uint32_t key = i < count ? key_at(i) : 0;
      const bool valid = i < count && (digit == 0 || key >> shift_of(digit - 1) == prefix);
      count_into(bins, valid, digit_of(key, digit));
    }
    __syncthreads();
    prefix = append_digit(prefix, find_bin(bins, rank), digit);
  }
  return prefix;
}

}  // namespace pk::cuda
