// Sums in float64 over blocks of 4096 elements, in the order that the references fix: 16 interleaved lanes,
// each in element order, then neighbouring lanes until one is left.
#pragma once
#include "block.h"
#include "stage.h"
#include "tile.h"

namespace pk::cuda {

constexpr int kTree = 16, kSumThreads = 64;

/// Neighbours are added: lane l of 16 ends with the sum of all, as (0 + 1) + (2 + 3) and so on.
__device__ inline double tree(double lane) {
  for (int d = 1; d < kTree; d *= 2) lane += __shfl_xor_sync(kAllLanes, lane, d);
  return lane;
}

/// Element `i` of a tile at `data`, of any dtype.
__device__ inline float element_of(int dtype, const char* data, int i, int alignment) {
  if (dtype == kF32) {
    float x;
    if (alignment == kBytes)
      memcpy(&x, data + i * 4, 4);
    else
      x = *reinterpret_cast<const float*>(data + i * 4);
    return x;
  }
  bf16 x;
  if (alignment == kBytes)
    memcpy(&x, data + i * 2, 2);
  else
    x = *reinterpret_cast<const bf16*>(data + i * 2);
  return dtype == kBF16 ? widen(x) : widen(f16{x.bits});
}

}  // namespace pk::cuda
