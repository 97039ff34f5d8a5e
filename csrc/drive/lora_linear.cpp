#include "lora_linear.h"

#include <algorithm>

#include "process.h"

namespace pk {
namespace {

cpu::Matrix turned(const cpu::Matrix& m) { return {m.data, m.dtype, m.col, m.row}; }

/// Rows in the order of their adapters, those without one first, and where each adapter's begin.
struct Order {
  std::vector<int64_t> rows, begin;

  Order(const int64_t* index, int64_t m, size_t adapters) : rows(size_t(m)), begin(adapters + 2) {
    for (int64_t i = 0; i < m; i++) begin[size_t(index[i] + 2)]++;
    for (size_t a = 1; a < begin.size(); a++) begin[a] += begin[a - 1];
    std::vector<int64_t> next = begin;
    for (int64_t i = 0; i < m; i++) rows[size_t(next[size_t(index[i] + 1)]++)] = i;
  }
};

}  // namespace

void lora_linear(const LoraLinear& job, int threads) {
  const cpu::Dropout nothing{65536, 0, 0, job.k};
  int64_t widest = 1;
  for (const LowRank& a : job.adapters) widest = std::max(widest, a.rank);
  const Scratch memory(size_t(job.m * widest) * sizeof(float));
  float* low = reinterpret_cast<float*>(memory.data());
  Product product_job{job.out, job.x, turned(job.weight), job.m, job.n, job.k, nullptr, {}, nothing};
  std::vector<Shrink> parts;
  const auto add = [&](const LowRank& a, int64_t begin, int64_t end) {
    if (begin == end) return;
    parts.push_back({begin, end, a.rank, turned(a.a)});
    product_job.extensions.push_back({begin, end, a.rank, low, widest, turned(a.b), a.scale});
  };
  if (!job.index) {
    add(job.adapters[0], 0, job.m);
    return product_with(product_job, low, widest, parts, threads);
  }
  const Order order(job.index, job.m, job.adapters.size());
  for (size_t a = 0; a < job.adapters.size(); a++)
    add(job.adapters[a], order.begin[a + 1], order.begin[a + 2]);
  product_job.rows = order.rows.data();
  product_with(product_job, low, widest, parts, threads);
}

}  // namespace pk
