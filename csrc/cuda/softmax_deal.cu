// How rows of softmax are dealt to blocks: by their length, by dtypes and by what the architecture has.
#include <algorithm>

#include "softmax_rows.h"

namespace pk::cuda {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Threads that take eight vectors each, if so many are allowed.
int lanes_for(int64_t vectors, int least, int most) {
  int lanes = least;
  while (lanes < most && vectors > int64_t(lanes) * 8) lanes *= 2;
  return lanes;
}

}  // namespace

Deal deal_of(int64_t rows, int64_t n, int width, int vectors_of_batch, int slot, const Limits& limits) {
  const int64_t vectors = ceil_divide(n, width), bytes = vectors * slot;
  Deal d{};
  d.rows = rows;
  d.parts = d.cluster = 1;
  if (limits.clusters)
    while (d.cluster < kLargestCluster && bytes > d.cluster * regimes.share) d.cluster *= 2;
  d.part = ceil_divide(vectors, d.cluster);
  // Two blocks of half the threads share a multiprocessor: one computes while the other waits for memory.
  d.lanes = lanes_for(d.part, d.cluster > 1 ? 32 : 4,
                      d.part * slot <= regimes.share ? kMostThreads / 2 : kMostThreads);
  d.ring = int(std::min<int64_t>(ceil_divide(d.part, int64_t(d.lanes) * vectors_of_batch), 1 << 20));
  const int64_t most = std::min(limits.shared, regimes.most + kStatesBytes);
  if (shared_of(d, vectors_of_batch, slot) <= most) return d;
  const int64_t longer = ceil_divide(ceil_divide(n, regimes.chunk), regimes.chunks);
  d.cluster = 1;
  // Two parts at least: what does not stay in shared memory has to be read twice.
  d.part = std::min(regimes.chunk * longer / width, ceil_divide(vectors, 2));
  d.parts = ceil_divide(vectors, d.part);
  d.lanes = lanes_for(d.part, 32, kMostThreads / 2);
  d.ring = kAhead;
  while (d.lanes > 32 && shared_of(d, vectors_of_batch, slot) > limits.shared) d.lanes /= 2;
  return d;
}

#ifdef PK_EMULATED
Limits limits_of(int) { return limits; }
#else
Limits limits_of(int device) {
  int shared = 0, clusters = 0;
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  return {shared, clusters != 0};
}
#endif

}  // namespace pk::cuda
