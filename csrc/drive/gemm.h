// Products of matrices over threads, with what LoRA adds to them.
#pragma once
#include <vector>

#include "../cpu/gemm_jobs.h"

namespace pk {

/// Rows [begin, end) (in the order of `rows`) get scale * low * high more; low float32 [m, rank], high
/// [rank, n].
struct Extension {
  int64_t begin, end, rank;
  const float* low;
  int64_t low_stride;
  cpu::Matrix high;
  float scale;
};

/// out [m, n] = scale * (a [m, k] b [k, n] + extensions) + bias; row i of a and out stands at rows[i].
struct Product {
  cpu::GemmOut out;
  cpu::Matrix a, b;
  int64_t m, n, k;
  const int64_t* rows;
  std::vector<Extension> extensions;
  cpu::Dropout dropout;  // of what the extensions add
};
void product(const Product& job, int threads);

/// Rows [begin, end) of low [., rank] = a [., k] factor [k, rank], float32.
struct Shrink {
  int64_t begin, end, rank;
  cpu::Matrix factor;
};
void shrink(float* low, int64_t low_stride, const cpu::Matrix& a, int64_t k, const int64_t* rows,
            const std::vector<Shrink>& parts, const cpu::Dropout& dropout, int threads);

/// A product without dropout whose extensions read what `parts` make of the same rows of a: the skinny
/// products are done by whichever threads come by, beside the wide one.
void product_with(const Product& job, float* low, int64_t low_stride, const std::vector<Shrink>& parts,
                  int threads);

/// out [rank, n] = scale * sum over rows [begin, end) of low[row, :]^T a[row, :].
struct Reduce {
  cpu::GemmOut out;
  int64_t begin, end, rank;
  float scale;
};
void reduce(const Reduce& job, const float* low, int64_t low_stride, const cpu::Matrix& a, int64_t n,
            const int64_t* rows, const cpu::Dropout& dropout, int threads);

}  // namespace pk
