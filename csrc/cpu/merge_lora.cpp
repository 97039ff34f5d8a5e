// Low-rank adapters merged into a weight, and the norms of DoRA's rows.
// Traffic of merge_lora: reads the weight once, writes out once: 2 * rows * cols * sizeof(T); left and right
// (4 * rank * (rows + cols) bytes) are read from the caches after that. One pass, whatever the number of
// adapters. Traffic of lora_squares: reads the weight once.
#include <algorithm>

#include "lanes.h"
#include "tree.h"

namespace pk::cpu::PK_ISA {
namespace {

constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // as many sums as there are registers, less three
constexpr int64_t kPanel = kGroup;                // columns of a panel of right
constexpr int64_t kOneRun = 64, kRun = 32;        // ranks: up to the first at once, else by the second
constexpr int64_t kAhead = 2;  // panels: what a tile will add to is asked for early, as so many short streams
                               // are not foreseen
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
PK_IN void run(const float* left, int64_t step, const float* panel, int64_t count, F (&sum)[R][2]) {
  for (int i = 0; i < R; i++) sum[i][0] = sum[i][1] = F::of(0);
  for (int64_t k = 0; k < count; k++, panel += kPanel) {
    const F a = load_floats(panel), b = load_floats(panel + kLanes);
    for (int i = 0; i < R; i++) {
      const F x = broadcast(left[i * step + k]);
      sum[i][0] = fma(x, a, sum[i][0]);
      sum[i][1] = fma(x, b, sum[i][1]);
    }
  }
}

/// left @ right of one tile in float32: the ranks in their order, from 0; many of them in runs, which are
/// added up in theirs, so that the error does not grow with the number of adapters.
template <int R>
PK_IN void multiply(const MergeLora& job, const float* left, const float* panel, F (&sum)[R][2]) {
  const int64_t step = job.rank <= kOneRun ? job.rank : kRun;
  run<R>(left, job.rank, panel, step, sum);
  for (int64_t k = step; k < job.rank; k += step) {
    F more[R][2];
    run<R>(left + k, job.rank, panel + k * kPanel, std::min(step, job.rank - k), more);
    for (int i = 0; i < R; i++)
      for (int h = 0; h < 2; h++) sum[i][h] = sum[i][h] + more[i][h];
  }
}

/// One tile of R rows and one panel: the weight is added to the products and the sum rounded, once.
template <class T, int R>
PK_IN void tile(const MergeLora& job, int64_t row, const float* panel, const float* column_scale,
                const Place& p) {
  F sum[R][2];
  multiply<R>(job, job.left + row * job.rank, panel, sum);
  const T* weight = static_cast<const T*>(p.weight) + p.at;
  for (int i = 0; i < R; i++) {
    const Pair w = load(weight + i * p.step);
    Pair y;
    if (job.row_scale) {
      const F c = broadcast(job.row_scale[row + i]);
      y = {fma(c, w.a, sum[i][0]), fma(c, w.b, sum[i][1])};
    } else if (column_scale) {
      y = {fma(load_floats(column_scale), w.a, sum[i][0]),
           fma(load_floats(column_scale + kLanes), w.b, sum[i][1])};
    } else {
      y = {w.a + sum[i][0], w.b + sum[i][1]};
    }
    put_as<T>(job.out_dtype, p.out, p.to + i * p.to_step, y, false);
  }
}

/// The last panel, where it is not full: through padded copies, so nothing outside is touched.
template <class T, int R>
void ragged_tile(const MergeLora& job, int64_t row, const float* panel, const float* column_scale,
                 const Place& p, int64_t width) {
  alignas(64) T in[R][kPanel] = {};
  alignas(64) float out[R][kPanel];
  const int size = dtype_size(job.out_dtype);
  for (int i = 0; i < R; i++)
    memcpy(static_cast<void*>(in[i]), static_cast<const T*>(p.weight) + p.at + i * p.step,
           size_t(width) * sizeof(T));
  tile<T, R>(job, row, panel, column_scale, {in, 0, kPanel, out, 0, kPanel});
  for (int i = 0; i < R; i++)
    memcpy(static_cast<char*>(p.out) + (p.to + i * p.to_step) * size,
           reinterpret_cast<const char*>(out) + i * kPanel * size, size_t(width * size));
}

/// R rows from `row` and columns [first, last).
template <class T, int R>
void strip(const MergeLora& job, int64_t row, int64_t first, int64_t last, Place p) {
  for (int64_t c = first; c < last; c += kPanel, p.at += kPanel, p.to += kPanel) {
    if (last - c > kAhead * kPanel)
      for (int i = 0; i < R; i++)
        __builtin_prefetch(static_cast<const T*>(p.weight) + p.at + i * p.step + kAhead * kPanel);
    const float* panel = job.panels + c * job.rank;
    const float* scale = job.column_scale ? job.column_scale + c : nullptr;
    if (last - c >= kPanel)
      tile<T, R>(job, row, panel, scale, p);
    else
      ragged_tile<T, R>(job, row, panel, scale, p, last - c);
  }
}

/// Rows [begin, end) and columns [first, last), to `out` from its element 0 on where it is a block of its
/// own.
template <class T>
void block(const MergeLora& job, int64_t begin, int64_t end, int64_t first, int64_t last, float* own) {
  const auto place = [&](int64_t row) -> Place {
    const int64_t at = row * job.cols + first;
    if (own) return {job.weight, at, job.cols, own, (row - begin) * kSquareColumns, kSquareColumns};
    return {job.weight, at, job.cols, job.out, at, job.cols};
  };
  int64_t row = begin;
  for (; row + kTileRows <= end; row += kTileRows) strip<T, kTileRows>(job, row, first, last, place(row));
  for (; row + 3 <= end; row += 3) strip<T, 3>(job, row, first, last, place(row));
  for (; row < end; row++) strip<T, 1>(job, row, first, last, place(row));
}

void block_of_any(const MergeLora& job, int64_t begin, int64_t end, int64_t first, int64_t last, float* own) {
  if (job.dtype == kF32) return block<float>(job, begin, end, first, last, own);
  if (job.dtype == kBF16) return block<bf16>(job, begin, end, first, last, own);
  return block<f16>(job, begin, end, first, last, own);
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

void merge_lora(const MergeLora& job, int64_t begin, int64_t end) {
  const int64_t step = columns_at_once(job.rank, kBlock);
  for (int64_t first = 0; first < job.cols; first += step)
    block_of_any(job, begin, end, first, std::min(job.cols, first + step), nullptr);
}

/// Squares of the rows' (columns': of this stretch's columns') elements of weight + left @ right, in float64:
/// sums [blocks of 4096 columns][rows], or [stretches of kSquareRows][cols].
void lora_squares(const MergeLora& job, bool by_column, double* sums, int64_t begin, int64_t end) {
  alignas(64) float x[kSquareRows * kSquareColumns];
  alignas(64) double lanes[kSquareRows][kTree] = {};
  const int64_t step = columns_at_once(job.rank, kSquareColumns), rows = end - begin;
  for (int64_t first = 0; first < job.cols; first += step) {
    const int64_t last = std::min(job.cols, first + step), width = last - first;
    block_of_any(job, begin, end, first, last, x);
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

/// Right [rank, cols] as panels [cols / kPanel][rank][kPanel] in the order of T's lanes, zeros behind the
/// last.
void pack_panels(const float* right, int64_t rank, int64_t cols, int dtype, float* panels, int64_t begin,
                 int64_t end) {
  for (int64_t first = begin * kPanel; first < std::min(cols, end * kPanel); first += kPanel) {
    float* to = panels + first * rank;
    const int64_t width = std::min(kPanel, cols - first);
    for (int64_t k = 0; k < rank; k++, to += kPanel) {
      alignas(64) float few[kPanel] = {};
      memcpy(few, right + k * cols + first, size_t(width) * sizeof(float));
      const Pair x = load(few);
      put(to, dtype == kBF16 ? part(x) : x, false);
    }
  }
}

int panel_width() { return int(kPanel); }

}  // namespace pk::cpu::PK_ISA
