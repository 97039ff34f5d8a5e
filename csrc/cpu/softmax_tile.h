// Sixteen columns side by side, for reductions over a dimension that is not the last.
#pragma once
#include "softmax_load.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kWidth = int(kColumns);
constexpr int kParts = kWidth / kLanes;

/// The 32 virtual lanes of each column, added up in double by the tree of softmax.h.
PK_IN void add_lanes(const float (&lanes)[kStripe][kWidth], double* total) {
  double sum[kStripe / 2][kWidth];
  for (int l = 0; l < kStripe / 2; l++)
    for (int c = 0; c < kWidth; c++) sum[l][c] = double(lanes[l][c]) + double(lanes[l + kStripe / 2][c]);
  for (int width = kStripe / 4; width > 0; width /= 2)
    for (int l = 0; l < width; l++)
      for (int c = 0; c < kWidth; c++) sum[l][c] += sum[l + width][c];
  for (int c = 0; c < kWidth; c++) total[c] += sum[0][c];
}

/// Sixteen floats to the first `width` elements of a row of O.
template <class O>
PK_IN void put_row(O* out, const F (&y)[kParts], int width) {
  alignas(64) float wide[kStripe];
  for (int k = 0; k < kParts; k++) store(wide + k * kLanes, canonical(y[k]));
  alignas(64) O narrow[kStripe];
  for (int i = 0; i < kWidth; i += kGroup) {
    const Pair pair = load(wide + i);
    put(narrow + i, kParted<O> ? part(pair) : pair, false);
  }
  if (width == kWidth)
    memcpy(static_cast<void*>(out), narrow, kWidth * sizeof(O));
  else
    memcpy(static_cast<void*>(out), narrow, size_t(width) * sizeof(O));
}

}  // namespace
}  // namespace pk::cpu::PK_ISA
