// The merges over whole tensors: chunks dealt to threads, cuts turned into per-chunk constants, TIES in one
// pass.
#pragma once
#include <cstdint>
#include <vector>

#include "select.h"

namespace pk {

/// A whole-tensor merge: inputs, per-model numbers and where the result goes.
struct Task {
  Inputs in;
  void* out;
  int out_dtype;
  std::vector<float> weight, vote, share;
  std::vector<uint32_t> threshold, index;
  float lambda;
  int combine;     // cpu::Combine
  int64_t offset;  // flat index of element 0 in its tensor
  uint64_t key;    // of the random draws
  int threads;
};

void linear_merge(const Task& task);
void dare_merge(const Task& task);
/// With known cuts, whose `last` counts from the tensor's first element.
void ties_merge(const Task& task, const std::vector<Cut>& cuts);
/// Selection and merge in one pass over memory; two where a speculation fails or too much is uncertain.
void ties_fused(const Task& task, const int64_t* k, bool keep_equals);
/// Sums [blocks][n][2] of |delta| and kept |delta|, per block of 4096 elements.
void l1_norms(const Task& task, double* sums);
/// Sums [blocks][n] of grad * delta, per block of 4096 elements; grad has a dtype of its own.
void dot_products(const Task& task, int grad_dtype, const void* grad, double* sums);
void elect_sign(int8_t* out, const Task& task);

}  // namespace pk
