// Gradients of softmax, y * (g - sum(g * y)), and of log_softmax, g - e^y * sum(g).
// Traffic: reads grad and y once and writes out once while a row (or sixteen columns of 4096 rows) stays in
// the cache; what is longer is read twice. Sums as in softmax.h: 32 lanes in float, blocks in double.
#include "softmax_tile.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr float kLeast = -104;  // e^y is 0 in float below

/// e^y for y <= 0, also where that is denormal, times `sum`. It is lifted by 2^26, no more than keeps it
/// normal: `sum` is scaled down by as much, and digits of a small one must survive that.
PK_IN F exp_times(F y, F sum) {
  const Reference at = reference(kLift - 26, kLift - 26 + 151);
  const F w = lifted_exp<6>(y, F::of(at.magic), F::of(at.low));
  return select(less(y, F::of(kLeast)), F::of(0), w) * (sum * F::of(0x1p-26f));
}
PK_IN F summand(bool log, F lane, F g, F y) { return log ? lane + g : fma(g, y, lane); }
PK_IN F gradient(bool log, F g, F y, F sum, F scale) {
  return canonical((log ? g - exp_times(y, sum) : y * (g - sum)) * scale);
}

template <class T, class Body>
PK_IN void each_two(const T* g, const T* y, int64_t n, Body&& body) {
  const int64_t full = n / kStripe * kStripe;
  for (int64_t i = 0; i < full; i += kStripe) {
    body(load_stripe(g + i), load_stripe(y + i), i, kStripe);
  }
  if (full == n) return;
  const int some = int(n - full);
  body(load_some(g + full, some, T{}), load_some(y + full, some, T{}), full, some);
}

template <bool log, class T>
PK_IN double sum_block(const T* g, const T* y, int64_t n) {
  Stripe sum = Stripe::of(0);
  each_two(g, y, n, [&](const Stripe& a, const Stripe& b, int64_t, int) PK_ALWAYS {
    for (int k = 0; k < kPairs; k++) {
      Pair& to = sum.p[k];
      to = {summand(log, to.a, a.p[k].a, b.p[k].a), summand(log, to.b, a.p[k].b, b.p[k].b)};
    }
  });
  Lanes<T> lanes;
  lanes.add(sum);
  return lanes.total();
}

/// What lies `ahead` bytes behind each element is fetched: the next row, while this one is written.
template <bool log, class T, class O>
PK_IN void write_block(const T* g, const T* y, O* out, int64_t n, float sum, float scale, int64_t ahead,
                       bool stream) {
  const F s = F::of(sum), by = F::of(scale);
  each_two(g, y, n, [&](const Stripe& a, const Stripe& b, int64_t i, int count) PK_ALWAYS {
    fetch(reinterpret_cast<const char*>(g + i) + ahead, kStripe * int64_t(sizeof(T)));
    fetch(reinterpret_cast<const char*>(y + i) + ahead, kStripe * int64_t(sizeof(T)));
    Stripe d;
    for (int k = 0; k < kPairs; k++)
      d.p[k] = {gradient(log, a.p[k].a, b.p[k].a, s, by), gradient(log, a.p[k].b, b.p[k].b, s, by)};
    put_some<T>(out + i, d, count, stream);
  });
}

/// Calls body(g, y, begin, count) for blocks of elements [begin, end) of a row: as they are where all dtypes
/// are one, else as floats.
template <class O, class Body>
PK_IN void each_pair_of_blocks(const SoftmaxBackward& job, int64_t row, int64_t begin, int64_t end,
                               Body&& body) {
  const bool direct = job.dtype == dtype_of<O>() && job.grad_dtype == job.dtype;
  alignas(64) float g[kBlock + kSlack], y[kBlock + kSlack];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock, at = row * job.n + i;
    if (direct) {
      body(static_cast<const O*>(job.grad) + at, static_cast<const O*>(job.y) + at, i, count);
    } else {
      widen_any(job.grad_dtype, job.grad, at, count, g);
      widen_any(job.dtype, job.y, at, count, y);
      body(static_cast<const float*>(g), static_cast<const float*>(y), i, count);
    }
  }
}

template <class O>
double sum_of(const SoftmaxBackward& job, int64_t row, int64_t begin, int64_t end) {
  double total = 0;
  each_pair_of_blocks<O>(job, row, begin, end, [&](auto* g, auto* y, int64_t, int64_t count) {
    total += job.kind == kSoftmax ? sum_block<false>(g, y, count) : sum_block<true>(g, y, count);
  });
  return total;
}

template <class O>
void write_of(const SoftmaxBackward& job, int64_t row, int64_t begin, int64_t end, float sum) {
  O* out = static_cast<O*>(job.out) + row * job.n;
  const int64_t next = job.n * int64_t(sizeof(O)), ahead = job.n <= kBlock && next > kAhead ? next : kAhead;
  each_pair_of_blocks<O>(job, row, begin, end, [&](auto* g, auto* y, int64_t i, int64_t count) {
    if (job.kind == kSoftmax)
      write_block<false>(g, y, out + i, count, sum, job.scale, ahead, job.stream);
    else
      write_block<true>(g, y, out + i, count, sum, job.scale, ahead, job.stream);
  });
}

