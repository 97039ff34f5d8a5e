// A frozen linear layer and the adapters of its rows, from operands to the rounded result.
#pragma once
#include <vector>

#include "gemm.h"

namespace pk {

/// scale * b a of a weight [n, k]: a [rank, k], b [n, rank].
struct LowRank {
  cpu::Matrix a, b;
  int64_t rank;
  float scale;
};

/// out [m, n] = scale * (x [m, k] weight^T + in row i what adapter index[i] adds, -1: nothing) + bias; both
/// of these [n], and `out` holds them.
struct LoraLinear {
  cpu::GemmOut out;
  cpu::Matrix x, weight;
  int64_t m, n, k;
  const int64_t* index;  // null: every row takes the one adapter
  std::vector<LowRank> adapters;
};
void lora_linear(const LoraLinear& job, int threads);

}  // namespace pk
