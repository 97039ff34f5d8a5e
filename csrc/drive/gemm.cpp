#include "gemm.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "isa.h"
#include "parallel.h"
#include "rooms.h"

namespace pk {
namespace {

using cpu::kGemmDepth;
using cpu::kGemmDots;
using cpu::kGemmRows;
using cpu::kGemmStretch;
using cpu::kGemmWidth;
using cpu::Matrix;

constexpr int64_t kDotsWidth = 64;   // columns of a product of few rows that a thread takes at a time
constexpr int64_t kPiece = 128;      // rows whose floats stay in the second cache beside the panels
constexpr int64_t kShrinkRows = 96;  // rows of a skinny product that a thread takes at the most
constexpr int64_t kShrinkTile = 12;  // and a number that kernels like
constexpr int64_t kShrinkDots = 8;   // columns of it, where they are dot products of few rows

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t up_to(int64_t a, int64_t b) { return ceil_divide(a, b) * b; }

/// Rows or columns [k0, k1) x [n0, n1) of a right operand, whichever are contiguous; nothing where neither
/// are.
cpu::Ahead ahead(const Matrix& b, int64_t k0, int64_t k1, int64_t n0, int64_t n1) {
  if (b.row != 1 && b.col != 1) return {nullptr, 0, 0, 0};
  const int64_t size = dtype_size(b.dtype), stretch = (b.row == 1 ? k1 - k0 : n1 - n0) * size;
  const int64_t step = (b.row == 1 ? b.col : b.row) * size, rows = b.row == 1 ? n1 - n0 : k1 - k0;
  const char* data = static_cast<const char*>(b.data) + (k0 * b.row + n0 * b.col) * size;
  if (step == stretch) return {data, 0, 1, ceil_divide(rows * stretch, 64)};
  return {data, step, rows, ceil_divide(stretch, 64)};
}

void fetch(const cpu::Ahead& a) {
  for (int64_t row = 0; row < a.rows; row++)
    for (int64_t line = 0; line < a.lines; line++)
      __builtin_prefetch(a.data + row * a.step + line * 64, 0, 2);
}

const cpu::Dropout* if_any(const cpu::Dropout& d) { return d.drops() ? &d : nullptr; }

/// Few rows whose right operand has contiguous columns: every element is a dot product.
bool as_dots(int64_t rows, const Matrix& b) { return rows <= kGemmDots && b.row == 1; }

/// Whole rows as floats, padded with zeros to full stretches, for dot products with columns of `b`.
void widen_whole(const Matrix& a, const Matrix& b, const int64_t* rows, int64_t i0, int64_t i1, int64_t k,
                 const cpu::Dropout* dropout, int64_t stride, float* to) {
  for (int64_t i = 0; i < i1 - i0; i++)
    for (int64_t at = std::max<int64_t>(0, stride - kGemmStretch); at < stride; at++) to[i * stride + at] = 0;
  kernels().gemm_widen(a, rows, i0, i1, 0, k, dropout, stride, b.dtype == kBF16, to);
}

/// One block of rows and columns of a skinny product.
struct ShrinkBlock {
  const Shrink* part;
  int64_t begin, end, n0, n1;
  bool dots;
};

/// The blocks of all parts; where rows are too few for every thread, dot products are dealt out by columns.
std::vector<ShrinkBlock> blocks_of(const std::vector<Shrink>& parts, int threads) {
  std::vector<ShrinkBlock> blocks;
  int64_t m = 0;
  for (const Shrink& p : parts) m += p.end - p.begin;
  const int64_t rows = std::min(kShrinkRows, up_to(ceil_divide(m, 2 * threads), kShrinkTile));
  for (const Shrink& p : parts) {
    const bool dots = as_dots(p.end - p.begin, p.factor);
    const int64_t width = dots && int(parts.size()) < threads ? kShrinkDots : kGemmWidth;
    for (int64_t i = p.begin; i < p.end; i += rows)
      for (int64_t n = 0; n < p.rank; n += width)
        blocks.push_back({&p, i, std::min(p.end, i + rows), n, std::min(p.rank, n + width), dots});
  }
  return blocks;
}

/// A skinny product in blocks. Threads take them when they come by: nobody waits for a product as a whole.
/// One who has taken a block must run it soon, as all wait for it in the end.
class Skinny {
 public:
  Skinny(float* low, int64_t low_stride, const Matrix& a, int64_t k, const int64_t* rows,
         const std::vector<Shrink>& parts, const cpu::Dropout& dropout, int threads)
      : out_{low, kF32, low_stride, 1, nullptr, nullptr},
        a_(a),
        k_(k),
        rows_(rows),
        dropout_(dropout),
        threads_(std::max(1, threads)),
        stride_(up_to(std::max<int64_t>(k, 1), kGemmStretch)),
        blocks_(blocks_of(parts, threads_)),
        rooms_(threads_,
               kTile + kGemmDepth * kGemmWidth + std::max(kShrinkRows * kGemmDepth, kGemmDots * stride_)) {}

