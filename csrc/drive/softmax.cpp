#include "softmax.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "rooms.h"

namespace pk {
namespace {

using cpu::Answer;
using cpu::kSplit;
using cpu::RowSum;
using cpu::Softmax;
using cpu::SoftmaxBackward;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Blocks of columns, one to a thread at a time.
template <class Work>
void over_columns(int64_t outer, int64_t inner, int64_t width, int64_t floats, int threads, Work&& work) {
  const int64_t blocks = ceil_divide(inner, width);
  const Rooms scratch(std::min<int64_t>(threads, outer * blocks), floats);
  parallel_chunks(outer * blocks, threads,
                  [&](int64_t c, int slot) { work(c / blocks, c % blocks * width, scratch.of(slot)); });
}

/// Rows, a batch of short ones to a thread at a time.
template <class Work>
void over_rows(int64_t rows, int64_t n, int threads, Work&& work) {
  const int64_t batch = std::max<int64_t>(1, cpu::kRowBatch / std::max<int64_t>(n, 1));
  parallel_chunks(ceil_divide(rows, batch), threads,
                  [&](int64_t c, int slot) { work(c * batch, std::min(rows, (c + 1) * batch), slot); });
}

/// Long rows: a thread each where there are enough of them, or one has but a piece; else one after another,
/// each by all threads.
template <class Work>
void over_long_rows(int64_t rows, int64_t n, int threads, Work&& work) {
  if (rows >= 4 * int64_t(threads) || n <= kSplit)
    parallel_chunks(rows, threads, [&](int64_t row, int slot) { work(row, 1, slot); });
  else
    for (int64_t row = 0; row < rows; row++) work(row, threads, 0);
}

/// Calls work(piece, begin, end) for the fixed pieces of a row of n elements.
template <class Work>
void over_pieces(int64_t n, int threads, Work&& work) {
  parallel_chunks(ceil_divide(n, kSplit), threads,
                  [&](int64_t c, int) { work(c, c * kSplit, std::min(n, (c + 1) * kSplit)); });
}

/// The same without the piece's number, the last pieces first: those a cache still has from the pass before.
template <class Work>
void back_over_pieces(int64_t n, int threads, Work&& work) {
  const int64_t last = ceil_divide(n, kSplit) - 1;
  over_pieces(n, threads, [&](int64_t c, int64_t, int64_t) {
    const int64_t begin = (last - c) * kSplit;
    work(begin, std::min(n, begin + kSplit));
  });
}

class LongRow {
 public:
  /// `stored`: where the row's exponentials are kept; null where they are computed twice.
  LongRow(const Softmax& job, int64_t row, int threads, float* stored)
      : job_(job), row_(row), threads_(threads), stored_(stored), sums_(size_t(ceil_divide(job.n, kSplit))) {
    if (job.sink) sink_ = job.sink[row * job.sink_stride[0]];
    if (stored) exponents_.resize(size_t(ceil_divide(job.n, cpu::kBlock)));
  }

  void run() {
    add_up();
    const Answer answer = needs_maximum() ? from_maximum() : conclude();
    if (job_.kind == cpu::kLogSumExp) return kernels().softmax_write(job_, row_, 0, 0, shift_, answer);
    back_over_pieces(job_.n, threads_, [&](int64_t begin, int64_t end) {
      if (stored_)
        kernels().softmax_scale(job_, row_, begin, end, stored_, exponents_.data(), answer);
      else
        kernels().softmax_write(job_, row_, begin, end, shift_, answer);
    });
  }

 private:
  void add_up() {
    over_pieces(job_.n, threads_, [&](int64_t c, int64_t begin, int64_t end) {
      sums_[size_t(c)] =
          stored_ ? kernels().softmax_store(job_, row_, begin, end, shift_, stored_, exponents_.data())
                  : kernels().softmax_sum(job_, row_, begin, end, shift_);
    });
  }
  Answer conclude() const {
    return kernels().softmax_answer(job_, row_, sums_.data(), int64_t(sums_.size()), shift_);
  }

  /// Whether some z or the sink is beyond what the exponentials take, or nothing is within.
  bool needs_maximum() const {
    bool raised = std::abs(sink_) < kLargest, bad = sink_ >= kLargest;
    for (const RowSum& s : sums_) {
      raised |= s.raised;
      bad |= s.bad;
    }
    return bad || !raised;
  }

  /// The rare rows: shifted by their maximum, which is exact where it matters, since numbers of 1e6 or more
  /// are multiples of 1/16.
  Answer from_maximum() {
    std::vector<cpu::RowScan> found(sums_.size());
    over_pieces(job_.n, threads_, [&](int64_t c, int64_t begin, int64_t end) {
      found[size_t(c)] = kernels().softmax_scan(job_, row_, begin, end);
    });
    float most = -std::numeric_limits<float>::infinity();
    bool nan = std::isnan(sink_);
    if (!nan) most = sink_;
    for (const cpu::RowScan& s : found) {
      most = std::max(most, s.largest);
      nan |= s.nan;
    }
    if (std::isinf(most)) return kernels().softmax_infinite(job_, most, nan);
    shift_ = most;
    add_up();
    return conclude();
  }

