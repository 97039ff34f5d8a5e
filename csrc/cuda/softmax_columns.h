// Reductions over a dimension that is not the last: a warp takes neighbouring columns, so that what it reads
// is neighbours too, and the warps of a block take the rows in turn.
// A column that is read a second time comes from the caches while its block's 32 columns fit there.
#pragma once
#include "softmax_load.h"

namespace pk::cuda {

constexpr int kColumnThreads = 256, kColumnWarps = kColumnThreads / 32;
constexpr int kColumnStep = kColumnWarps * kBatch;  // rows that a block takes at a time

/// A column's chunk, as one of the threads that share it sees it.
template <class Job>
struct Column {
  const Job& job;
  int64_t outer, inner, begin, end;
  int warp;

  __device__ int64_t row(int64_t i, int j) const { return i + j * kColumnWarps + warp; }
  __device__ bool has(int64_t i, int j) const { return row(i, j) < end; }
  __device__ int64_t flat(int64_t i, int j) const {  // one product for all j
    return (outer * job.n + i + warp) * job.inner + inner + j * (kColumnWarps * job.inner);
  }
};

struct ColumnDeal {
  int stage;
  int64_t columns, chunk, chunks;
  void* scratch;  // [columns][chunks] states
};

inline ColumnDeal deal_columns(int64_t columns, int64_t n) {
  const int64_t least = regimes.column_chunk, chunks = n > least ? (n + least - 1) / least : 1;
  ColumnDeal d{kWhole, columns, least * ((chunks + regimes.chunks - 1) / regimes.chunks), 1, nullptr};
  d.chunks = n > d.chunk ? (n + d.chunk - 1) / d.chunk : 1;
  return d;
}
template <class State>
int64_t columns_scratch(int64_t columns, int64_t n) {
  const ColumnDeal d = deal_columns(columns, n);
  return d.chunks > 1 ? columns * d.chunks * int64_t(sizeof(State)) : 0;
}

template <class Op>
__global__ void __launch_bounds__(kColumnThreads, 2)
    columns(const __grid_constant__ typename Op::Job job, const __grid_constant__ ColumnDeal deal) {
  using State = typename Op::State;
  PK_DYNAMIC_SHARED(char, held);
  State* states = reinterpret_cast<State*>(held);  // [warps][32]
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
  const int64_t index = blockIdx.x % deal.chunks, column = blockIdx.x / deal.chunks * 32 + lane;
  const bool active = column < deal.columns;
  const int64_t begin = index * deal.chunk, stop = begin + deal.chunk < job.n ? begin + deal.chunk : job.n;
  const Column<typename Op::Job> at{job,   active ? column / job.inner : 0, active ? column % job.inner : 0,
                                    begin, active ? stop : begin,           warp};
  State* chunks = static_cast<State*>(deal.scratch) + column * deal.chunks;
  State s = State::none();
  if (deal.stage == kFinish) {
    for (int64_t c = 0; active && c < deal.chunks; c++) s = State::joined(s, chunks[c]);
  } else {
    states[warp * 32 + lane] = Op::sum(at);
    __syncthreads();
    for (int w = 0; w < kColumnWarps; w++) s = State::joined(s, states[w * 32 + lane]);
    if (deal.stage == kSums) {
      if (active && warp == 0) chunks[index] = s;
      return;
    }
  }
  if (active) Op::write(at, s, index == 0 && warp == 0);
}

template <class Op>
void run_columns(const typename Op::Job& job, void* scratch, cudaStream_t stream) {
  ColumnDeal d = deal_columns(job.outer * job.inner, job.n);
  d.scratch = scratch;
  const int64_t blocks = (d.columns + 31) / 32 * d.chunks;
  for (int stage = d.chunks > 1 ? kSums : kWhole; stage <= (d.chunks > 1 ? kFinish : kWhole); stage++) {
    d.stage = stage;
    launch(columns<Op>, dim3(unsigned(blocks)), kColumnThreads, kColumnThreads * sizeof(typename Op::State),
           stream, job, d);
  }
}

}  // namespace pk::cuda
