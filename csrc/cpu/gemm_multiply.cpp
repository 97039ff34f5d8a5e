// The inner loops of a matrix product: tiles of sums in registers, and dot products for very few rows.
// Traffic: a tile of kTileRows x kPanel sums reads (kTileRows + kPanel) floats of the caches per k, and its
// sums once per kGemmDepth; a dot product reads its column of the right operand once from memory.
#include "gemm_panel.h"

namespace pk::cpu::PK_ISA {
namespace {

/// The k-th terms of R rows of sums.
template <int R>
PK_IN void add_term(const float* const (&a)[kTileRows / 3], int64_t step, const float* b, int64_t k,
                    F (&sum)[R][kPanelParts]) {
  const F b0 = load_floats(b + k * kPanel), b1 = load_floats(b + k * kPanel + kLanes);
#ifdef __GNUC__
#pragma GCC unroll 12
#endif
  for (int r = 0; r < R; r++) {
    const F x = F::of(a[r / 3][r % 3 * step + k]);
    sum[r][0] = fma(x, b0, sum[r][0]);
    sum[r][1] = fma(x, b1, sum[r][1]);
  }
}

/// R rows, `step` apart, times one panel. A chain of fused multiply-adds per sum, from k = 0 up. The step is
/// no constant here, so that it stands in a register: as part of addresses it makes instructions longer than
/// the processor decodes in the time of their arithmetic.
template <int R>
void tile(const float* a, int64_t step, const float* b, int64_t depth, float* c, bool add) {
  F sum[R][kPanelParts];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kPanelParts; v++) sum[r][v] = F::of(0);
  const float* rows[kTileRows / 3];
  for (int r = 0; r < kTileRows / 3; r++) rows[r] = a + 3 * r * step;
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4)
    for (int i = 0; i < 4; i++) add_term<R>(rows, step, b, k + i, sum);
  for (; k < depth; k++) add_term<R>(rows, step, b, k, sum);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kPanelParts; v++) {
      float* to = c + r * kGemmWidth + v * kLanes;
      store(to, add ? load_floats(to) + sum[r][v] : sum[r][v]);
    }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, float*, bool);
constexpr Tile kTiles[] = {
    tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>,  tile<6>,
#if defined(PK_AVX512)
    tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>,
#endif
};

/// Asks for memory a share at a time, so that no burst holds the sums up.
class Asking {
 public:
  Asking(const Ahead* list, int64_t count, int64_t shares) : at_(list), end_(list + count) {
    int64_t lines = 0;
    for (const Ahead* a = at_; a != end_; a++) lines += a->rows * a->lines;
    share_ = (lines + shares - 1) / shares;
  }
  void share() {
    for (int64_t i = 0; i < share_ && at_ != end_; i++) {
      __builtin_prefetch(at_->data + row_ * at_->step + line_ * 64, 0, 2);
      if (++line_ < at_->lines) continue;
      line_ = 0;
      if (++row_ < at_->rows) continue;
      row_ = 0;
      at_++;
    }
  }

 private:
  const Ahead *at_, *end_;
  int64_t share_, row_ = 0, line_ = 0;
};

constexpr int kPairs = int(kGemmStripe) / kGroup;

/// The partial sums of a product, added up as a tree.
template <class T>
PK_IN float total(const Pair (&sum)[kPairs]) {
  alignas(64) float lanes[kGemmStripe];
  for (int p = 0; p < kPairs; p++) put(lanes + p * kGroup, kParted<T> ? interleave(sum[p]) : sum[p], false);
  for (int width = int(kGemmStripe) / 2; width > 0; width /= 2)
    for (int l = 0; l < width; l++) lanes[l] += lanes[l + width];
  return lanes[0];
}

template <class T>
PK_IN void add_stretch(const T* from, const float* x, Pair (&sum)[kPairs]) {
  Pair s[kPairs];
  for (int p = 0; p < kPairs; p++) s[p] = sum[p];
#ifdef __GNUC__
#pragma GCC unroll 2
#endif
  for (int at = 0; at < kGemmStretch; at += kGemmStripe)
    for (int p = 0; p < kPairs; p++) {
      const Pair w = load(from + at + p * kGroup), y = load(x + at + p * kGroup);
      s[p] = {fma(w.a, y.a, s[p].a), fma(w.b, y.b, s[p].b)};
    }
  for (int p = 0; p < kPairs; p++) sum[p] = s[p];
}

/// Elements k, k + 32, ... of a product are one chain. R columns, `apart`, go together, a stretch of each in
/// turn. x is in the order in which the right operand is loaded.
template <int R, class T>
void dots_of(const T* column, int64_t step, int64_t apart, const float* x, int64_t rows, int64_t stride,
             int64_t depth, float* c) {
  Pair sum[kGemmDots][R][kPairs];
  for (auto& row : sum)
    for (auto& one : row)
      for (Pair& p : one) p = zero_pair();
  for (int64_t k = 0; k < depth; k += kGemmStretch)
    for (int r = 0; r < R; r++) {
      alignas(64) T few[kGemmStretch];
      const T* from = column + r * apart * step + k;
      if (k + kGemmStretch > depth) {
        memset(static_cast<void*>(few), 0, sizeof few);
        memcpy(static_cast<void*>(few), from, size_t(depth - k) * sizeof(T));
        from = few;
      }
      for (int64_t i = 0; i < rows; i++) add_stretch(from, x + i * stride + k, sum[i][r]);
    }
  for (int64_t i = 0; i < rows; i++)
    for (int r = 0; r < R; r++) c[i * kGemmWidth + r * apart] = total<T>(sum[i][r]);
}

template <class T>
void dots(const Matrix& b, int64_t n0, int64_t n1, const float* x, int64_t rows, int64_t stride,
          int64_t depth, float* c) {
  // One stream of memory alone waits for most of it; asking for what comes next only hinders several.
  constexpr int kStreams = 4;
  const T* from = static_cast<const T*>(b.data) + n0 * b.col;
  const int64_t apart = (n1 - n0) / kStreams;
  for (int64_t n = 0; n < apart; n++)  // each goes on from column to column, so the hardware sees it coming
    dots_of<kStreams>(from + n * b.col, b.col, apart, x, rows, stride, depth, c + n);
  for (int64_t n = kStreams * apart; n < n1 - n0; n++)
    dots_of<1>(from + n * b.col, b.col, 0, x, rows, stride, depth, c + n);
}

}  // namespace

void gemm_multiply(const float* a, int64_t rows, const float* b, int64_t width, int64_t depth, float* c,
                   bool add, const Ahead* ahead, int64_t count) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, panels = (width + kPanel - 1) / kPanel;
  Asking asking(ahead, count, tiles * panels);
  for (int64_t n = 0; n < width; n += kPanel)  // a panel stays in the first cache, the rows in the second
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t first = t * rows / tiles, height = (t + 1) * rows / tiles - first;
      asking.share();
      kTiles[height - 1](a + first * kGemmDepth, kGemmDepth, b + n * depth, depth, c + first * kGemmWidth + n,
                         add);
    }
}

void gemm_dots(const Matrix& b, int64_t n0, int64_t n1, const float* x, int64_t rows, int64_t stride,
               int64_t depth, float* c) {
  if (b.dtype == kF32) return dots<float>(b, n0, n1, x, rows, stride, depth, c);
  if (b.dtype == kBF16) return dots<bf16>(b, n0, n1, x, rows, stride, depth, c);
  return dots<f16>(b, n0, n1, x, rows, stride, depth, c);
}

}  // namespace pk::cpu::PK_ISA
