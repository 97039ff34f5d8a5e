// Rows along the last dimension: each is read once where it stays on chip, else twice.
//
// A row belongs to a few lanes of a warp, to a block, to a cluster of blocks, or chunk by chunk to the whole
// grid. A thread copies its vectors to shared memory, several in flight, and is the only one to read them
// there: shared memory stands for registers. Which thread takes which vector follows from the row's length
// alone, and so do the order of all sums and the bits of the result.
#pragma once
#include "softmax_load.h"

namespace pk::cuda {

constexpr int kAhead = 4;  // batches in flight
constexpr int kStates = kMostThreads / 32 + 1;
constexpr int kStatesBytes = 512;  // of shared memory, before the vectors

/// The part of a row that one block has, as one of its threads sees it. Op: see softmax.cu.
template <class Op>
struct Part {
  const typename Op::Job& job;
  int64_t row, begin, end;  // in vectors
  int lane, lanes, ring, batches;
  char* mine;    // this thread's first vector in shared memory
  int64_t step;  // bytes to its next

  __device__ int64_t vector(int batch, int j) const {
    return begin + (int64_t(batch) * Op::kVectors + j) * lanes + lane;
  }
  __device__ char* place(int slot, int j) const {
    return mine + (int64_t(slot) * Op::kVectors + j) * (Op::regions(job) * step);
  }
  __device__ __forceinline__ void fetch(int batch, int slot) const {
#pragma unroll
    for (int j = 0; j < Op::kVectors; j++)
      if (const int64_t v = vector(batch, j); v < end) Op::fetch(job, row, v, place(slot, j), step);
  }
  /// Calls body(batch's number, its data); `copying`: from global memory, else shared memory still has all.
  template <class Body>
  __device__ __forceinline__ void walk(bool copying, Body&& body) const {
    if (copying)
      for (int b = 0; b < kAhead; b++) {
        if (b < batches) fetch(b, b);
        commit_copies();
      }
    for (int b = 0, slot = 0; b < batches; b++) {
      if (copying) wait_copies<kAhead - 1>();
      typename Op::Batch batch;
#pragma unroll
      for (int j = 0; j < Op::kVectors; j++)
        Op::read(job, batch, j, vector(b, j) < end, place(slot, j), step);
      body(b, batch);
      if (copying) {  // into the place just read where the ring is no longer than what is in flight
        const int next = slot + kAhead < ring ? slot + kAhead : slot + kAhead - ring;
        if (b + kAhead < batches) fetch(b + kAhead, next);
        commit_copies();
      }
      slot = slot + 1 < ring ? slot + 1 : 0;
    }
  }
};

/// The states of `count` neighbouring lanes (a power of two), joined; every lane gets the same bits.
template <class State>
__device__ __forceinline__ State join_lanes(State s, int count) {
  for (int d = 1; d < count; d *= 2) s = State::joined(s, s.of_lane(d));
  return s;
}

/// The states of the threads of a block, joined; `states`: shared memory for one per warp.
template <class State>
__device__ __forceinline__ State join_block(State s, State* states) {
  const int lane = int(threadIdx.x % 32), warps = int(blockDim.x / 32);
  s = join_lanes(s, 32);
  if (lane == 0) states[threadIdx.x / 32] = s;
  __syncthreads();
  return join_lanes(lane < warps ? states[lane] : State::none(), 32);
}

/// The states of a cluster's blocks. Ends with an arrival at the cluster's barrier: whoever calls must wait
/// there before leaving, as others may still read this block's memory.
template <class State>
__device__ __forceinline__ State join_cluster(State s, State* place, int cluster) {
  const int lane = int(threadIdx.x % 32);
  if (threadIdx.x == 0) *place = s;
  cluster_arrive();
  cluster_wait();
  s = lane < cluster ? *of_block(place, lane) : State::none();
  s = join_lanes(s, 32);
  cluster_leave();
  return s;
}

/// The states of a row's parts, which an earlier launch left.
template <class State>
__device__ __forceinline__ State join_parts(const State* parts, int64_t count) {
  State s = State::none();
  for (int64_t c = threadIdx.x % 32; c < count; c += 32) s = State::joined(s, parts[c]);
  return join_lanes(s, 32);
}

template <class Op>
__global__ void __launch_bounds__(kMostThreads, Op::kBlocks)
    rows(const __grid_constant__ typename Op::Job job, const __grid_constant__ Deal deal) {
  using State = typename Op::State;
  PK_DYNAMIC_SHARED(char, held);
  State* states = reinterpret_cast<State*>(held);
  static_assert(kStates * sizeof(State) <= kStatesBytes, "room for a state per warp and one per block");
  const bool whole = deal.stage == kWhole;
  // Divisions of 64 bits would cost a short row more than its exponentials.
  const unsigned groups = whole ? unsigned(deal.cluster) : unsigned(deal.parts), lanes = unsigned(deal.lanes);
  const unsigned first = blockIdx.x / groups, index = blockIdx.x % groups;
  const int64_t vectors = (job.n + Op::kWidth - 1) / Op::kWidth;
  const int64_t row = int64_t(first) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const int64_t begin = index * deal.part, stop = begin + deal.part < vectors ? begin + deal.part : vectors;
  const int64_t end = row < deal.rows ? stop : begin;
  const unsigned batch = lanes * Op::kVectors;
  const Part<Op> part{job,
                      row,
                      begin,
                      end,
                      int(threadIdx.x % lanes),
                      deal.lanes,
                      deal.ring,
                      end > begin ? int((unsigned(end - begin) + batch - 1) / batch) : 0,
                      held + kStatesBytes + threadIdx.x * 16,
                      int64_t(blockDim.x) * 16};
  State* parts = static_cast<State*>(deal.scratch) + row * deal.parts;
  State s = State::none();
  if (deal.stage != kFinish) {
    s = Op::sum(part);
    s = deal.lanes > 32 ? join_block(s, states) : join_lanes(s, deal.lanes);
    if (deal.stage == kSums) {
      if (threadIdx.x == 0) parts[index] = s;
      return;
    }
    if (deal.cluster > 1) s = join_cluster(s, states + kStates - 1, deal.cluster);
  } else {
    s = join_parts(parts, deal.parts);
  }
  if (row < deal.rows) Op::write(part, s, !whole, index == 0 && part.lane == 0);
  if (deal.cluster > 1) cluster_wait();
}

/// What the length of a row and the dtypes decide. `slot`: bytes of shared memory of a vector.
Deal deal_of(int64_t rows, int64_t n, int width, int vectors_of_batch, int slot, const Limits&);

inline int threads_of(const Deal& d) {
  return d.lanes <= 32 && d.cluster == 1 && d.parts == 1 ? kFewThreads : d.lanes;
}

/// Bytes of shared memory of a block.
inline int64_t shared_of(const Deal& d, int vectors_of_batch, int slot) {
  return kStatesBytes + int64_t(d.ring) * vectors_of_batch * threads_of(d) * slot;
}

template <class Op>
Deal deal_rows(const typename Op::Job& job, int device) {
  return deal_of(job.outer, job.n, Op::kWidth, Op::kVectors, 16 * Op::regions(job), limits_of(device));
}

template <class Op>
void run_rows(const typename Op::Job& job, void* scratch, int device, cudaStream_t stream) {
  const int64_t most = limits_of(device).shared;
  Deal d = deal_rows<Op>(job, device);
  d.scratch = scratch;
  const int threads = threads_of(d), each = threads / d.lanes;
  const size_t shared = size_t(shared_of(d, Op::kVectors, 16 * Op::regions(job)));
  const int64_t blocks = (d.rows + each - 1) / each * d.cluster * d.parts;
  for (int stage = d.parts > 1 ? kSums : kWhole; stage <= (d.parts > 1 ? kFinish : kWhole); stage++) {
    d.stage = stage;
    launch_clusters(rows<Op>, dim3(unsigned(blocks)), threads, shared, most, d.cluster, stream, job, d);
  }
}

}  // namespace pk::cuda
