// softmax, log_softmax and logsumexp of rows that stay in the cache: largest element, exponentials, scale.
// Traffic: reads x once, writes out once, as the second and third pass find the row in the cache. What the
// next rows are is fetched while exponentials are computed, so that neither waits for the other.
//
// Short rows go several at a time, pass by pass: within one row each pass waits for the last sum or maximum.
#include "softmax_load.h"

namespace pk::cpu::PK_ISA {
namespace {

/// y = (z - high) - rest.
template <class T, class O>
PK_IN void log_row(const T* z, O* out, int64_t n, const Answer& by, bool stream) {
  const Stripe high = Stripe::of(by.high), rest = Stripe::of(by.rest);
  each_stripe(z, n, [&](const Stripe& s, int64_t i, int count) PK_ALWAYS {
    put_some<T>(out + i, (s - high) - rest, count, stream);
  });
}

/// What the passes over a row know of it.
struct Row {
  float most;
  int exponent;
  double total;
};

template <class T, class O>
PK_IN void finish(const Softmax& job, const Answer& by, const T* x, const float* w, O* out, bool stream) {
  if (job.kind == kLogSumExp) return fill(out, 1, by.log_sum);
  if (by.fill != Answer::kCompute) return fill(out, job.n, filling(job, by.fill));
  if (job.kind == kSoftmax) return scale_row<T>(w, out, job.n, by, stream);
  log_row(x, out, job.n, by, stream);
}

template <class O>
PK_IN O* result_of(const Softmax& job, int64_t row) {
  return static_cast<O*>(job.out) + row * (job.kind == kLogSumExp ? 1 : job.n);
}

template <class T, class O>
PK_IN void finish_row(const Softmax& job, int64_t at, const T* x, const float* w, float shift,
                      const Row& row) {
  O* out = result_of<O>(job, at);
  const bool plain = job.kind == kSoftmax && row.total == row.total;
  const Answer by =
      plain ? scales_of(row.total) : answer_of(job.kind, row.total, row.exponent, shift, row.most);
  finish(job, by, x, w, out, job.stream);
}

/// Where a row's exponentials wait: in its result if they may, as the cache holds one row less then.
template <class O>
PK_IN float* place_of(const Softmax& job, int64_t row, float* scratch) {
  if (sizeof(O) != 4 || job.stream) return scratch;
  return reinterpret_cast<float*>(result_of<O>(job, row));
}

/// How far ahead the rows' elements, of T, are fetched: no less than what goes together.
template <class T>
PK_IN int64_t ahead_of(const Softmax& job, int64_t together) {
  const int64_t row = job.n * int64_t(sizeof(T));
  return job.outer * row <= kNear ? 0 : together * row < kAhead ? kAhead : together * row;
}

/// One row of z = `x` - shift; `scratch` may be `x`.
template <class T, class O>
void row_of(const Softmax& job, const T* x, int64_t at, float shift, float* scratch) {
  const float sink = sink_of(job, at, 0);
  Row row{shift != 0 ? 0 : with_sink(largest(x, job.n), sink), 0, 0};
  if (in_range(row.most)) {
    float* w = place_of<O>(job, at, scratch);
    row.exponent = nearest_exponent(row.most);
    const Reference by = reference(row.exponent);
    const int64_t ahead = ahead_of<T>(job, 0);
    row.total = job.kind == kSoftmax ? exponentials<T, kDegree<O>, true>(x, w, job.n, by, ahead)
                                     : exponentials<T, 6, false>(x, nullptr, job.n, by, ahead);
    if (job.sink) row.total += lifted_sink(sink, shift, by);
    return finish_row<T, O>(job, at, x, w, shift, row);
  }
  if (row.most - row.most == 0) {
    load_row(job, at, 0, job.n, row.most, scratch);
    return row_of<float, O>(job, scratch, at, row.most, scratch);
  }
  const Answer by = answer_at_infinity(job, row.most, has_nan(x, job.n) || sink != sink);
  finish<T, O>(job, by, x, scratch, result_of<O>(job, at), false);
}

/// `count` rows of one block that need neither to be loaded nor a sink.
template <class O>
void rows_together(const Softmax& job, int64_t first, int count, float* scratch) {
  const int64_t n = job.n, stride = (n + kStripe - 1) / kStripe * kStripe;
  const int64_t ahead = ahead_of<O>(job, count);
  const O* x = static_cast<const O*>(job.x) + first * n;
  float most[kTogether] = {};
  bool usual = true;
  for (int r = 0; r < count; r++) {
    most[r] = largest(x + r * n, n);
    usual &= in_range(most[r]);
  }
  if (__builtin_expect(!usual, 0)) {
    for (int r = 0; r < count; r++) row_of<O, O>(job, x + r * n, first + r, 0, scratch);
    return;
  }
  int exponent[kTogether];
  Reference at[kTogether];
  for (int r = 0; r < kTogether; r++) {  // lanes for a compiler
    exponent[r] = nearest_exponent(most[r]);
    at[r] = reference(exponent[r]);
  }
  Stripe lanes[kTogether];
  float* w[kTogether];
  for (int r = 0; r < count; r++) {
    w[r] = place_of<O>(job, first + r, scratch + r * stride);
    lanes[r] = job.kind == kSoftmax
                   ? exponentials_of_block<O, kDegree<O>, true>(x + r * n, w[r], n, at[r], ahead)
                   : exponentials_of_block<O, 6, false>(x + r * n, nullptr, n, at[r], ahead);
  }
  double total[kTogether];
  for (int r = 0; r < count; r++) total[r] = tree<O>(lanes[r]);
  for (int r = 0; r < count; r++)
    finish_row<O, O>(job, first + r, x + r * n, w[r], 0, {most[r], exponent[r], total[r]});
}

template <class O>
void rows_of(const Softmax& job, int64_t begin, int64_t end, float* scratch) {
  const bool direct = job.plain() && job.dtype == dtype_of<O>();
  if (direct && !job.sink && job.n <= kBlock) {
    const int64_t fit = kTogetherFloats / (job.n + kStripe), most = fit < 1           ? 1
                                                                    : fit < kTogether ? fit
                                                                                      : kTogether;
    for (int64_t row = begin; row < end; row += most)
      rows_together<O>(job, row, int(end - row < most ? end - row : most), scratch);
  } else {
    for (int64_t row = begin; row < end; row++) {
      if (direct) {
        row_of<O, O>(job, static_cast<const O*>(job.x) + row * job.n, row, 0, scratch);
      } else {
        load_row(job, row, 0, job.n, 0, scratch);
        row_of<float, O>(job, scratch, row, 0, scratch);
      }
    }
  }
  if (job.stream) fence();
}

}  // namespace

void softmax_rows(const Softmax& job, int64_t begin, int64_t end, float* scratch) {
  if (job.out_dtype == kF32) return rows_of<float>(job, begin, end, scratch);
  if (job.out_dtype == kBF16) return rows_of<bf16>(job, begin, end, scratch);
  return rows_of<f16>(job, begin, end, scratch);
}

}  // namespace pk::cpu::PK_ISA
