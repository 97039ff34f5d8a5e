// Low-rank adapters merged into a weight, and the norms of DoRA's rows.
// Traffic of merge_lora: reads the weight once, writes out once: 2 * rows * cols * sizeof(T); the factors are
// read once, and their packed copies (4 * rank * (rows + cols) bytes) from the caches after that. One pass,
// whatever the number of adapters. Traffic of lora_squares: reads the weight once.
#include <algorithm>

#include "lanes.h"
#include "tree.h"

#define PK_APART static __attribute__((noinline))

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // as many sums as there are registers, less three
constexpr int64_t kPanel = kGroup;                // columns of a panel of right
constexpr int64_t kOneRun = 64, kRun = 32;        // ranks: up to the first at once, else by the second
static_assert(kLoraRows % kTileRows == 0 && kSquareRows % kTileRows == 0, "tiles must fill a thread's rows");

/// Where one tile of a job is read and written: elements `at` of the weight and `to` of out, rows apart by
/// `step` and `to_step`.
struct Place {
  const void* weight;
  int64_t at, step;
  void* out;
  int64_t to, to_step;
};

/// `count` ranks of left @ right of one tile, in their order, from 0.
template <int R>
PK_IN void run(const float* left, const float* panel, int64_t count, F (&sum)[R][2]) {
  for (int i = 0; i < R; i++) sum[i][0] = sum[i][1] = F::of(0);
  for (int64_t k = 0; k < count; k++, left += kTileRows, panel += kPanel) {
    const F a = load_floats(panel), b = load_floats(panel + kLanes);
    for (int i = 0; i < R; i++) {
      const F x = broadcast(left[i]);
      sum[i][0] = fma(x, a, sum[i][0]);
      sum[i][1] = fma(x, b, sum[i][1]);
    }
  }
}

/// The sums of many ranks: in runs, which are added up in their order, so that the error does not grow with
/// the number of adapters. Apart from the rest, as twice the sums want all registers.
template <int R>
PK_APART void run_after_run(int64_t rank, const float* left, const float* panel, float (*sums)[kPanel]) {
  F sum[R][2];
  run<R>(left, panel, kRun, sum);
  for (int64_t k = kRun; k < rank; k += kRun) {
    F more[R][2];
    run<R>(left + k * kTileRows, panel + k * kPanel, std::min(kRun, rank - k), more);
    for (int i = 0; i < R; i++)
      for (int h = 0; h < 2; h++) sum[i][h] = sum[i][h] + more[i][h];
  }
  for (int i = 0; i < R; i++)
    for (int h = 0; h < 2; h++) store(&sums[i][h * kLanes], sum[i][h]);
}

/// left @ right of one tile in float32: the ranks in their order, from 0.
template <int R>
PK_IN void multiply(int64_t rank, const float* left, const float* panel, F (&sum)[R][2]) {
  if (rank <= kOneRun) return run<R>(left, panel, rank, sum);
  alignas(64) float sums[R][kPanel];
  run_after_run<R>(rank, left, panel, sums);
  for (int i = 0; i < R; i++)
    for (int h = 0; h < 2; h++) sum[i][h] = load_floats(&sums[i][h * kLanes]);
}

/// The weight, times its scale, added to a tile's products.
template <class T, int R>
PK_IN void add_weight(const MergeLora& job, int64_t row, const float* column_scale, const Place& p,
                      F (&sum)[R][2]) {
  const T* weight = static_cast<const T*>(p.weight) + p.at;
  if (!job.row_scale && !column_scale) {
    for (int i = 0; i < R; i++) {
      const Pair w = load(weight + i * p.step);
      sum[i][0] = w.a + sum[i][0];
      sum[i][1] = w.b + sum[i][1];
    }
    return;
  }
  for (int i = 0; i < R; i++) {
    const Pair w = load(weight + i * p.step);
    const Pair c = column_scale ? Pair{load_floats(column_scale), load_floats(column_scale + kLanes)}
                                : Pair{broadcast(job.row_scale[row + i]), broadcast(job.row_scale[row + i])};
    sum[i][0] = fma(c.a, w.a, sum[i][0]);
    sum[i][1] = fma(c.b, w.b, sum[i][1]);
  }
}

