// softmax, log_softmax and logsumexp over a dimension that is not the last: tiles of sixteen columns.
// Traffic: reads x once and writes out once while 4096 rows hold the whole dimension, as the columns wait in
// scratch that stays in the cache; a longer dimension is read three times.
#include "softmax_tile.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kMostTiles = int(kColumnTiles);
constexpr int64_t kRowsAhead = 16;  // of strided rows, which no hardware fetches ahead

/// Tiles of sixteen columns that are neighbours, so that reads and writes go by longer stretches of a row.
struct Tiles {
  int count;
  Place at[kMostTiles];
  State state[kMostTiles];
  float* z[kMostTiles];
};

template <class T>
void load_plain(const Softmax& job, const Tiles& tiles, int64_t begin, int64_t rows) {
  const Place& at = tiles.at[0];
  const T* x = static_cast<const T*>(job.x) + (at.outer * job.n + begin) * job.inner + at.first;
  for (int64_t i = 0; i < rows; i++, x += job.inner)
    for (int k = 0; k < tiles.count; k++) {
      const T* from = x + k * kWidth;
      float* to = tiles.z[k] + i * kWidth;
      __builtin_prefetch(from + kRowsAhead * job.inner);
      if (tiles.at[k].width == kWidth) {
        widen(from, kWidth, to);
      } else {
        memset(to, 0, kWidth * sizeof(float));
        widen(from, tiles.at[k].width, to);
      }
    }
}

/// Rows [begin, begin + rows) of the columns as z [rows, 16] of each tile.
void load_tiles(const Softmax& job, const Tiles& tiles, int64_t begin, int64_t rows) {
  if (job.plain()) {
    if (job.dtype == kF32) return load_plain<float>(job, tiles, begin, rows);
    if (job.dtype == kBF16) return load_plain<bf16>(job, tiles, begin, rows);
    return load_plain<f16>(job, tiles, begin, rows);
  }
  for (int k = 0; k < tiles.count; k++) {
    const Place& at = tiles.at[k];
    for (int64_t i = 0; i < rows; i++) {
      float* to = tiles.z[k] + i * kWidth;
      memset(to, 0, kWidth * sizeof(float));
      load_z(job, (at.outer * job.n + begin + i) * job.inner + at.first,
             at.outer * job.mask_stride[0] + (begin + i) * job.mask_stride[1] + at.first * job.mask_stride[2],
             job.mask_stride[2], at.width, 0, to);
    }
  }
}

void shift_rows(float* z, int64_t rows, const State& state) {
  for (int p = 0; p < kWidth; p += kLanes) {
    const F shift = load_floats(state.shift + p);
    for (int64_t i = 0; i < rows; i++) store(z + i * kWidth + p, load_floats(z + i * kWidth + p) - shift);
  }
}

void find_largest(const float* z, int64_t rows, State& state) {
  for (int p = 0; p < kWidth; p += kLanes) {
    F most = load_floats(state.most + p);
    for (int64_t i = 0; i < rows; i++) most = larger(load_floats(z + i * kWidth + p), most);
    store(state.most + p, most);
  }
}

void find_nan(const float* z, int64_t rows, State& state) {
  for (int64_t i = 0; i < rows; i++)
    for (int c = 0; c < kWidth; c++) state.nan[c] |= z[i * kWidth + c] != z[i * kWidth + c];
}

/// Sums of few terms to the lanes, one register of columns wide.
PK_IN void fold(float (&few)[kStripe][kWidth], float (&lanes)[kStripe][kWidth], int p, bool first) {
  for (int l = 0; l < kStripe; l++) {
    const F sum = load_floats(few[l] + p);
    store(lanes[l] + p, first ? sum : load_floats(lanes[l] + p) + sum);
    store(few[l] + p, F::of(0));
  }
}

/// Sums of one block of at most 4096 rows; w in place of z if asked for. Lanes and tree as in softmax.h.
template <int degree, bool keep>
void sum_block(float* z, int64_t rows, State& state) {
  constexpr int64_t kFold = kFew * kLazy;
  alignas(64) float lanes[kStripe][kWidth], few[kStripe][kWidth] = {};
  for (int p = 0; p < kWidth; p += kLanes) {
    const F magic = load_floats(state.magic + p), low = load_floats(state.low + p);
    const auto term = [&](int64_t i) PK_ALWAYS {
      float* place = z + i * kWidth + p;
      const F w = lifted_exp<degree>(load_floats(place), magic, low);
      if (keep) store(place, w);
      return w;
    };
    for (int64_t group = 0; group < rows; group += kLazy) {
      for (int64_t i = group; i < group + kStripe && i < rows; i++) {
        F part = term(i);
        for (int64_t k = i + kStripe; k < group + kLazy && k < rows; k += kStripe) part = part + term(k);
        float* sum = few[i - group] + p;
        store(sum, load_floats(sum) + part);
      }
      const int64_t next = group + kLazy;
      if (rows > kFold && (next % kFold == 0 || next >= rows)) fold(few, lanes, p, next <= kFold);
    }
  }
  add_lanes(rows > kFold ? lanes : few, state.total);
}