  static constexpr float kLargest = 1e6f;
  const Softmax& job_;
  const int64_t row_;
  const int threads_;
  float* const stored_;
  std::vector<RowSum> sums_;
  std::vector<int> exponents_;  // of the blocks at `stored_`
  float sink_ = -std::numeric_limits<float>::infinity();
  float shift_ = 0;
};

/// Whether results go past the cache: those that it would not keep, where every row starts on a line.
template <class Rows>
bool streams(const Rows& job) {
  return job.out_dtype == kF32 && uintptr_t(job.out) % 64 == 0 && (job.outer == 1 || job.n % 16 == 0) &&
         (job.n >= cpu::kStreamed || job.outer * job.n >= kernels().softmax_regime().streamed);
}

/// Whether a row's exponentials are stored block by block. A row of one block is no matter of blocks.
bool stores(const Softmax& job) {
  return job.kind == cpu::kSoftmax && job.out_dtype == kF32 && job.n > cpu::kBlock &&
         job.n <= kernels().softmax_regime().stored;
}

/// The longest row that is taken whole, in three passes over what a cache holds.
int64_t longest_whole(const Softmax& job) {
  if (job.out_dtype != kF32) return cpu::kCachedHalves;
  return job.plain() ? cpu::kCachedFloats : cpu::kLoadedFloats;
}

/// They wait in the result, unless that is x, which a row that turns out to be rare is read from again.
void softmax_of_stored(const Softmax& job, int threads) {
  const auto run = [&](int64_t row, int some, float* w) { LongRow(job, row, some, w).run(); };
  if (job.stream || job.out == job.x) {
    const Rooms scratch(std::min<int64_t>(threads, job.outer), job.n + cpu::kSlack);
    return over_long_rows(job.outer, job.n, threads,
                          [&](int64_t row, int some, int slot) { run(row, some, scratch.of(slot)); });
  }
  over_long_rows(job.outer, job.n, threads, [&](int64_t row, int some, int) {
    run(row, some, static_cast<float*>(job.out) + row * job.n);
  });
}

void softmax_of_columns(const Softmax& job, int threads) {
  if (job.inner < cpu::kColumns) {
    const int64_t floats = std::min(job.n, cpu::kColumnRows) * job.inner + cpu::kSlack;
    const Rooms scratch(std::min<int64_t>(threads, job.outer), floats);
    return over_rows(job.outer, job.n * job.inner, threads, [&](int64_t begin, int64_t end, int slot) {
      for (int64_t outer = begin; outer < end; outer++)
        kernels().softmax_narrow(job, outer, scratch.of(slot));
    });
  }
  const int64_t rows = std::max<int64_t>(1, std::min(job.n, cpu::kColumnRows));
  const int64_t tiles = std::min({cpu::kColumnTiles, cpu::kColumnFloats / (rows * cpu::kColumns),
                                  ceil_divide(job.inner, cpu::kColumns)});
  over_columns(job.outer, job.inner, tiles * cpu::kColumns, tiles * (rows * cpu::kColumns + cpu::kSlack),
               threads, [&](int64_t outer, int64_t first, float* scratch) {
                 kernels().softmax_columns(job, outer, first, int(tiles), scratch);
               });
}

}  // namespace

void softmax(const Softmax& given, int threads) {
  if (given.outer * given.inner == 0 || (given.n == 0 && given.kind != cpu::kLogSumExp)) return;
  if (given.inner > 1) return softmax_of_columns(given, threads);
  Softmax job = given;
  job.stream = job.kind != cpu::kLogSumExp && job.out != job.x && streams(job);
  if (stores(job)) return softmax_of_stored(job, threads);
  if (job.n > longest_whole(job))
    return over_long_rows(job.outer, job.n, threads,
                          [&](int64_t row, int some, int) { LongRow(job, row, some, nullptr).run(); });
  if (job.outer * job.n <= cpu::kBlock) {  // locks and threads would take longer than the rows
    const PlainFloats plain;
    alignas(64) float scratch[cpu::kBlock + cpu::kSlack];
    return kernels().softmax_rows(job, 0, job.outer, scratch);
  }
  const int64_t floats = std::max(job.n, cpu::kTogetherFloats) + cpu::kSlack;
  const Rooms scratch(std::min<int64_t>(threads, job.outer), floats);
  over_rows(job.outer, job.n, threads, [&](int64_t begin, int64_t end, int slot) {
    kernels().softmax_rows(job, begin, end, scratch.of(slot));
  });
}

void softmax_backward(const SoftmaxBackward& given, int threads) {
  if (given.outer * given.n * given.inner == 0) return;
  SoftmaxBackward job = given;
  job.stream = job.inner == 1 && job.out != job.grad && job.out != job.y && streams(job);
  if (job.inner > 1) {
    const int64_t floats = 2 * (cpu::kColumnRows * cpu::kColumns + cpu::kSlack);
    return over_columns(job.outer, job.inner, cpu::kColumns, floats, threads,
                        [&](int64_t outer, int64_t first, float* scratch) {
                          kernels().softmax_backward_columns(job, outer, first, scratch);
                        });
  }
  const auto whole_row = [&](int64_t row, int some, int) {
    std::vector<double> sums(size_t(ceil_divide(job.n, kSplit)));
    over_pieces(job.n, some, [&](int64_t c, int64_t begin, int64_t end) {
      sums[size_t(c)] = kernels().softmax_backward_sum(job, row, begin, end);
    });
    double total = 0;
    for (double s : sums) total += s;
    back_over_pieces(job.n, some, [&](int64_t begin, int64_t end) {
      kernels().softmax_backward_write(job, row, begin, end, float(total));
    });
  };
  if (job.n > kSplit) return over_long_rows(job.outer, job.n, threads, whole_row);
  over_rows(job.outer, job.n, threads,
            [&](int64_t begin, int64_t end, int) { kernels().softmax_backward_rows(job, begin, end); });
}

}  // namespace pk
