#include "lora.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace pk {
namespace {

using cpu::LowRank;
using cpu::MergeLora;

constexpr int64_t kPanelsAtOnce = 16;  // packed by a thread at a time

/// The right sides in the order that the kernels read them, for as long as this lives.
class Panels {
 public:
  Panels(const MergeLora& job, int threads)
      : memory_(size_t(count(job) * kernels().panel_width() * std::max<int64_t>(job.rank, 1)) *
                sizeof(float)) {
    const int64_t panels = count(job);
    parallel_chunks((panels + kPanelsAtOnce - 1) / kPanelsAtOnce, threads, [&](int64_t c, int) {
      kernels().pack_panels(job, data(), c * kPanelsAtOnce, (c + 1) * kPanelsAtOnce);
    });
  }
  float* data() const { return reinterpret_cast<float*>(memory_.data()); }

 private:
  static int64_t count(const MergeLora& job) {
    const int64_t width = kernels().panel_width();
    return job.rank ? (job.cols + width - 1) / width : 0;
  }
  Scratch memory_;
};

/// Stretches of `step` rows over threads, each of which has room for the left sides of one.
template <class Work>
void over_rows(const MergeLora& job, int64_t step, int threads, Work&& work) {
  const int64_t chunks = (job.rows + step - 1) / step, room = step * job.rank;
  const Scratch left(size_t(std::min<int64_t>(threads, chunks) * room) * sizeof(float));
  parallel_chunks(chunks, threads, [&](int64_t c, int slot) {
    work(c * step, std::min(job.rows, (c + 1) * step), reinterpret_cast<float*>(left.data()) + slot * room);
  });
}

MergeLora with_factors(MergeLora job, const std::vector<LowRank>& factors) {
  job.factors = factors.data();
  job.count = int64_t(factors.size());
  job.rank = 0;
  for (const LowRank& f : factors) job.rank += f.rank;
  return job;
}

}  // namespace

void merge_lora(const MergeLora& weight, const std::vector<LowRank>& factors, const float* scale,
                bool by_column, int threads) {
  if (weight.rows * weight.cols == 0) return;
  MergeLora job = with_factors(weight, factors);
  const Panels panels(job, threads);
  const LowRank line{{}, {scale, kF32, 0, 1}, scale && by_column ? 1 : 0, 1, 1};
  const Panels scales(with_factors(weight, {line}), threads);
  job.panels = panels.data();
  if (scale) (by_column ? job.column_scale : job.row_scale) = by_column ? scales.data() : scale;
  over_rows(job, cpu::kLoraRows, threads,
            [&](int64_t begin, int64_t end, float* left) { kernels().merge_lora(job, begin, end, left); });
}

void lora_squares(const MergeLora& weight, const LowRank& factor, bool by_column, double* sums, int threads) {
  if (weight.rows * weight.cols == 0) return;
  const std::vector<LowRank> factors{factor};
  MergeLora job = with_factors(weight, factors);
  const Panels panels(job, threads);
  job.panels = panels.data();
  over_rows(job, cpu::kSquareRows, threads, [&](int64_t begin, int64_t end, float* left) {
    kernels().lora_squares(job, by_column, sums, begin, end, left);
  });
}

}  // namespace pk
