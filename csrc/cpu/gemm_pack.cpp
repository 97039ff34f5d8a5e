// Operands of a matrix product as float32: rows for the left one, panels of columns for the right one.
// Traffic: each call reads its part of the operand once and writes it once as float32, into memory that stays
// in the caches.
#include <type_traits>

#include "draws.h"
#include "gemm_jobs.h"
#include "gemm_panel.h"

namespace pk::cpu::PK_ISA {
namespace {

/// Floats of `count` contiguous elements; writes whole pairs.
template <class T>
PK_IN void widen(const T* x, int64_t count, float* z) {
  for (int64_t i = 0; i < count; i += kGroup) {
    alignas(64) T few[kGroup];
    const T* from = x + i;
    if (count - i < kGroup) {
      memset(static_cast<void*>(few), 0, sizeof few);
      memcpy(static_cast<void*>(few), from, size_t(count - i) * sizeof(T));
      from = few;
    }
    const Pair p = load(from);
    put(z + i, kParted<T> ? interleave(p) : p, false);
  }
}

template <class T>
void widen_strided(const T* x, int64_t step, int64_t count, float* z) {
  for (int64_t i = 0; i < count; i++) z[i] = element<T>(x, i * step);
}

template <class T>
PK_IN void widen_row(const Matrix& a, int64_t i, int64_t k0, int64_t k1, float* z) {
  const T* from = static_cast<const T*>(a.data) + i * a.row + k0 * a.col;
  if (a.col == 1)
    widen(from, k1 - k0, z);
  else
    widen_strided(from, a.col, k1 - k0, z);
}

/// Zeros what is dropped of `count` elements from flat index `at`.
void drop(const Dropout& dropout, int64_t at, int64_t count, float* z) {
  alignas(64) uint32_t words[kTile / 2];
  const Below below(dropout.threshold);
  for (int64_t tile = at / kTile * kTile; tile < at + count; tile += kTile) {
    draw_tile(uint64_t(tile) / kTile * 16, 0, dropout.key0, dropout.key1, words);
    if (tile >= at && tile + kTile <= at + count) {
      for (int i = 0; i < kTile; i += kGroup) {
        float* to = z + (tile - at) + i;
        M first, second;
        below_in_order(below, load_words(words + i / 2), first, second);
        store(to, select(first, load_floats(to), F::of(0)));
        store(to + kLanes, select(second, load_floats(to + kLanes), F::of(0)));
      }
      continue;
    }
    const int64_t begin = tile < at ? at : tile, end = tile + kTile < at + count ? tile + kTile : at + count;
    for (int64_t i = begin; i < end; i++) {
      const uint32_t word = words[(i - tile) / 2];
      const uint32_t draw = (i - tile) % 2 ? word >> 16 : word & 0xFFFFu;
      if (draw >= dropout.threshold) z[i - at] = 0;
    }
  }
}

int64_t row_of(const int64_t* rows, int64_t i) { return rows ? rows[i] : i; }

template <class T>
void widen_rows(const Matrix& a, const int64_t* rows, int64_t i0, int64_t i1, int64_t k0, int64_t k1,
                const Dropout* dropout, int64_t stride, bool parted, float* to) {
  for (int64_t i = i0; i < i1; i++, to += stride) {
    const int64_t row = row_of(rows, i);
    widen_row<T>(a, row, k0, k1, to);
    if (dropout) drop(*dropout, row * dropout->width + k0, k1 - k0, to);
    for (int64_t k = 0; parted && k < k1 - k0; k += kGroup) put(to + k, part(load(to + k)), false);
  }
}

/// Rows of the operand lie along the panels. A few rows at a time over all panels: rows a power of two apart
/// share a set of the cache, and so do panels side by side.
template <class T>
void pack_along(const Matrix& b, const int64_t* rows, int64_t k0, int64_t k1, int64_t n0, int64_t n1,
                float* to) {
  constexpr int64_t kTogether = 4, kEarly = 16;
  const int64_t depth = k1 - k0;
  for (int64_t k = k0; k < k1; k += kTogether) {
    const int64_t end = k1 - k < kTogether ? k1 : k + kTogether;
    for (int64_t next = k + kEarly; b.col == 1 && next < k1 && next < end + kEarly; next++)
      for (int64_t n = n0; n < n1; n += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(static_cast<const T*>(b.data) + row_of(rows, next) * b.row + n, 0, 3);
    for (int64_t n = n0; n < n1; n += kPanel) {
      const int64_t last = n1 - n < kPanel ? n1 : n + kPanel;
      float* panel = to + (n - n0) * depth + (k - k0) * kPanel;
      for (int64_t i = k; i < end; i++, panel += kPanel) {
        const int64_t row = row_of(rows, i);
        if (b.col == 1 && last - n == kPanel) {
          const Pair p = load(static_cast<const T*>(b.data) + row * b.row + n);
          put(panel, kParted<T> ? interleave(p) : p, false);
          continue;
        }
        if (b.col != 1) memset(panel, 0, kPanel * sizeof(float));
        widen_row<T>(b, row, n, last, panel);
      }
    }
  }
}

/// The same with something dropped: tiles of draws lie along the rows, so these are made whole first.
template <class T>
void pack_dropped(const Matrix& b, const int64_t* rows, int64_t k0, int64_t k1, int64_t n0, int64_t n1,
                  const Dropout& dropout, float* to) {
  alignas(64) float row[kGemmWidth + kGroup] = {};
  const int64_t depth = k1 - k0;
  for (int64_t k = 0; k < depth; k++) {
    const int64_t from = row_of(rows, k0 + k);
    widen_row<T>(b, from, n0, n1, row);
    drop(dropout, from * dropout.width + n0, n1 - n0, row);
    for (int64_t n = 0; n < n1 - n0; n += kPanel) {
      float* panel = to + n * depth + k * kPanel;
      for (int v = 0; v < kPanelParts; v++) store(panel + v * kLanes, load_floats(row + n + v * kLanes));
    }
  }
}

/// Columns of the operand are contiguous: panels are turned, a column's stretch at a time.
template <class T>
void pack_across(const Matrix& b, int64_t k0, int64_t k1, int64_t n0, int64_t n1, float* to) {
  alignas(64) float columns[kPanel][kGemmDepth + kGroup];
  const int64_t depth = k1 - k0;
  for (int64_t n = n0; n < n1; n += kPanel, to += depth * kPanel) {
    const int64_t width = n1 - n < kPanel ? n1 - n : kPanel;
    if (std::is_same<T, bf16>::value && width == kPanel && depth % kHalvesTurned == 0 && b.row == 1) {
      const bf16* from = static_cast<const bf16*>(b.data) + k0 + n * b.col;
      for (int c = 0; c < kPanel; c += 8) {  // eight columns a power of two apart still fit one set
        if (n + kPanel + c + 8 <= n1)
          for (int i = 0; i < 8; i++)
            for (int64_t k = 0; k < depth; k += 32)
              __builtin_prefetch(from + (kPanel + c + i) * b.col + k, 0, 2);
        for (int64_t k = 0; k < depth; k += kHalvesTurned)
          turn_halves(from + c * b.col + k, b.col, to + k * kPanel + c);
      }
      continue;
    }
    const Matrix turned{b.data, b.dtype, b.col, b.row};
    for (int64_t c = 0; c < kPanel; c++)
      if (c < width)
        widen_row<T>(turned, n + c, k0, k1, columns[c]);
      else
        memset(columns[c], 0, sizeof columns[c]);
    turn(columns, depth, to);
  }
}

template <class T>
void pack(const Matrix& b, const int64_t* rows, int64_t k0, int64_t k1, int64_t n0, int64_t n1,
          const Dropout* dropout, float* to) {
  if (dropout) return pack_dropped<T>(b, rows, k0, k1, n0, n1, *dropout, to);
  if (b.col == 1 || rows) return pack_along<T>(b, rows, k0, k1, n0, n1, to);
  pack_across<T>(b, k0, k1, n0, n1, to);
}

}  // namespace

void gemm_widen(const Matrix& a, const int64_t* rows, int64_t i0, int64_t i1, int64_t k0, int64_t k1,
                const Dropout* dropout, int64_t stride, bool parted, float* to) {
  if (a.dtype == kF32) return widen_rows<float>(a, rows, i0, i1, k0, k1, dropout, stride, parted, to);
  if (a.dtype == kBF16) return widen_rows<bf16>(a, rows, i0, i1, k0, k1, dropout, stride, parted, to);
  return widen_rows<f16>(a, rows, i0, i1, k0, k1, dropout, stride, parted, to);
}

void gemm_pack(const Matrix& b, const int64_t* rows, int64_t k0, int64_t k1, int64_t n0, int64_t n1,
               float scale, const Dropout* dropout, float* to) {
  if (b.dtype == kF32)
    pack<float>(b, rows, k0, k1, n0, n1, dropout, to);
  else if (b.dtype == kBF16)
    pack<bf16>(b, rows, k0, k1, n0, n1, dropout, to);
  else
    pack<f16>(b, rows, k0, k1, n0, n1, dropout, to);
  if (scale == 1) return;
  const int64_t all = (n1 - n0 + kPanel - 1) / kPanel * kPanel * (k1 - k0);
  const F s = F::of(scale);
  for (int64_t i = 0; i < all; i += kLanes) store(to + i, load_floats(to + i) * s);
}

void gemm_add_kept(float* c, const float* t, const int64_t* rows, int64_t i0, int64_t i1, int64_t n0,
                   int64_t n1, const Dropout& dropout) {
  alignas(64) float kept[kGemmWidth];
  for (int64_t i = i0; i < i1; i++, c += kGemmWidth, t += kGemmWidth) {
    memcpy(kept, t, sizeof kept);
    drop(dropout, row_of(rows, i) * dropout.width + n0, n1 - n0, kept);
    for (int64_t n = 0; n < kGemmWidth; n += kLanes) store(c + n, load_floats(c + n) + load_floats(kept + n));
  }
}

}  // namespace pk::cpu::PK_ISA
