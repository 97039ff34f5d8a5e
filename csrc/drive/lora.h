// LoRA's merge over threads: rows to a thread at a time, what all threads read packed once.
#pragma once
#include <vector>

#include "../cpu/jobs.h"

namespace pk {

/// Fills weight.out; scale is one number per row or, `by_column`, per column (null: 1). No bit depends on the
/// threads or on which rows of a larger weight these are.
void merge_lora(const cpu::MergeLora& weight, const std::vector<cpu::LowRank>& factors, const float* scale,
                bool by_column, int threads);

/// Sums of squares of weight + the factor's product: [blocks of 4096 columns][rows], or of columns
/// [stretches of 48 rows][cols].
void lora_squares(const cpu::MergeLora& weight, const cpu::LowRank& factor, bool by_column, double* sums,
                  int threads);

}  // namespace pk
