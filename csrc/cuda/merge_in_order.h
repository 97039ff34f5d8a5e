// What bindings hand to the kernels that merge adapters with the CPU's bits.
#pragma once
#include "device.h"
#include "jobs.h"

namespace pk::cuda {

/// out = scale * weight + left [rows, rank] @ right [rank, cols], all but out and weight float32, contiguous.
struct OrderedMerge {
  void* out;  // may be weight; of squares float64 [blocks of 4096 columns][rows] or [parts of 48 rows][cols]
  const void* weight;
  const float *left, *right;
  const float* scale;  // per row, or column; null: 1
  int64_t rows, cols, rank;
  int out_dtype, dtype;
  int out_alignment, in_alignment;
  bool by_column;
};

void merge_in_order(const OrderedMerge&, cudaStream_t);
/// Sums of squares of weight + left @ right, of every row, or column.
void squares_in_order(const OrderedMerge&, cudaStream_t);

}  // namespace pk::cuda