template <class O>
void rows_of(const SoftmaxBackward& job, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++)
    write_of<O>(job, row, 0, job.n, float(sum_of<O>(job, row, 0, job.n)));
  if (job.stream) fence();
}

/// One row of sixteen (fewer: zeros behind) columns as floats.
PK_IN void load_few(int dtype, const void* data, int64_t at, int width, float* to) {
  memset(to, 0, kWidth * sizeof(float));
  widen_any(dtype, data, at, width, to);
}

void column_block(const SoftmaxBackward& job, int64_t at, int width, int64_t rows, float* g, float* y) {
  for (int64_t i = 0; i < rows; i++) {
    load_few(job.grad_dtype, job.grad, at + i * job.inner, width, g + i * kWidth);
    load_few(job.dtype, job.y, at + i * job.inner, width, y + i * kWidth);
  }
}

void sum_columns(bool log, const float* g, const float* y, int64_t rows, double* total) {
  alignas(64) float lanes[kStripe][kWidth] = {};
  for (int64_t i = 0; i < rows; i++)
    for (int p = 0; p < kWidth; p += kLanes) {
      float* lane = lanes[i % kStripe] + p;
      const int64_t at = i * kWidth + p;
      store(lane, summand(log, load_floats(lane), load_floats(g + at), load_floats(y + at)));
    }
  add_lanes(lanes, total);
}

template <class O>
void write_columns(const SoftmaxBackward& job, int64_t at, int width, int64_t rows, const float* g,
                   const float* y, const float* sum) {
  const F scale = F::of(job.scale);
  for (int64_t i = 0; i < rows; i++) {
    F d[kParts];
    for (int k = 0; k < kParts; k++) {
      const int64_t from = i * kWidth + k * kLanes;
      d[k] = gradient(job.kind == kLogSoftmax, load_floats(g + from), load_floats(y + from),
                      load_floats(sum + k * kLanes), scale);
    }
    put_row(static_cast<O*>(job.out) + at + i * job.inner, d, width);
  }
}

template <class O>
void columns_of(const SoftmaxBackward& job, int64_t outer, int64_t first, float* scratch) {
  const int64_t left = job.inner - first, n = job.n;
  const int width = int(left < kWidth ? left : kWidth);
  float *g = scratch, *y = scratch + kColumnRows * kWidth + kSlack;
  double total[kWidth] = {}, before[kWidth] = {};
  const auto rows_at = [&](int64_t i) { return n - i < kColumnRows ? n - i : kColumnRows; };
  const auto flat = [&](int64_t i) { return (outer * n + i) * job.inner + first; };
  for (int64_t i = 0; i < n; i += kColumnRows) {
    column_block(job, flat(i), width, rows_at(i), g, y);
    for (int c = 0; i % kSplit == 0 && c < kWidth; c++) {
      before[c] += total[c];
      total[c] = 0;
    }
    sum_columns(job.kind == kLogSoftmax, g, y, rows_at(i), total);
  }
  alignas(64) float sum[kWidth];
  for (int c = 0; c < kWidth; c++) sum[c] = float(before[c] + total[c]);
  for (int64_t i = 0; i < n; i += kColumnRows) {
    if (n > kColumnRows) column_block(job, flat(i), width, rows_at(i), g, y);
    write_columns<O>(job, flat(i), width, rows_at(i), g, y, sum);
  }
}

}  // namespace

double softmax_backward_sum(const SoftmaxBackward& job, int64_t row, int64_t begin, int64_t end) {
  if (job.out_dtype == kF32) return sum_of<float>(job, row, begin, end);
  if (job.out_dtype == kBF16) return sum_of<bf16>(job, row, begin, end);
  return sum_of<f16>(job, row, begin, end);
}

void softmax_backward_write(const SoftmaxBackward& job, int64_t row, int64_t begin, int64_t end, float sum) {
  if (job.out_dtype == kF32) {
    write_of<float>(job, row, begin, end, sum);
    if (job.stream) fence();
    return;
  }
  if (job.out_dtype == kBF16) return write_of<bf16>(job, row, begin, end, sum);
  return write_of<f16>(job, row, begin, end, sum);
}

void softmax_backward_rows(const SoftmaxBackward& job, int64_t begin, int64_t end) {
  if (job.out_dtype == kF32) return rows_of<float>(job, begin, end);
  if (job.out_dtype == kBF16) return rows_of<bf16>(job, begin, end);
  return rows_of<f16>(job, begin, end);
}

void softmax_backward_columns(const SoftmaxBackward& job, int64_t outer, int64_t first, float* scratch) {
  if (job.out_dtype == kF32) return columns_of<float>(job, outer, first, scratch);
  if (job.out_dtype == kBF16) return columns_of<bf16>(job, outer, first, scratch);
  return columns_of<f16>(job, outer, first, scratch);
}

}  // namespace pk::cpu::PK_ISA
