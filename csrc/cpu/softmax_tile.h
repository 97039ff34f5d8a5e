// Columns side by side, for reductions over a dimension that is not the last: sixteen, or all where fewer.
#pragma once
#include "softmax_load.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kWidth = int(kColumns);
constexpr int kParts = kWidth / kLanes;

/// The 32 virtual lanes of each column, added up in double by the tree of softmax.h.
PK_IN void add_lanes(const float (&lanes)[kStripe][kWidth], double* total) {
  double sum[kStripe / 2][kWidth];
  for (int l = 0; l < kStripe / 2; l++)
    for (int c = 0; c < kWidth; c++) sum[l][c] = double(lanes[l][c]) + double(lanes[l + kStripe / 2][c]);
  for (int width = kStripe / 4; width > 0; width /= 2)
    for (int l = 0; l < width; l++)
      for (int c = 0; c < kWidth; c++) sum[l][c] += sum[l + width][c];
  for (int c = 0; c < kWidth; c++) total[c] += sum[0][c];
}

/// Sixteen floats to the first `width` elements of a row of O.
template <class O>
PK_IN void put_row(O* out, const F (&y)[kParts], int width) {
  if (kGroup <= kWidth && width == kWidth) {
    for (int k = 0; k < kParts; k += 2) {
      const Pair pair{canonical(y[k]), canonical(y[(k + 1) % kParts])};
      put(out + k * kLanes, kParted<O> ? part(pair) : pair, false);
    }
    return;
  }
  alignas(64) float wide[kStripe];
  for (int k = 0; k < kParts; k++) store(wide + k * kLanes, canonical(y[k]));
  put_some<float>(out, load_stripe(wide), width);
}

/// What a row has once, sixteen times.
struct alignas(64) State {
  float most[kWidth], shift[kWidth], magic[kWidth], low[kWidth];
  float inverse[kWidth], lowered[kWidth], limit[kWidth], floor[kWidth], high[kWidth], rest[kWidth];
  float log_sum[kWidth];
  double total[kWidth], before[kWidth];
  int exponent[kWidth];
  bool nan[kWidth];
};

struct Place {
  int64_t outer, first;
  int width;
};

/// Exponents from the largest elements; whether a column has to be shifted, or has no exponent at all.
struct Needs {
  bool shift, infinite;
};
inline Needs choose(const Softmax& job, Place at, State& state) {
  Needs needs{false, false};
  for (int c = 0; c < kWidth; c++) {
    const float most = c < at.width ? with_sink(state.most[c], sink_of(job, at.outer, at.first + c)) : 0;
    state.most[c] = most;
    const bool finite = most - most == 0;
    state.shift[c] = finite && !in_range(most) ? most : 0;
    needs.shift |= state.shift[c] != 0;
    needs.infinite |= !finite;
    state.exponent[c] = in_range(most) ? nearest_exponent(most) : 0;
    const Reference r = reference(state.exponent[c]);
    state.magic[c] = r.magic;
    state.low[c] = r.low;
    state.total[c] = state.before[c] = 0;
    state.nan[c] = false;
  }
  return needs;
}

inline void conclude(const Softmax& job, Place at, State& state) {
  for (int c = 0; c < at.width; c++) {
    const float sink = sink_of(job, at.outer, at.first + c);
    double total = state.before[c] + state.total[c];
    if (job.sink) total += lifted_sink(sink, state.shift[c], {state.magic[c], state.low[c]});
    Answer a = answer_of(job.kind, total, state.exponent[c], state.shift[c], state.most[c] - state.shift[c]);
    if (state.most[c] - state.most[c] != 0)
      a = answer_at_infinity(job, state.most[c], state.nan[c] || sink != sink);
    if (a.fill != Answer::kCompute) {  // by numbers that give it whatever the column holds
      const float x = filling(job, a.fill);
      a.inverse = a.lowered = x;
      a.limit = -1;
      a.high = x != x ? x : -kMinusInfinity;
    }
    state.magic[c] = a.fill == Answer::kCompute ? a.magic : state.magic[c];
    state.low[c] = a.fill == Answer::kCompute ? a.low : state.low[c];
    state.inverse[c] = a.inverse;
    state.lowered[c] = a.lowered;
    state.limit[c] = a.limit;
    state.floor[c] = a.floor;
    state.high[c] = a.high;
    state.rest[c] = a.rest;
    state.log_sum[c] = a.log_sum;
  }
}

inline void start_piece(State& state) {
  for (int c = 0; c < kWidth; c++) {
    state.before[c] += state.total[c];
    state.total[c] = 0;
  }
}

template <class O>
PK_IN void put_sums(O* out, const State& state, int width) {
  F y[kParts];
  for (int k = 0; k < kParts; k++) y[k] = load_floats(state.log_sum + k * kLanes);
  put_row(out, y, width);
}

/// Results of one register of w (softmax) or z, by numbers of its columns at `p`.
template <class O, class Numbers>
PK_IN F finished_lanes(int kind, F x, const Numbers& by, int p) {
  if (kind != kSoftmax) return (x - load_floats(by.high + p)) - load_floats(by.rest + p);
  const F lowered = load_floats(by.lowered + p);
  if (kFlushes<O>) return larger(load_floats(by.floor + p), x) * lowered;
  const M some = less(x, load_floats(by.limit + p));
  if (__builtin_expect(any(some, some), 0)) {
    const F y = x * load_floats(by.inverse + p);
    return select(is_nan(y), y, unlifted(y));
  }
  return x * lowered;
}

}  // namespace
}  // namespace pk::cpu::PK_ISA
