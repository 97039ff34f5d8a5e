// What the driver of LoRA's merge hands to its kernels.
#pragma once
#include <cstdint>

#include "gemm_jobs.h"

namespace pk::cpu {

/// (left_scale * left [rows, rank]) @ (right_scale * right [rank, cols]); one of the scales is 1.
struct LowRank {
  Matrix left, right;
  int64_t rank;
  double left_scale, right_scale;
};

/// out = scale * weight + the sum of all factors, [rows, cols].
struct MergeLora {
  void* out;  // may be weight where the dtypes are one
  const void* weight;
  int out_dtype, dtype;
  int64_t rows, cols;
  const LowRank* factors;
  int64_t count, rank;        // rank: of all factors together
  const float* panels;        // as pack_panels leaves the right sides
  const float* row_scale;     // [rows]; null: 1
  const float* column_scale;  // as pack_panels leaves a right side of one row; null: 1
};

constexpr int64_t kLoraRows = 48;        // rows that a thread takes at a time: a multiple of every tile's
constexpr int64_t kSquareRows = 48;      // the same where squares are summed, and what a column's sums add up
constexpr int64_t kPanelFloats = 49152;  // of right, that stay in the second-level cache
constexpr int64_t kSquareColumns = 512;  // of a block whose squares are summed

}  // namespace pk::cpu