  int64_t count() const { return int64_t(blocks_.size()); }

  /// Whether there is a block left, which is `c` then.
  bool take(int64_t& c) {
    if (next_.load(std::memory_order_relaxed) >= count()) return false;
    return (c = next_.fetch_add(1, std::memory_order_relaxed)) < count();
  }
  /// The part of the factor that a block reads.
  cpu::Ahead needs(int64_t c) const {
    const ShrinkBlock& b = blocks_[size_t(c)];
    return ahead(b.part->factor, 0, k_, b.n0, b.n1);
  }
  void do_taken(int64_t c, int slot) {
    run(c, slot);
    done_.fetch_add(1, std::memory_order_release);
  }

  /// Must not throw: other threads wait for what one has taken.
  void run(int64_t c, int slot) const noexcept {
    const ShrinkBlock& b = blocks_[size_t(c)];
    const Matrix& factor = b.part->factor;
    const int64_t count = b.end - b.begin;
    float *sums = rooms_.of(slot), *panels = sums + kTile, *wide = panels + kGemmDepth * kGemmWidth;
    if (!k_) memset(sums, 0, size_t(kTile) * sizeof(float));
    if (b.dots && k_) {
      widen_whole(a_, factor, rows_, b.begin, b.end, k_, if_any(dropout_), stride_, wide);
      kernels().gemm_dots(factor, b.n0, b.n1, wide, count, stride_, k_, sums);
    }
    for (int64_t k0 = 0; k0 < k_ && !b.dots; k0 += kGemmDepth) {
      const int64_t k1 = std::min(k_, k0 + kGemmDepth);
      kernels().gemm_widen(a_, rows_, b.begin, b.end, k0, k1, if_any(dropout_), kGemmDepth, false, wide);
      kernels().gemm_pack(factor, nullptr, k0, k1, b.n0, b.n1, 1, nullptr, panels);
      kernels().gemm_multiply(wide, count, panels, b.n1 - b.n0, k1 - k0, sums, k0 > 0, nullptr, 0);
    }
    kernels().gemm_finish(sums, out_, rows_, b.begin, b.end, b.n0, b.n1);
  }

  /// Takes blocks until there are none, and waits for those that other threads took.
  void finish(int slot) {
    for (int64_t c; take(c);) do_taken(c, slot);
    while (done_.load(std::memory_order_acquire) < count()) std::this_thread::yield();
  }

 private:
  static constexpr int64_t kTile = kShrinkRows * kGemmWidth;

