// softmax, log_softmax and logsumexp of rows that stay in the cache: largest element, exponentials, scale.
// Traffic: reads x once, writes out once, as the second and third pass find the row in the cache.
#include "softmax_load.h"

namespace pk::cpu::PK_ISA {
namespace {

/// y = w / sum over a row whose w stand at `from`, in the order of T's load.
template <class T, class O>
PK_IN void scale_row(const float* from, O* out, int64_t n, const Answer& by) {
  const int64_t full = n / kStripe * kStripe;
  for (int64_t i = 0; i < full; i += kStripe) put_stripe<T>(out + i, finished<O>(load_stripe(from + i), by));
  if (full == n) return;
  const Stripe last =
      sizeof(T) == 4 ? load_stripe(Tail<float>(from + full, n - full).x) : load_stripe(from + full);
  put_some<T>(out + full, finished<O>(last, by), int(n - full));
}

/// y = (z - high) - rest.
template <class T, class O>
PK_IN void log_row(const T* z, O* out, int64_t n, const Answer& by) {
  const F high = F::of(by.high), rest = F::of(by.rest);
  each_stripe(z, n, [&](const Stripe& s, int64_t i, int count) PK_ALWAYS {
    put_some<T>(out + i, each(s, [=](F x) PK_ALWAYS { return (x - high) - rest; }), count);
  });
}

/// One row of z = `x` - shift; `scratch` may be `x`.
template <class T, class O>
void row_of(const Softmax& job, const T* x, int64_t row, float shift, float* scratch) {
  const int64_t n = job.n;
  O* out = static_cast<O*>(job.out) + row * (job.kind == kLogSumExp ? 1 : n);
  const float sink = sink_of(job, row, 0);
  const float most = shift != 0 ? 0 : with_sink(largest(x, n), sink);
  Answer answer;
  if (!in_range(most)) {
    if (most - most == 0) {
      load_row(job, row, 0, n, most, scratch);
      return row_of<float, O>(job, scratch, row, most, scratch);
    }
    answer = answer_at_infinity(job, most, has_nan(x, n) || sink != sink);
  } else {
    constexpr int degree = kDegree<O>;
    const int exponent = nearest_exponent(most);
    const Reference at = reference(exponent);
    float* w = sizeof(O) == 4 ? reinterpret_cast<float*>(out) : scratch;
    double total = job.kind == kSoftmax ? exponentials<T, degree, true>(x, w, n, at)
                                        : exponentials<T, 6, false>(x, nullptr, n, at);
    if (job.sink) total += lifted_sink(sink, shift, at);
    if (job.kind == kSoftmax && total == total) return scale_row<T, O>(w, out, n, scales_of(total));
    answer = answer_of(job.kind, total, exponent, shift, most);
  }
  if (job.kind == kLogSumExp) return fill(out, 1, answer.log_sum);
  if (answer.fill != Answer::kCompute) return fill(out, n, filling(job, answer.fill));
  log_row<T, O>(x, out, n, answer);
}

template <class O>
void rows_of(const Softmax& job, int64_t begin, int64_t end, float* scratch) {
  const bool direct = job.plain() && job.dtype == dtype_of<O>();
  for (int64_t row = begin; row < end; row++) {
    if (direct) {
      row_of<O, O>(job, static_cast<const O*>(job.x) + row * job.n, row, 0, scratch);
    } else {
      load_row(job, row, 0, job.n, 0, scratch);
      row_of<float, O>(job, scratch, row, 0, scratch);
    }
  }
}

}  // namespace

void softmax_rows(const Softmax& job, int64_t begin, int64_t end, float* scratch) {
  if (job.out_dtype == kF32) return rows_of<float>(job, begin, end, scratch);
  if (job.out_dtype == kBF16) return rows_of<bf16>(job, begin, end, scratch);
  return rows_of<f16>(job, begin, end, scratch);
}

}  // namespace pk::cpu::PK_ISA