template <class O>
void write_sums(const Softmax& job, const Tiles& tiles) {
  for (int t = 0; t < tiles.count; t++) {
    const Place& at = tiles.at[t];
    put_sums(static_cast<O*>(job.out) + at.outer * job.inner + at.first, tiles.state[t], at.width);
  }
}

/// Results of `rows` rows from w (softmax) or z (log_softmax).
template <class O>
void write_tiles(const Softmax& job, const Tiles& tiles, int64_t begin, int64_t rows) {
  const Place& at = tiles.at[0];
  O* out = static_cast<O*>(job.out) + (at.outer * job.n + begin) * job.inner + at.first;
  for (int64_t i = 0; i < rows; i++, out += job.inner)
    for (int t = 0; t < tiles.count; t++) {
      const State& state = tiles.state[t];
      __builtin_prefetch(out + t * kWidth + kRowsAhead * job.inner, 1);
      F y[kParts];
      for (int k = 0; k < kParts; k++) {
        const int p = k * kLanes;
        const F x = load_floats(tiles.z[t] + i * kWidth + p);
        y[k] = finished_lanes<O>(job.kind, x, state, p);
      }
      put_row(out + t * kWidth, y, tiles.at[t].width);
    }
}

/// Terms of one block of rows: z is shifted where need be, sums go on, and w takes its place for softmax.
template <class O>
void sum_rows(const Softmax& job, float* z, int64_t rows, State& state) {
  if (job.kind == kSoftmax)
    sum_block<kDegree<O>, true>(z, rows, state);
  else
    sum_block<6, false>(z, rows, state);
}

template <class O>
void columns_of(const Softmax& job, Tiles& tiles) {
  const bool whole = job.n <= kColumnRows;
  const int64_t n = job.n;
  Needs needs[kMostTiles];
  const auto each_part = [&](auto&& body) {
    for (int64_t i = 0; i < n; i += kColumnRows) body(i, n - i < kColumnRows ? n - i : kColumnRows);
  };
  each_part([&](int64_t begin, int64_t rows) {
    load_tiles(job, tiles, begin, rows);
    for (int k = 0; k < tiles.count; k++) find_largest(tiles.z[k], rows, tiles.state[k]);
  });
  for (int k = 0; k < tiles.count; k++) needs[k] = choose(job, tiles.at[k], tiles.state[k]);
  each_part([&](int64_t begin, int64_t rows) {
    if (!whole) load_tiles(job, tiles, begin, rows);
    for (int k = 0; k < tiles.count; k++) {
      State& state = tiles.state[k];
      if (needs[k].shift) shift_rows(tiles.z[k], rows, state);
      if (needs[k].infinite) find_nan(tiles.z[k], rows, state);
      if (begin % kSplit == 0) start_piece(state);
      sum_rows<O>(job, tiles.z[k], rows, state);
    }
  });
  for (int k = 0; k < tiles.count; k++) conclude(job, tiles.at[k], tiles.state[k]);
  if (job.kind == kLogSumExp) return write_sums<O>(job, tiles);
  each_part([&](int64_t begin, int64_t rows) {
    if (!whole) load_tiles(job, tiles, begin, rows);
    for (int k = 0; !whole && k < tiles.count; k++) {
      if (needs[k].shift) shift_rows(tiles.z[k], rows, tiles.state[k]);
      State again = tiles.state[k];
      if (job.kind == kSoftmax) sum_rows<O>(job, tiles.z[k], rows, again);
    }
    write_tiles<O>(job, tiles, begin, rows);
  });
}

}  // namespace

void softmax_columns(const Softmax& job, int64_t outer, int64_t first, int count, float* scratch) {
  Tiles tiles{};
  for (int64_t at = first; tiles.count < count && at < job.inner; at += kWidth) {
    const int k = tiles.count++;
    const int64_t rows = job.n < kColumnRows ? job.n : kColumnRows;
    tiles.at[k] = {outer, at, int(job.inner - at < kWidth ? job.inner - at : kWidth)};
    tiles.z[k] = scratch + k * (rows * kWidth + kSlack);
    for (float& m : tiles.state[k].most) m = kMinusInfinity;
  }
  if (job.out_dtype == kF32) return columns_of<float>(job, tiles);
  if (job.out_dtype == kBF16) return columns_of<bf16>(job, tiles);
  return columns_of<f16>(job, tiles);
}

}  // namespace pk::cpu::PK_ISA
