// A block's way to its tensor: which one, and its numbers in shared memory.
#pragma once
#include "device.h"
#include "jobs.h"

namespace pk::cuda {

template <class V>
__device__ inline void copy_words(void* to, const void* from, int bytes) {
  for (int w = int(threadIdx.x); w < bytes / int(sizeof(V)); w += int(blockDim.x))
    static_cast<V*>(to)[w] = static_cast<const V*>(from)[w];
}

/// Copies the job that owns `tile` into shared memory, with the numbers that only the device knows; all
/// threads must call. Returns the tile's number within its tensor.
__device__ inline int64_t stage(const Table& table, int64_t tile, Job& job) {
  const char* from = reinterpret_cast<const char*>(&table.one);
  if (table.jobs) from = table.jobs + table.owner[tile] * table.stride;
  const int n = reinterpret_cast<const Head*>(from)->n;
  copy_words<uint64_t>(&job, from, int(sizeof(Head)) + n * int(sizeof(Model)));
  __syncthreads();
  const Head& head = job.head;
  if (int(threadIdx.x) < n) {
    Model& model = job.models[threadIdx.x];
    if (head.weights) model.weight = head.weights[threadIdx.x];
    if (head.votes) model.vote = head.votes[threadIdx.x];
    if (head.shares) model.share = head.shares[threadIdx.x];
    if (head.cut_key) {
      model.key = uint32_t(head.cut_key[threadIdx.x]);
      model.last = head.cut_last[threadIdx.x];
    }
  }
  if (threadIdx.x == 0 && head.lambda_at) job.head.lambda = *head.lambda_at;
  __syncthreads();
  return tile - head.first_tile;
}

}  // namespace pk::cuda
