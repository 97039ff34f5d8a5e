// softmax, log_softmax and logsumexp over a dimension with fewer than sixteen columns behind it: all of them
// lie side by side, so eight rows (or as many as a register has lanes) are whole registers in memory order.
// Traffic: reads x once and writes out once up to 4096 rows, as the columns wait in scratch that stays in the
// cache; a longer dimension is read three times.
#include "softmax_tile.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kMost = int(kColumns) - 1;

/// The numbers of each column, in the order that kLanes rows have in memory.
struct alignas(64) Repeated {
  float magic[kMost * kLanes], low[kMost * kLanes];
  float inverse[kMost * kLanes], lowered[kMost * kLanes], limit[kMost * kLanes], floor[kMost * kLanes];
  float high[kMost * kLanes], rest[kMost * kLanes];
};

PK_IN void repeat(const float* column, int inner, float* to) {
  for (int r = 0; r < kLanes; r++)
    for (int c = 0; c < inner; c++) to[r * inner + c] = column[c];
}

int64_t whole(int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }

/// Rows [begin, begin + rows) as z [rows, inner], and -inf up to a whole number of registers.
void load_rows(const Softmax& job, int64_t outer, int64_t begin, int64_t rows, float* z) {
  const int64_t inner = job.inner, at = (outer * job.n + begin) * inner;
  if (job.plain())
    widen_any(job.dtype, job.x, at, rows * inner, z);
  else
    for (int64_t i = 0; i < rows; i++)
      load_z(job, at + i * inner, outer * job.mask_stride[0] + (begin + i) * job.mask_stride[1],
             job.mask_stride[2], inner, 0, z + i * inner);
  for (int64_t i = rows * inner; i < whole(rows) * inner; i++) z[i] = kMinusInfinity;
}

void shift_rows(float* z, int64_t rows, int inner, const State& state) {
  for (int64_t i = 0; i < rows; i++)
    for (int c = 0; c < inner; c++) z[i * inner + c] -= state.shift[c];
}

void find_largest(const float* z, int64_t rows, int inner, State& state) {
  alignas(64) float most[kMost * kLanes];
  repeat(state.most, inner, most);
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int j = 0; j < inner; j++)
      store(most + j * kLanes,
            larger(load_floats(z + i * inner + j * kLanes), load_floats(most + j * kLanes)));
  for (int r = 0; r < kLanes; r++)
    for (int c = 0; c < inner; c++) state.most[c] = with_sink(most[r * inner + c], state.most[c]);
}

void find_nan(const float* z, int64_t rows, int inner, State& state) {
  for (int64_t i = 0; i < rows; i++)
    for (int c = 0; c < inner; c++) state.nan[c] |= z[i * inner + c] != z[i * inner + c];
}

/// The 32 virtual lanes of each column, added up in double by the tree of softmax.h.
void add_lanes(const float* lanes, int inner, double* total) {
  double sum[kStripe / 2 * kMost];
  const int half = kStripe / 2 * inner;
  for (int i = 0; i < half; i++) sum[i] = double(lanes[i]) + double(lanes[i + half]);
  for (int width = half / 2; width >= inner; width /= 2)
    for (int i = 0; i < width; i++) sum[i] += sum[i + width];
  for (int c = 0; c < inner; c++) total[c] += sum[c];
}

/// Sums of few terms to the lanes.
PK_IN void fold(float* few, float* lanes, int inner, bool first) {
  for (int i = 0; i < kStripe * inner; i += kLanes) {
    const F sum = load_floats(few + i);
    store(lanes + i, first ? sum : load_floats(lanes + i) + sum);
    store(few + i, F::of(0));
  }
}

/// Sums of one block of at most 4096 rows; w in place of z if asked for. Lanes as in softmax.h.
template <int degree, bool keep>
void sum_block(float* z, int64_t rows, int inner, const Repeated& by, double* total) {
  constexpr int64_t kFold = kFew * kLazy;
  alignas(64) float lanes[kStripe * kMost], few[kStripe * kMost];
  for (int i = 0; i < kStripe * inner; i += kLanes) store(few + i, F::of(0));
  for (int64_t group = 0; group < rows; group += kLazy) {
    for (int64_t i = group; i < group + kStripe && i < rows; i += kLanes)
      for (int j = 0; j < inner; j++) {
        const F magic = load_floats(by.magic + j * kLanes), low = load_floats(by.low + j * kLanes);
        const auto term = [&](int64_t row) PK_ALWAYS {
          float* place = z + row * inner + j * kLanes;
          const F w = lifted_exp<degree>(load_floats(place), magic, low);
          if (keep) store(place, w);
          return w;
        };
        F part = term(i);
        for (int64_t k = i + kStripe; k < group + kLazy && k < rows; k += kStripe) part = part + term(k);
        float* sum = few + (i - group) * inner + j * kLanes;
        store(sum, load_floats(sum) + part);
      }
    const int64_t next = group + kLazy;
    if (rows > kFold && (next % kFold == 0 || next >= rows)) fold(few, lanes, inner, next <= kFold);
  }
  add_lanes(rows > kFold ? lanes : few, inner, total);
}

