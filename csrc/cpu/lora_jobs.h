// What the driver of LoRA's merge hands to its kernels.
#pragma once
#include <cstdint>

namespace pk::cpu {

/// out = scale * weight + left @ right, [rows, cols]; the adapters stand side by side in left [rows, rank]
/// and one below another in right [rank, cols].
struct MergeLora {
  void* out;  // may be weight where the dtypes are one
  const void* weight;
  int out_dtype, dtype;
  int64_t rows, cols, rank;
  const float* left;
  const float* panels;        // right, as pack_panels leaves it
  const float* row_scale;     // [rows]; null: 1
  const float* column_scale;  // as pack_panels leaves a right of one row; null: 1
};

constexpr int64_t kLoraRows = 96;        // rows that a thread takes at a time: a multiple of every tile's
constexpr int64_t kSquareRows = 48;      // the same where squares are summed, and what a column's sums add up
constexpr int64_t kPanelFloats = 49152;  // of right, that stay in the second-level cache
constexpr int64_t kSquareColumns = 512;  // of a block whose squares are summed

}  // namespace pk::cpu
