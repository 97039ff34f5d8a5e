#include "lora.h"

#include <algorithm>

#include "isa.h"
#include "process.h"

namespace pk {
namespace {

using cpu::MergeLora;

constexpr int64_t kPanelsAtOnce = 16;  // packed by a thread at a time

/// Right in the order that the kernels read it, for as long as this lives.
class Panels {
 public:
  Panels(const float* right, int64_t rank, int64_t cols, int dtype, int threads)
      : memory_(size_t(count(cols) * kernels().panel_width() * std::max<int64_t>(rank, 1)) * sizeof(float)) {
    const int64_t panels = count(cols);
    parallel_chunks((panels + kPanelsAtOnce - 1) / kPanelsAtOnce, threads, [&](int64_t c, int) {
      kernels().pack_panels(right, rank, cols, dtype, data(), c * kPanelsAtOnce, (c + 1) * kPanelsAtOnce);
    });
  }
  float* data() const { return reinterpret_cast<float*>(memory_.data()); }

 private:
  static int64_t count(int64_t cols) {
    const int64_t width = kernels().panel_width();
    return (cols + width - 1) / width;
  }
  Scratch memory_;
};

template <class Work>
void over_rows(int64_t rows, int64_t step, int threads, Work&& work) {
  parallel_chunks((rows + step - 1) / step, threads,
                  [&](int64_t c, int) { work(c * step, std::min(rows, (c + 1) * step)); });
}

}  // namespace

void merge_lora(MergeLora job, const float* right, const float* scale, bool by_column, int threads) {
  if (job.rows * job.cols == 0) return;
  const Panels panels(right, job.rank, job.cols, job.dtype, threads);
  const Panels scales(scale, 1, scale && by_column ? job.cols : 0, job.dtype, threads);
  job.panels = panels.data();
  if (scale) (by_column ? job.column_scale : job.row_scale) = by_column ? scales.data() : scale;
  over_rows(job.rows, cpu::kLoraRows, threads,
            [&](int64_t begin, int64_t end) { kernels().merge_lora(job, begin, end); });
}

void lora_squares(MergeLora job, const float* right, bool by_column, double* sums, int threads) {
  if (job.rows * job.cols == 0) return;
  const Panels panels(right, job.rank, job.cols, job.dtype, threads);
  job.panels = panels.data();
  over_rows(job.rows, cpu::kSquareRows, threads,
            [&](int64_t begin, int64_t end) { kernels().lora_squares(job, by_column, sums, begin, end); });
}

}  // namespace pk
