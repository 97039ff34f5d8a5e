// What bindings hand to the kernels: one tensor and its models as plain data, one or many to a launch.
#pragma once
#include <cstdint>

#include "../math/dtype.h"

namespace pk::cuda {

constexpr int kMaxModels = 64;
constexpr int kTile = 4096;  // elements of a tensor that one block takes at a time
constexpr int kThreads = 256;

enum Combine : int { kSum = 0, kWeighted = 1, kPlain = 2 };
enum Alignment : int { kBytes = 0, kElements = 1, kVectors = 2 };  // of 16 bytes

/// Of rows that begin `step` elements apart, each of which lies one element behind the other, or does not.
inline Alignment alignment_of(uintptr_t address, int dtype, int64_t step, bool side_by_side = true) {
  const auto size = uint64_t(dtype_size(dtype));
  if (side_by_side && address % 16 == 0 && uint64_t(step) * size % 16 == 0) return kVectors;
  return address % size == 0 ? kElements : kBytes;
}

/// One model's part in a merge.
struct Model {
  const void* data;
  int64_t rank;        // how many of its entries are kept (selections)
  int64_t last;        // a known cut: flat index of the last kept among the equals of `key`
  uint32_t key;        // a known cut: kept iff the delta's key is above, or equal at an index up to `last`
  float weight;        // +0: takes no part
  float vote, share;   // as in csrc/math/elect.h
  uint32_t threshold;  // kept iff the 16-bit draw is below this (random kernels)
  uint32_t index;      // the model's number in the counter of its draws
};

/// One tensor: out = base + lambda * combine(models); base may be null (0). Numbers that the host does not
/// know are read where the device has them; those pointers are null otherwise.
struct Head {
  void* out;
  const void* base;
  const void* grad;  // dot_products only
  int64_t numel;
  int64_t offset;      // flat index of element 0 in its tensor, a multiple of 128 for random kernels
  int64_t first_tile;  // of the launch's tiles, the first of this tensor
  const float *weights, *votes, *shares, *lambda_at;
  int64_t *cut_key, *cut_last;  // [n]: results of a selection, cuts of a merge
  char* scratch;                // of a selection
  float lambda;
  uint32_t key0, key1;  // of the draws
  int n;
  int out_dtype, grad_dtype;
  int in_alignment, out_alignment;
};

struct Job {
  Head head;
  Model models[kMaxModels];
};

/// The tensors of a launch. One travels with the launch itself; many lie in device memory, `stride` bytes
/// apart, and `owner` says for every tile whose it is.
struct Table {
  const char* jobs;  // null: `one`
  const int* owner;
  int64_t stride;
  Job one;
};
static_assert(sizeof(Table) <= 4000, "kernel parameters end at 4 KiB");

PK_HD constexpr int64_t tiles_of(int64_t numel) { return (numel + kTile - 1) / kTile; }

}  // namespace pk::cuda