  const cpu::GemmOut out_;
  const Matrix a_;
  const int64_t k_;
  const int64_t* const rows_;
  const cpu::Dropout dropout_;
  const int threads_;
  const int64_t stride_;
  const std::vector<ShrinkBlock> blocks_;
  const Rooms rooms_;
  std::atomic<int64_t> next_{0}, done_{0};
};

/// Up to kGemmRows rows of a product, by columns over threads.
class RowsOfProduct {
 public:
  RowsOfProduct(const Product& job, int64_t i0, int64_t i1, int threads, Skinny* low)
      : job_(job),
        low_(low),
        i0_(i0),
        i1_(i1),
        count_(i1 - i0),
        threads_(threads),
        dots_(as_dots(job.m, job.b)),
        width_(dots_ ? kDotsWidth : kGemmWidth),
        blocks_(ceil_divide(job.k, kGemmDepth)),
        stride_(dots_ ? up_to(job.k, kGemmStretch) : kGemmDepth),
        wide_(size_t(count_ * std::max<int64_t>(1, dots_ ? stride_ : blocks_ * kGemmDepth)) * sizeof(float)) {
  }

  void run() {
    widen();
    const int64_t tile = count_ * kGemmWidth, chunks = ceil_divide(job_.n, width_);
    const bool extends = !job_.extensions.empty();
    const Rooms rooms(std::min<int64_t>(threads_, chunks), (job_.dropout.drops() ? 2 : 1) * tile +
                                                               kGemmDepth * kGemmWidth +
                                                               (extends ? count_ * kGemmDepth : 0));
    parallel_chunks(chunks, threads_, [&](int64_t c, int slot) {
      float* sums = rooms.of(slot);
      float* panels = sums + tile;
      const int64_t n0 = c * width_, n1 = std::min(job_.n, n0 + width_);
      frozen(n0, n1, sums, panels, slot);
      if (low_) low_->finish(slot);
      adapted(n0, n1, sums, panels, panels + kGemmDepth * kGemmWidth);
    });
  }

 private:
  float* wide() const { return reinterpret_cast<float*>(wide_.data()); }
  int64_t depth(int64_t block) const { return std::min(kGemmDepth, job_.k - block * kGemmDepth); }

  void widen() {
    if (dots_) return widen_whole(job_.a, job_.b, job_.rows, i0_, i1_, job_.k, nullptr, stride_, wide());
    constexpr int64_t kBatch = 32;
    const int64_t batches = ceil_divide(count_, kBatch);
    parallel_chunks(blocks_ * batches, threads_, [&](int64_t c, int) {
      const int64_t block = c / batches, first = c % batches * kBatch, k = block * kGemmDepth;
      kernels().gemm_widen(job_.a, job_.rows, i0_ + first, i0_ + std::min(count_, first + kBatch), k,
                           k + depth(block), nullptr, kGemmDepth, false,
                           wide() + (block * count_ + first) * kGemmDepth);
    });
  }

  static void add(const cpu::Ahead& a, std::vector<cpu::Ahead>& asked) {
    if (a.rows) asked.push_back(a);
  }

  /// Adds what is packed after this block: the next one, or the first of the next columns.
  void next(int64_t block, int64_t n0, int64_t n1, std::vector<cpu::Ahead>& asked) const {
    const int64_t k = (block + 1) * kGemmDepth, last = std::min(job_.n, n1 + width_);
    if (k < job_.k)
      add(ahead(job_.b, k, k + depth(block + 1), n0, n1), asked);
    else if (n1 < last)
      add(ahead(job_.b, 0, depth(0), n1, last), asked);
  }

  /// Adds a share of what the extensions will read: many adapters together are much.
  void announce(int64_t step, int64_t steps, int64_t n0, int64_t n1, std::vector<cpu::Ahead>& asked) const {
    const int64_t count = int64_t(job_.extensions.size());
    for (int64_t i = step * count / steps; i < (step + 1) * count / steps; i++) {
      const Extension& e = job_.extensions[size_t(i)];
      if (e.begin < i1_ && e.end > i0_) add(ahead(e.high, 0, e.rank, n0, n1), asked);
    }
  }