/// A tile's sums rounded, once, as T's load orders them. NaN are rare, so one question serves a tile.
template <class T, int R>
PK_IN void write_tile(int out_dtype, const Place& p, F (&sum)[R][2]) {
  M nan = either_nan(sum[0][0], sum[0][1]);
  for (int i = 1; i < R; i++) nan = nan | either_nan(sum[i][0], sum[i][1]);
  if (__builtin_expect(any(nan, nan), 0))
    for (int i = 0; i < R; i++)
      for (int h = 0; h < 2; h++) sum[i][h] = canonical(sum[i][h]);
  for (int i = 0; i < R; i++)
    put_numbers<T>(out_dtype, p.out, p.to + i * p.to_step, {sum[i][0], sum[i][1]}, false);
}

/// One tile of R rows and one panel: the weight is added to the products and the sum rounded, once.
template <class T, int R>
PK_IN void tile(const MergeLora& job, int64_t row, const float* left, const float* panel,
                const float* column_scale, const Place& p) {
  F sum[R][2];
  multiply<R>(job.rank, left, panel, sum);
  add_weight<T, R>(job, row, column_scale, p, sum);
  if (job.out_dtype == int(dtype_of<T>()))  // known to the compiler then
    write_tile<T, R>(dtype_of<T>(), p, sum);
  else
    write_tile<T, R>(job.out_dtype, p, sum);
}

/// The last panel, where it is not full: through padded copies, so nothing outside is touched.
template <class T, int R>
PK_APART void ragged_tile(const MergeLora& job, int64_t row, const float* left, const float* panel,
                          const float* column_scale, const Place& p, int64_t width) {
  alignas(64) T in[R][kPanel] = {};
  alignas(64) float out[R][kPanel];
  const int size = dtype_size(job.out_dtype);
  for (int i = 0; i < R; i++)
    memcpy(static_cast<void*>(in[i]), static_cast<const T*>(p.weight) + p.at + i * p.step,
           size_t(width) * sizeof(T));
  tile<T, R>(job, row, left, panel, column_scale, {in, 0, kPanel, out, 0, kPanel});
  for (int i = 0; i < R; i++)
    memcpy(static_cast<char*>(p.out) + (p.to + i * p.to_step) * size,
           reinterpret_cast<const char*>(out) + i * kPanel * size, size_t(width * size));
}

#if defined(PK_AVX2)
PK_APART void careful_tile(const MergeLora& job, const float* left, const float* panel, const Place& p) {
  tile<bf16, kTileRows>(job, 0, left, panel, nullptr, p);
}

/// The full panels of a strip from bfloat16 to bfloat16 that nothing scales; the first column behind them.
/// On Zen 3 the steps of rounding take time of their own beside the multiplications, and every store of a
/// register keeps both multipliers waiting: hence few steps, and no sum leaves its register.
PK_APART int64_t hasty_strip(const MergeLora& job, const float* left, int64_t first, int64_t last, Place& p) {
  const float* panel = job.panels + first * job.rank;
  for (; last - first >= kPanel;
       first += kPanel, panel += kPanel * job.rank, p.at += kPanel, p.to += kPanel) {
    const bf16* weight = static_cast<const bf16*>(p.weight) + p.at;
    bf16* out = static_cast<bf16*>(p.out) + p.to;
    F sum[kTileRows][2];
    multiply<kTileRows>(job.rank, left, panel, sum);
    Hasty rounding;
    __m256i y[kTileRows];
    for (int i = 0; i < kTileRows; i++) {
      const Pair w = load(weight + i * p.step);
      y[i] = rounding.narrow({w.a + sum[i][0], w.b + sum[i][1]});
    }
    if (__builtin_expect(rounding.failed(), 0))
      careful_tile(job, left, panel, p);
    else
      for (int i = 0; i < kTileRows; i++) write(out + i * p.to_step, y[i], false);
  }
  return first;
}
#endif