template <class O>
void sum_rows(const Softmax& job, float* z, int64_t rows, const Repeated& by, double* total) {
  if (job.kind == kSoftmax)
    sum_block<kDegree<O>, true>(z, rows, int(job.inner), by, total);
  else
    sum_block<6, false>(z, rows, int(job.inner), by, total);
}

/// Results of `rows` rows from w (softmax) or z (log_softmax).
template <class O>
void write_rows(const Softmax& job, O* out, const float* z, int64_t rows, const Repeated& by) {
  const int inner = int(job.inner);
  const int64_t count = rows * inner;
  int j = 0;
  const auto next = [&](const float* from) PK_ALWAYS {
    const F y = finished_lanes<O>(job.kind, load_floats(from), by, j * kLanes);
    j = j + 1 == inner ? 0 : j + 1;
    return canonical(y);
  };
  for (int64_t i = 0; i < count; i += kGroup) {
    const F a = next(z + i), b = next(z + i + kLanes);
    const Pair y = kParted<O> ? part({a, b}) : Pair{a, b};
    if (count - i >= kGroup)
      put(out + i, y, false);
    else
      put_first(out + i, y, int(count - i));
  }
}

void repeat_exponents(const State& state, int inner, Repeated& by) {
  repeat(state.magic, inner, by.magic);
  repeat(state.low, inner, by.low);
}
void repeat_answers(const State& state, int inner, Repeated& by) {
  repeat(state.inverse, inner, by.inverse);
  repeat(state.lowered, inner, by.lowered);
  repeat(state.limit, inner, by.limit);
  repeat(state.floor, inner, by.floor);
  repeat(state.high, inner, by.high);
  repeat(state.rest, inner, by.rest);
}

template <class O>
void narrow_of(const Softmax& job, int64_t outer, float* z) {
  const int inner = int(job.inner);
  const bool once = job.n <= kColumnRows;
  State state{};
  Repeated by;
  for (float& m : state.most) m = kMinusInfinity;
  const auto each_part = [&](auto&& body) {
    for (int64_t i = 0; i < job.n; i += kColumnRows)
      body(i, job.n - i < kColumnRows ? job.n - i : kColumnRows);
  };
  each_part([&](int64_t begin, int64_t rows) {
    load_rows(job, outer, begin, rows, z);
    find_largest(z, rows, inner, state);
  });
  const Needs needs = choose(job, {outer, 0, inner}, state);
  repeat_exponents(state, inner, by);
  each_part([&](int64_t begin, int64_t rows) {
    if (!once) load_rows(job, outer, begin, rows, z);
    if (needs.shift) shift_rows(z, rows, inner, state);
    if (needs.infinite) find_nan(z, rows, inner, state);
    if (begin % kSplit == 0) start_piece(state);
    sum_rows<O>(job, z, rows, by, state.total);
  });
  conclude(job, {outer, 0, inner}, state);
  O* out = static_cast<O*>(job.out) + outer * inner * (job.kind == kLogSumExp ? 1 : job.n);
  if (job.kind == kLogSumExp) return put_sums(out, state, inner);
  repeat_exponents(state, inner, by);
  repeat_answers(state, inner, by);
  each_part([&](int64_t begin, int64_t rows) {
    double again[kWidth];
    if (!once) load_rows(job, outer, begin, rows, z);
    if (!once && needs.shift) shift_rows(z, rows, inner, state);
    if (!once && job.kind == kSoftmax) sum_rows<O>(job, z, rows, by, again);
    write_rows(job, out + begin * inner, z, rows, by);
  });
}

}  // namespace

void softmax_narrow(const Softmax& job, int64_t outer, float* scratch) {
  if (job.out_dtype == kF32) return narrow_of<float>(job, outer, scratch);
  if (job.out_dtype == kBF16) return narrow_of<bf16>(job, outer, scratch);
  return narrow_of<f16>(job, outer, scratch);
}

}  // namespace pk::cpu::PK_ISA