  void frozen(int64_t n0, int64_t n1, float* sums, float* panels, int slot) const {
    if (!blocks_) memset(sums, 0, size_t(count_ * kGemmWidth) * sizeof(float));
    std::vector<cpu::Ahead> asked;
    asked.reserve(job_.extensions.size() + 3);  // nothing throws below
    if (dots_ && blocks_) {
      announce(0, 1, n0, n1, asked);
      for (const cpu::Ahead& a : asked) fetch(a);
      kernels().gemm_dots(job_.b, n0, n1, wide(), count_, stride_, job_.k, sums);
    }
    const int64_t early = blocks_ / 2;  // what extensions read would be gone from the caches by their time
    for (int64_t block = 0; block < blocks_ && !dots_; block++) {
      const int64_t k = block * kGemmDepth;
      int64_t beside;  // a block of the skinny product, whose factor comes while this one computes
      const bool takes = low_ && low_->take(beside);
      asked.clear();
      next(block, n0, n1, asked);
      if (takes) add(low_->needs(beside), asked);
      if (block >= early) announce(block - early, blocks_ - early, n0, n1, asked);
      kernels().gemm_pack(job_.b, nullptr, k, k + depth(block), n0, n1, 1, nullptr, panels);
      multiply(block, n1 - n0, panels, sums, asked);
      if (takes) low_->do_taken(beside, slot);
    }
  }

  /// Many rows in pieces, of which each asks for the next, and the first for the rest.
  void multiply(int64_t block, int64_t width, const float* panels, float* sums,
                std::vector<cpu::Ahead>& asked) const {
    const int64_t pieces = ceil_divide(count_, kPiece);
    const auto row = [&](int64_t at, int64_t i) { return wide() + (at * count_ + i) * kGemmDepth; };
    for (int64_t p = 0; p < pieces; p++) {
      const int64_t first = p * count_ / pieces, last = (p + 1) * count_ / pieces;
      const float* then = p + 1 < pieces ? row(block, last) : row((block + 1) % blocks_, 0);
      if (pieces > 1)
        asked.push_back({reinterpret_cast<const char*>(then), 0, 1,
                         (last - first) * kGemmDepth * int64_t(sizeof(float)) / 64});
      kernels().gemm_multiply(row(block, first), last - first, panels, width, depth(block),
                              sums + first * kGemmWidth, block > 0, asked.data(), int64_t(asked.size()));
      asked.clear();
    }
  }

  void adapted(int64_t n0, int64_t n1, float* sums, float* panels, float* room) const {
    for (const Extension& e : job_.extensions) {
      const int64_t begin = std::max(e.begin, i0_), end = std::min(e.end, i1_);
      if (begin < end) extend(e, begin, end, n0, n1, sums + (begin - i0_) * kGemmWidth, panels, room);
    }
    kernels().gemm_finish(sums, job_.out, job_.rows, i0_, i1_, n0, n1);
  }

  void extend(const Extension& e, int64_t begin, int64_t end, int64_t n0, int64_t n1, float* sums,
              float* panels, float* room) const {
    const bool drops = job_.dropout.drops();
    if (!drops && end - begin <= kGemmDots && expand(e, begin, end, n0, n1, sums)) return;
    const Matrix low{e.low, kF32, e.low_stride, 1};
    float* to = drops ? room + count_ * kGemmDepth : sums;
    for (int64_t k = 0; k < e.rank; k += kGemmDepth) {
      const int64_t last = std::min(e.rank, k + kGemmDepth);
      kernels().gemm_widen(low, job_.rows, begin, end, k, last, nullptr, kGemmDepth, false, room);
      kernels().gemm_pack(e.high, nullptr, k, last, n0, n1, e.scale, nullptr, panels);
      kernels().gemm_multiply(room, end - begin, panels, n1 - n0, last - k, to, !drops || k > 0, nullptr, 0);
    }
    if (drops) kernels().gemm_add_kept(sums, to, job_.rows, begin, end, n0, n1, job_.dropout);
  }