/// R rows from `row` and columns [first, last). Nothing is asked for early: the hardware follows the rows of
/// a tile by itself, and asking takes more time than it saves.
template <class T, int R>
void strip(const MergeLora& job, int64_t row, const float* left, int64_t first, int64_t last, Place p) {
#if defined(PK_AVX2)
  if (kParted<T> && R == kTileRows && job.out_dtype == kBF16 && !job.row_scale && !job.column_scale)
    first = hasty_strip(job, left, first, last, p);
#endif
  for (int64_t c = first; c < last; c += kPanel, p.at += kPanel, p.to += kPanel) {
    const float* panel = job.panels + c * job.rank;
    const float* scale = job.column_scale ? job.column_scale + c : nullptr;
    if (last - c >= kPanel)
      tile<T, R>(job, row, left, panel, scale, p);
    else
      ragged_tile<T, R>(job, row, left, panel, scale, p, last - c);
  }
}

/// Rows [begin, end) and columns [first, last), to `out` from its element 0 on where it is a block of its
/// own; `left` holds these rows as pack_left leaves them.
template <class T>
void block(const MergeLora& job, const float* left, int64_t begin, int64_t end, int64_t first, int64_t last,
           float* own) {
  const auto place = [&](int64_t row) -> Place {
    const int64_t at = row * job.cols + first;
    if (own) return {job.weight, at, job.cols, own, (row - begin) * kSquareColumns, kSquareColumns};
    return {job.weight, at, job.cols, job.out, at, job.cols};
  };
  const auto factor = [&](int64_t row) {
    const int64_t i = row - begin;
    return left + i / kTileRows * kTileRows * job.rank + i % kTileRows;
  };
  int64_t row = begin;
  for (; row + kTileRows <= end; row += kTileRows)
    strip<T, kTileRows>(job, row, factor(row), first, last, place(row));
  for (; row + 3 <= end; row += 3) strip<T, 3>(job, row, factor(row), first, last, place(row));
  for (; row < end; row++) strip<T, 1>(job, row, factor(row), first, last, place(row));
}

void block_of_any(const MergeLora& job, const float* left, int64_t begin, int64_t end, int64_t first,
                  int64_t last, float* own) {
  if (job.dtype == kF32) return block<float>(job, left, begin, end, first, last, own);
  if (job.dtype == kBF16) return block<bf16>(job, left, begin, end, first, last, own);
  return block<f16>(job, left, begin, end, first, last, own);
}

/// An element of a factor, scaled: rounded once.
PK_IN float scaled(float x, double scale) { return float(double(x) * scale); }

/// Rows [begin, end) of a factor's left side, row i of a tile's rank k at k * kTileRows + i.
template <class T>
void pack_rows(const LowRank& f, int64_t rank, int64_t begin, int64_t end, float* to) {
  for (int64_t i = 0; i < end - begin; i++) {
    float* row = to + i / kTileRows * kTileRows * rank + i % kTileRows;
    const int64_t at = (begin + i) * f.left.row;
    for (int64_t k = 0; k < f.rank; k++)
      row[k * kTileRows] = scaled(element<T>(f.left.data, at + k * f.left.col), f.left_scale);
  }
}

/// All factors' left sides side by side: rows [begin, end) of [rows, rank].
void pack_left(const MergeLora& job, int64_t begin, int64_t end, float* to) {
  for (int64_t j = 0; j < job.count; j++) {
    const LowRank& f = job.factors[j];
    if (f.left.dtype == kF32)
      pack_rows<float>(f, job.rank, begin, end, to);
    else if (f.left.dtype == kBF16)
      pack_rows<bf16>(f, job.rank, begin, end, to);
    else
      pack_rows<f16>(f, job.rank, begin, end, to);
    to += f.rank * kTileRows;
  }
}

/// Columns [first, last) of a factor's right side, rank by rank, as its memory mostly lies.
template <class T>
void pack_columns(const LowRank& f, int64_t rank, int64_t first, int64_t last, bool parted, float* to) {
  const bool as_they_lie = f.right.col == 1 && f.right_scale == 1;
  for (int64_t k = 0; k < f.rank; k++, to += kPanel) {
    float* panel = to;
    for (int64_t c = first; c < last; c += kPanel, panel += kPanel * rank) {
      const int64_t at = k * f.right.row + c * f.right.col;
      if (as_they_lie && last - c >= kPanel) {
        const Pair x = load(static_cast<const T*>(f.right.data) + at);
        put(panel, parted == kParted<T> ? x : parted ? part(x) : interleave(x), false);
        continue;
      }
      alignas(64) float few[kPanel] = {};
      for (int64_t i = 0; i < std::min(kPanel, last - c); i++)
        few[i] = scaled(element<T>(f.right.data, at + i * f.right.col), f.right_scale);
      const Pair x = load(few);
      put(panel, parted ? part(x) : x, false);
    }
  }
}

