// LoRA's merge over threads: rows to a thread at a time, what all threads read packed once.
#pragma once
#include "../cpu/jobs.h"

namespace pk {

/// Fills job.out; right is [rank, cols], scale one number per row or, `by_column`, per column (null: 1). No
/// bit depends on the threads or on which rows of a larger weight these are.
void merge_lora(cpu::MergeLora job, const float* right, const float* scale, bool by_column, int threads);

/// Sums of squares of weight + left @ right: [blocks of 4096 columns][rows], or of columns
/// [stretches of 48 rows][cols].
void lora_squares(cpu::MergeLora job, const float* right, bool by_column, double* sums, int threads);

}  // namespace pk
