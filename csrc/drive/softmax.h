// Softmax and its kin over threads: rows or columns to a thread each, or one long row to all of them.
#pragma once
#include "../cpu/softmax_jobs.h"

namespace pk {

/// Which form runs depends on shape and dtypes alone, and no bit of the result on it or on the threads.
void softmax(const cpu::Softmax& job, int threads);
void softmax_backward(const cpu::SoftmaxBackward& job, int threads);

}  // namespace pk