/// Columns whose part of right stays in the second-level cache: a power of two, so that blocks of 4096
/// columns are whole numbers of it.
int64_t columns_at_once(int64_t rank, int64_t most) {
  int64_t columns = most;
  while (columns > 64 && columns * rank > kPanelFloats) columns /= 2;
  return columns;
}

/// Squares of [rows, width] floats, added to the sixteen lanes of each row.
void add_squares(const float* x, int64_t rows, int64_t width, double (*lanes)[kTree]) {
  for (int64_t i = 0; i < rows; i++, x += kSquareColumns) {
    double* lane = lanes[i];
    int64_t c = 0;
    for (; c + kTree <= width; c += kTree)
      for (int l = 0; l < kTree; l++) lane[l] += double(x[c + l]) * double(x[c + l]);
    for (int l = 0; c + l < width; l++) lane[l] += double(x[c + l]) * double(x[c + l]);
  }
}

}  // namespace

void merge_lora(const MergeLora& job, int64_t begin, int64_t end, float* left) {
  pack_left(job, begin, end, left);
  const int64_t step = columns_at_once(job.rank, kBlock);
  for (int64_t first = 0; first < job.cols; first += step)
    block_of_any(job, left, begin, end, first, std::min(job.cols, first + step), nullptr);
}

/// Squares of the rows' (columns': of this stretch's columns') elements of weight + left @ right, in float64:
/// sums [blocks of 4096 columns][rows], or [stretches of kSquareRows][cols].
void lora_squares(const MergeLora& job, bool by_column, double* sums, int64_t begin, int64_t end,
                  float* left) {
  pack_left(job, begin, end, left);
  alignas(64) float x[kSquareRows * kSquareColumns];
  alignas(64) double lanes[kSquareRows][kTree] = {};
  const int64_t step = columns_at_once(job.rank, kSquareColumns), rows = end - begin;
  for (int64_t first = 0; first < job.cols; first += step) {
    const int64_t last = std::min(job.cols, first + step), width = last - first;
    block_of_any(job, left, begin, end, first, last, x);
    if (by_column) {
      double* sum = sums + begin / kSquareRows * job.cols + first;
      for (int64_t c = 0; c < width; c++) sum[c] = 0;
      for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < width; c++) {
          const double y = double(x[i * kSquareColumns + c]);
          sum[c] += y * y;
        }
      continue;
    }
    add_squares(x, rows, width, lanes);
    if (last % kBlock && last < job.cols) continue;
    for (int64_t i = 0; i < rows; i++) sums[first / kBlock * job.rows + begin + i] = tree(lanes[i]);
    memset(lanes, 0, sizeof lanes);
  }
}

/// All factors' right sides, one below another, as panels [cols / kPanel][rank][kPanel] in the order of T's
/// lanes, zeros behind the last column.
void pack_panels(const MergeLora& job, float* panels, int64_t begin, int64_t end) {
  const bool parted = job.dtype == kBF16;
  const int64_t first = begin * kPanel, last = std::min(job.cols, end * kPanel);
  float* to = panels + first * job.rank;
  for (int64_t j = 0; j < job.count; j++) {
    const LowRank& f = job.factors[j];
    if (f.right.dtype == kF32)
      pack_columns<float>(f, job.rank, first, last, parted, to);
    else if (f.right.dtype == kBF16)
      pack_columns<bf16>(f, job.rank, first, last, parted, to);
    else
      pack_columns<f16>(f, job.rank, first, last, parted, to);
    to += f.rank * kPanel;
  }
}

int panel_width() { return int(kPanel); }

}  // namespace pk::cpu::PK_ISA