  /// The same sums for very few rows, without a panel; false where there is no such kernel.
  bool expand(const Extension& e, int64_t begin, int64_t end, int64_t n0, int64_t n1, float* sums) const {
    for (int64_t i = begin; i < end; i++, sums += kGemmWidth) {
      const float* low = e.low + (job_.rows ? job_.rows[i] : i) * e.low_stride;
      if (!kernels().gemm_expand(e.high, e.rank, n0, n1, e.scale, low, sums)) return false;
    }
    return true;
  }

  const Product& job_;
  Skinny* const low_;  // what the extensions wait for; may be null
  const int64_t i0_, i1_, count_;
  const int threads_;
  const bool dots_;
  const int64_t width_, blocks_, stride_;
  const Scratch wide_;
};

}  // namespace

void product(const Product& job, int threads) {
  for (int64_t i = 0; i < job.m; i += kGemmRows)
    RowsOfProduct(job, i, std::min(job.m, i + kGemmRows), threads, nullptr).run();
}

void product_with(const Product& job, float* low, int64_t low_stride, const std::vector<Shrink>& parts,
                  int threads) {
  Skinny before(low, low_stride, job.a, job.k, job.rows, parts, job.dropout, threads);
  for (int64_t i = 0; i < job.m; i += kGemmRows)
    RowsOfProduct(job, i, std::min(job.m, i + kGemmRows), threads, &before).run();
}

void shrink(float* low, int64_t low_stride, const Matrix& a, int64_t k, const int64_t* rows,
            const std::vector<Shrink>& parts, const cpu::Dropout& dropout, int threads) {
  const Skinny job(low, low_stride, a, k, rows, parts, dropout, threads);
  parallel_chunks(job.count(), threads, [&](int64_t c, int slot) { job.run(c, slot); });
}

void reduce(const Reduce& job, const float* low, int64_t low_stride, const Matrix& a, int64_t n,
            const int64_t* rows, const cpu::Dropout& dropout, int threads) {
  const int64_t m = job.end - job.begin, blocks = ceil_divide(m, kGemmDepth), each = job.rank * kGemmDepth;
  const Scratch turned(size_t(std::max<int64_t>(1, blocks) * each) * sizeof(float));
  float* left = reinterpret_cast<float*>(turned.data());
  const auto row_of = [&](int64_t i) { return rows ? rows[i] : i; };
  parallel_chunks(blocks, threads, [&](int64_t block, int) {
    for (int64_t k = 0; k < std::min(kGemmDepth, m - block * kGemmDepth); k++) {
      const float* from = low + row_of(job.begin + block * kGemmDepth + k) * low_stride;
      for (int64_t r = 0; r < job.rank; r++) left[block * each + r * kGemmDepth + k] = job.scale * from[r];
    }
  });
  const int64_t chunks = ceil_divide(n, kGemmWidth), tile = job.rank * kGemmWidth;
  const Rooms rooms(std::min<int64_t>(threads, chunks), tile + kGemmDepth * kGemmWidth);
  parallel_chunks(chunks, threads, [&](int64_t c, int slot) {
    const int64_t n0 = c * kGemmWidth, n1 = std::min(n, n0 + kGemmWidth);
    float *sums = rooms.of(slot), *panels = sums + tile;
    if (!blocks) memset(sums, 0, size_t(tile) * sizeof(float));
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t k0 = job.begin + block * kGemmDepth, k1 = std::min(job.end, k0 + kGemmDepth);
      kernels().gemm_pack(a, rows, k0, k1, n0, n1, 1, if_any(dropout), panels);
      kernels().gemm_multiply(left + block * each, job.rank, panels, n1 - n0, k1 - k0, sums, block > 0,
                              nullptr, 0);
    }
    kernels().gemm_finish(sums, job.out, nullptr, 0, job.rank, n0, n1);
  });
}

}  // namespace pk
