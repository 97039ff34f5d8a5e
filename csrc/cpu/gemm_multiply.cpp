// The inner loops of a matrix product: tiles of sums in registers, and dot products for very few rows.
// Traffic: a tile of kTileRows x kPanel sums reads (kTileRows + kPanel) floats of the caches per k, and its
// sums once per kGemmDepth; a dot product reads its column of the right operand once from memory.
#include "gemm_panel.h"

namespace pk::cpu::PK_ISA {
namespace {

/// R rows times one panel. A chain of fused multiply-adds per sum, from k = 0 up.
template <int R>
void tile(const float* a, const float* b, int64_t depth, float* c, bool add) {
  F sum[R][kPanelParts];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kPanelParts; v++) sum[r][v] = F::of(0);
  for (int64_t k = 0; k < depth; k++) {
    const F b0 = load_floats(b + k * kPanel), b1 = load_floats(b + k * kPanel + kLanes);
#ifdef __GNUC__
#pragma GCC unroll 12
#endif
    for (int r = 0; r < R; r++) {
      const F x = F::of(a[r * kGemmDepth + k]);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kPanelParts; v++) {
      float* to = c + r * kGemmWidth + v * kLanes;
      store(to, add ? load_floats(to) + sum[r][v] : sum[r][v]);
    }
}

using Tile = void (*)(const float*, const float*, int64_t, float*, bool);
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

/// Elements k, k + 32, ... of a product are one chain; R columns of the right operand go together. x is in
/// the order in which the right operand is loaded.
template <int R, class T>
PK_IN void dots_of(const T* column, int64_t step, const float* x, int64_t depth, float* sums) {
  constexpr int kPairs = int(kGemmStripe) / kGroup;
  Pair sum[R][kPairs];
  for (int r = 0; r < R; r++)
    for (int p = 0; p < kPairs; p++) sum[r][p] = zero_pair();
  for (int64_t k = 0; k < depth; k += kGemmStripe) {
    for (int r = 0; r < R; r++)  // what the next columns need: rows end before the hardware looks that far
      __builtin_prefetch(column + (R + r) * step + k, 0, 2);
    for (int p = 0; p < kPairs; p++) {
      const int64_t at = k + p * kGroup;
      const Pair y = load(x + at);
      for (int r = 0; r < R; r++) {
        alignas(64) T few[kGroup];
        const T* from = column + r * step + at;
        if (at + kGroup > depth) {
          memset(static_cast<void*>(few), 0, sizeof few);
          if (at < depth) memcpy(static_cast<void*>(few), from, size_t(depth - at) * sizeof(T));
          from = few;
        }
        const Pair w = load(from);
        sum[r][p].a = fma(w.a, y.a, sum[r][p].a);
        sum[r][p].b = fma(w.b, y.b, sum[r][p].b);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    alignas(64) float lanes[kGemmStripe];
    for (int p = 0; p < kPairs; p++)
      put(lanes + p * kGroup, kParted<T> ? interleave(sum[r][p]) : sum[r][p], false);
    for (int width = int(kGemmStripe) / 2; width > 0; width /= 2)
      for (int l = 0; l < width; l++) lanes[l] += lanes[l + width];
    sums[r] = lanes[0];
  }
}

template <class T>
void dots(const Matrix& b, int64_t n0, int64_t n1, const float* x, int64_t rows, int64_t stride,
          int64_t depth, float* c) {
  constexpr int R = kLanes / 4;
  const T* from = static_cast<const T*>(b.data) + n0 * b.col;
  int64_t n = 0;
  for (; n + R <= n1 - n0; n += R)
    for (int64_t i = 0; i < rows; i++)
      dots_of<R>(from + n * b.col, b.col, x + i * stride, depth, c + i * kGemmWidth + n);
  for (; n < n1 - n0; n++)
    for (int64_t i = 0; i < rows; i++)
      dots_of<1>(from + n * b.col, b.col, x + i * stride, depth, c + i * kGemmWidth + n);
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
      kTiles[height - 1](a + first * kGemmDepth, b + n * depth, depth, c + first * kGemmWidth + n, add);
    }
}

void gemm_dots(const Matrix& b, int64_t n0, int64_t n1, const float* x, int64_t rows, int64_t stride,
               int64_t depth, float* c) {
  if (b.dtype == kF32) return dots<float>(b, n0, n1, x, rows, stride, depth, c);
  if (b.dtype == kBF16) return dots<bf16>(b, n0, n1, x, rows, stride, depth, c);
  return dots<f16>(b, n0, n1, x, rows, stride, depth, c);
}

}  // namespace pk::cpu::PK_ISA
