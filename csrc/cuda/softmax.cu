// softmax, log_softmax and logsumexp.
// Traffic: rows of up to 1.6 MB (without clusters of blocks: as much as a block's shared memory) and columns
// that one block takes: reads x once, writes out once. Longer ones: reads x twice. A mask is read as often as
// softmax or log_softmax goes over the row, which is twice.
#include "softmax_columns.h"
#include "softmax_rows.h"

namespace pk::cuda {
namespace {

__device__ __forceinline__ bool is_coarse(const Softmax& job) {
  return job.kind == kSoftmax && job.out_dtype != kF32;
}

/// Rows of T, float or Half. kWidth: elements of a vector; kVectors: vectors of a batch.
template <class T>
struct Forward {
  using Job = Softmax;
  using State = RowSum;
  static constexpr int kWidth = kWide<T>, kVectors = kVectorsOf<T>, kBlocks = 1;
  struct Batch {
    float z[kBatch];
  };
  PK_HD static int regions(const Job&) { return 1; }
  __device__ static __forceinline__ void fetch(const Job& job, int64_t row, int64_t v, char* to, int64_t) {
    const int64_t i = v * kWidth, left = job.n - i;
    T nothing;
    set_least(job.dtype, &nothing);
    pk::cuda::fetch<T>(to, job.x, row * job.n + i, int(left < kWidth ? left : kWidth), job.aligned, nothing);
  }
  __device__ static __forceinline__ void read(const Job& job, Batch& batch, int j, bool there,
                                              const char* from, int64_t) {
    if (there) return widen_vector<T>(job.dtype, from, batch.z + j * kWidth);
#pragma unroll
    for (int k = 0; k < kWidth; k++) batch.z[j * kWidth + k] = kMinusInfinity;
  }
  __device__ static __forceinline__ void options(const Part<Forward>& part, int b, Batch& batch) {
    const Job& job = part.job;
    if (job.plain) return;
    const auto at = [&](int j) -> int64_t {
      const int64_t v = part.vector(b, j / kWidth), i = v * kWidth + j % kWidth;
      return v < part.end && i < job.n ? part.row * job.mask_stride[0] + i * job.mask_stride[1] : -1;
    };
    apply_options(job, at, batch.z);
  }
  __device__ static __forceinline__ State sum(const Part<Forward>& part) {
    Adder adder(is_coarse(part.job));
    part.walk(true, [&](int b, Batch& batch) {
      options(part, b, batch);
      adder.add(batch.z);
    });
    return adder.sum();
  }
  __device__ static __forceinline__ void write(const Part<Forward>& part, State s, bool copying, bool first) {
    const Job& job = part.job;
    if (job.sink) s = State::joined(s, State::of_sink(job.sink[part.row * job.sink_stride[0]]));
    const Answer by = answer_of(job, s);
    if (job.kind == kLogSumExp) {
      if (first) put_one(job.out_dtype, job.out, part.row, by.log_sum);
      return;
    }
    const bool coarse = is_coarse(job);
    part.walk(copying, [&](int b, Batch& batch) {
      options(part, b, batch);
      answers(job, by, coarse, batch.z);
#pragma unroll
      for (int j = 0; j < kVectors; j++)
        if (const int64_t v = part.vector(b, j); v < part.end) {
          const int64_t i = v * kWidth, left = job.n - i;
          put<kWidth>(job.out_dtype, job.out, part.row * job.n + i, batch.z + j * kWidth,
                      int(left < kWidth ? left : kWidth), job.out_aligned, by.fill == Answer::kCompute);
        }
    });
  }
};

struct ForwardColumns {
  using Job = Softmax;
  using State = RowSum;
  struct Batch {
    float z[kBatch];
  };
  __device__ static __forceinline__ void read(const Column<Job>& at, int64_t i, Batch& batch) {
    const Job& job = at.job;
#pragma unroll
    for (int j = 0; j < kBatch; j++)
      batch.z[j] = at.has(i, j) ? float_at(job.dtype, job.x, at.flat(i, j), job.aligned) : kMinusInfinity;
    if (job.plain) return;
    const int64_t start = at.outer * job.mask_stride[0] + at.inner * job.mask_stride[2];
    const auto mask_at = [&](int j) -> int64_t {
      return at.has(i, j) ? start + at.row(i, j) * job.mask_stride[1] : -1;
    };
    apply_options(job, mask_at, batch.z);
  }
  __device__ static __forceinline__ State sum(const Column<Job>& at) {
    Adder adder(is_coarse(at.job));
    for (int64_t i = at.begin; i < at.end; i += kColumnStep) {
      Batch batch;
      read(at, i, batch);
      adder.add(batch.z);
    }
    return adder.sum();
  }
  __device__ static __forceinline__ void write(const Column<Job>& at, State s, bool first) {
    const Job& job = at.job;
    if (job.sink)
      s = State::joined(
          s, State::of_sink(job.sink[at.outer * job.sink_stride[0] + at.inner * job.sink_stride[1]]));
    const Answer by = answer_of(job, s);
    if (job.kind == kLogSumExp) {
      if (first) put_one(job.out_dtype, job.out, at.outer * job.inner + at.inner, by.log_sum);
      return;
    }
    for (int64_t i = at.begin; i < at.end; i += kColumnStep) {
      Batch batch;
      read(at, i, batch);
      answers(job, by, is_coarse(job), batch.z);
#pragma unroll
      for (int j = 0; j < kBatch; j++)
        if (at.has(i, j)) put_one(job.out_dtype, job.out, at.flat(i, j), batch.z[j]);
    }
  }
};

}  // namespace

int64_t softmax_scratch(const Softmax& job, int device) {
  if (job.inner > 1) return columns_scratch<RowSum>(job.outer * job.inner, job.n);
  const Deal d =
      job.dtype == kF32 ? deal_rows<Forward<float>>(job, device) : deal_rows<Forward<Half>>(job, device);
  return d.parts > 1 ? d.rows * d.parts * int64_t(sizeof(RowSum)) : 0;
}

void softmax(const Softmax& job, void* scratch, int device, cudaStream_t stream) {
  if (job.outer * job.inner == 0 || (job.n == 0 && job.kind != kLogSumExp)) return;
  if (job.inner > 1) return run_columns<ForwardColumns>(job, scratch, stream);
  if (job.dtype == kF32) return run_rows<Forward<float>>(job, scratch, device, stream);
  run_rows<Forward<Half>>(job, scratch, device, stream);
}

}  // namespace pk::cuda
