// The only file that knows pybind11: addresses, sizes and codes in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings_tensors.h"
#include "drive/gemm.h"
#include "drive/isa.h"
#include "drive/lora.h"
#include "drive/merge.h"
#include "drive/parallel.h"
#include "drive/softmax.h"

namespace py = pybind11;

namespace {

using Addresses = std::vector<uintptr_t>;
using Floats = std::vector<float>;
using Counts = std::vector<int64_t>;
using Words = std::vector<uint32_t>;

const void* at(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* at_mutable(uintptr_t address) { return reinterpret_cast<void*>(address); }

/// Tensors as addresses; owns the array of pointers that Inputs refers to.
struct Tensors {
  std::vector<const void*> pointers;
  pk::Inputs in;

  Tensors(int dtype, uintptr_t base, const Addresses& tuned, int64_t numel) {
    if (tuned.size() > size_t(pk::cpu::kMaxModels)) throw std::invalid_argument("at most 64 tensors");
    for (uintptr_t a : tuned) pointers.push_back(at(a));
    in = {dtype, at(base), pointers.data(), int(pointers.size()), numel};
  }
};

pk::Task task_of(const Tensors& t, uintptr_t out, int out_dtype, Floats weight, int threads) {
  pk::Task task{};
  task.in = t.in;
  task.out = at_mutable(out);
  task.out_dtype = out_dtype;
  task.weight = std::move(weight);
  task.lambda = 1;
  task.threads = threads;
  return task;
}

void linear_merge(uintptr_t out, int out_dtype, int dtype, uintptr_t base, const Addresses& tuned,
                  int64_t numel, Floats weight, int threads) {
  const Tensors t(dtype, base, tuned, numel);
  py::gil_scoped_release release;
  pk::linear_merge(task_of(t, out, out_dtype, std::move(weight), threads));
}

void ties_merge(uintptr_t out, int out_dtype, int dtype, uintptr_t base, const Addresses& tuned,
                int64_t numel, const Words& key, const Counts& last, Floats weight, Floats vote, Floats share,
                float lambda, int combine, int64_t offset, int threads) {
  const Tensors t(dtype, base, tuned, numel);
  py::gil_scoped_release release;
  pk::Task task = task_of(t, out, out_dtype, std::move(weight), threads);
  task.vote = std::move(vote);
  task.share = std::move(share);
  task.lambda = lambda;
  task.combine = combine;
  task.offset = offset;
  std::vector<pk::Cut> cuts;
  for (size_t m = 0; m < key.size(); m++) cuts.push_back({key[m], last[m]});
  pk::ties_merge(task, cuts);
}

void ties_fused(uintptr_t out, int out_dtype, int dtype, uintptr_t base, const Addresses& tuned,
                int64_t numel, const Counts& k, bool keep_equals, Floats weight, Floats vote, Floats share,
                float lambda, int combine, int threads) {
  const Tensors t(dtype, base, tuned, numel);
  py::gil_scoped_release release;
  pk::Task task = task_of(t, out, out_dtype, std::move(weight), threads);
  task.vote = std::move(vote);
  task.share = std::move(share);
  task.lambda = lambda;
  task.combine = combine;
  pk::ties_fused(task, k.data(), keep_equals);
}

void dare_merge(uintptr_t out, int out_dtype, int dtype, uintptr_t base, const Addresses& tuned,
                int64_t numel, Words threshold, Words index, uint64_t key, Floats weight, Floats vote,
                Floats share, float lambda, int combine, int64_t offset, int threads) {
  const Tensors t(dtype, base, tuned, numel);
  py::gil_scoped_release release;
  pk::Task task = task_of(t, out, out_dtype, std::move(weight), threads);
  task.threshold = std::move(threshold);
  task.index = std::move(index);
  task.key = key;
  task.vote = std::move(vote);
  task.share = std::move(share);
  task.lambda = lambda;
  task.combine = combine;
  task.offset = offset;
  pk::dare_merge(task);
}

void l1_norms(uintptr_t sums, int dtype, uintptr_t base, const Addresses& tuned, int64_t numel,
              Words threshold, Words index, uint64_t key, int64_t offset, int threads) {
  const Tensors t(dtype, base, tuned, numel);
  py::gil_scoped_release release;
  pk::Task task = task_of(t, 0, pk::kF32, {}, threads);
  task.threshold = std::move(threshold);
  task.index = std::move(index);
  task.key = key;
  task.offset = offset;
  pk::l1_norms(task, static_cast<double*>(at_mutable(sums)));
}

void dot_products(uintptr_t sums, int grad_dtype, uintptr_t grad, int dtype, uintptr_t base,
                  const Addresses& tuned, int64_t numel, int threads) {
  const Tensors t(dtype, base, tuned, numel);
  py::gil_scoped_release release;
  pk::dot_products(task_of(t, 0, pk::kF32, {}, threads), grad_dtype, at(grad),
                   static_cast<double*>(at_mutable(sums)));
}

std::pair<Words, Counts> kth_magnitude(int dtype, uintptr_t base, const Addresses& tuned, int64_t numel,
                                       const Counts& k, int threads) {
  const Tensors t(dtype, base, tuned, numel);
  Words key;
  Counts last;
  {
    py::gil_scoped_release release;
    for (const pk::Cut& cut : pk::kth_magnitude(t.in, k.data(), threads)) {
      key.push_back(cut.key);
      last.push_back(cut.last);
    }
  }
  return {key, last};
}

void magnitude_histogram(uintptr_t bins, int dtype, uintptr_t base, const Addresses& tuned, int64_t numel,
                         int shift, const std::optional<Words>& prefix, int threads) {
  const Tensors t(dtype, base, tuned, numel);
  py::gil_scoped_release release;
  pk::histogram(t.in, shift, prefix ? prefix->data() : nullptr, static_cast<int64_t*>(at_mutable(bins)),
                threads);
}

void elect_sign(uintptr_t out, int dtype, const Addresses& deltas, int64_t numel, Floats weight, int combine,
                int threads) {
  const Tensors t(dtype, 0, deltas, numel);
  py::gil_scoped_release release;
  pk::Task task = task_of(t, 0, dtype, std::move(weight), threads);
  task.combine = combine;
  pk::elect_sign(static_cast<int8_t*>(at_mutable(out)), task);
}

void softmax(uintptr_t out, int out_dtype, uintptr_t x, int dtype, int64_t outer, int64_t n, int64_t inner,
             int kind, uintptr_t mask, int mask_kind, const std::array<int64_t, 3>& mask_stride,
             uintptr_t sink, const std::array<int64_t, 2>& sink_stride, float temperature, float softcap,
             bool safe, int threads) {
  py::gil_scoped_release release;
  pk::softmax({kind,
               at_mutable(out),
               at(x),
               out_dtype,
               dtype,
               outer,
               n,
               inner,
               temperature,
               softcap,
               at(mask),
               mask_kind,
               {mask_stride[0], mask_stride[1], mask_stride[2]},
               static_cast<const float*>(at(sink)),
               {sink_stride[0], sink_stride[1]},
               safe,
               false},
              threads);
}

void softmax_backward(uintptr_t out, int out_dtype, uintptr_t grad, int grad_dtype, uintptr_t y, int dtype,
                      int64_t outer, int64_t n, int64_t inner, int kind, float scale, int threads) {
  py::gil_scoped_release release;
  pk::softmax_backward(
      {kind, at_mutable(out), at(grad), at(y), out_dtype, grad_dtype, dtype, outer, n, inner, scale, false},
      threads);
}

/// (address, dtype, stride of rows, stride of columns)
using MatrixOf = std::tuple<uintptr_t, int, int64_t, int64_t>;
/// (threshold, key, columns of the matrix that is dropped from)
using DropoutOf = std::tuple<uint32_t, uint64_t, int64_t>;

pk::cpu::Matrix matrix(const MatrixOf& m) {
  return {at(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m)};
}
pk::cpu::GemmOut target(const MatrixOf& m, uintptr_t bias) {
  return {at_mutable(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m), at(bias), nullptr};
}
pk::cpu::Dropout dropout(const DropoutOf& d) {
  return {std::get<0>(d), uint32_t(std::get<1>(d)), uint32_t(std::get<1>(d) >> 32), std::get<2>(d)};
}

/// (left, right, rank, what left is scaled by, what right is)
using LowRankOf = std::tuple<MatrixOf, MatrixOf, int64_t, double, double>;

pk::cpu::LowRank low_rank(const LowRankOf& f) {
  return {matrix(std::get<0>(f)), matrix(std::get<1>(f)), std::get<2>(f), std::get<3>(f), std::get<4>(f)};
}
pk::cpu::MergeLora lora_weight(uintptr_t out, int out_dtype, uintptr_t weight, int dtype, int64_t rows,
                               int64_t cols) {
  return {at_mutable(out), at(weight), out_dtype, dtype,   rows,    cols,
          nullptr,         0,          0,         nullptr, nullptr, nullptr};
}

void merge_lora(uintptr_t out, int out_dtype, uintptr_t weight, int dtype, int64_t rows, int64_t cols,
                const std::vector<LowRankOf>& factors, uintptr_t scale, bool by_column, int threads) {
  py::gil_scoped_release release;
  std::vector<pk::cpu::LowRank> each;
  for (const LowRankOf& f : factors) each.push_back(low_rank(f));
  pk::merge_lora(lora_weight(out, out_dtype, weight, dtype, rows, cols), each,
                 static_cast<const float*>(at(scale)), by_column, threads);
}

void lora_squares(uintptr_t sums, uintptr_t weight, int dtype, int64_t rows, int64_t cols,
                  const std::vector<LowRankOf>& factors, bool by_column, int threads) {
  py::gil_scoped_release release;
  pk::lora_squares(lora_weight(0, pk::kF32, weight, dtype, rows, cols), low_rank(factors.at(0)), by_column,
                   static_cast<double*>(at_mutable(sums)), threads);
}

using PartOf = std::tuple<int64_t, int64_t, int64_t, MatrixOf>;

std::vector<pk::Shrink> shrinks(const std::vector<PartOf>& parts) {
  std::vector<pk::Shrink> each;
  for (const auto& [begin, end, rank, factor] : parts) each.push_back({begin, end, rank, matrix(factor)});
  return each;
}

void product(const MatrixOf& out, uintptr_t bias, const MatrixOf& a, const MatrixOf& b, int64_t m, int64_t n,
             int64_t k, uintptr_t rows,
             const std::vector<std::tuple<int64_t, int64_t, int64_t, MatrixOf, MatrixOf, float>>& extensions,
             const std::vector<PartOf>& parts, const DropoutOf& drop, int threads) {
  py::gil_scoped_release release;
  pk::Product job{target(out, bias), matrix(a), matrix(b), m, n, k, static_cast<const int64_t*>(at(rows)), {},
                  dropout(drop)};
  for (const auto& [begin, end, rank, low, high, scale] : extensions)
    job.extensions.push_back({begin, end, rank, static_cast<const float*>(at(std::get<0>(low))),
                              std::get<2>(low), matrix(high), scale});
  if (parts.empty()) return pk::product(job, threads);
  const MatrixOf& low = std::get<3>(extensions.at(0));
  pk::product_with(job, static_cast<float*>(at_mutable(std::get<0>(low))), std::get<2>(low), shrinks(parts),
                   threads);
}

void shrink(uintptr_t low, int64_t low_stride, const MatrixOf& a, int64_t k, uintptr_t rows,
            const std::vector<PartOf>& parts, const DropoutOf& drop, int threads) {
  py::gil_scoped_release release;
  pk::shrink(static_cast<float*>(at_mutable(low)), low_stride, matrix(a), k,
             static_cast<const int64_t*>(at(rows)), shrinks(parts), dropout(drop), threads);
}

void reduce(const MatrixOf& out, int64_t begin, int64_t end, int64_t rank, float scale, uintptr_t low,
            int64_t low_stride, const MatrixOf& a, int64_t n, uintptr_t rows, const DropoutOf& drop,
            int threads) {
  py::gil_scoped_release release;
  pk::reduce({target(out, 0), begin, end, rank, scale}, static_cast<const float*>(at(low)), low_stride,
             matrix(a), n, static_cast<const int64_t*>(at(rows)), dropout(drop), threads);
}

int64_t count_nonfinite(int dtype, uintptr_t data, int64_t numel) {
  py::gil_scoped_release release;
  return pk::kernels().count_nonfinite(dtype, at(data), 0, numel);
}

void ideal(uintptr_t out, const Addresses& inputs, int64_t bytes, int threads) {
  std::vector<const void*> pointers;
  for (uintptr_t a : inputs) pointers.push_back(at(a));
  if (out % 64 || bytes % 64) throw std::invalid_argument("ideal: out and bytes must be multiples of 64");
  py::gil_scoped_release release;
  const int64_t lines = bytes / 64, step = 4096;
  pk::parallel_chunks((lines + step - 1) / step, threads, [&](int64_t c, int) {
    pk::kernels().ideal(at_mutable(out), pointers.data(), int(pointers.size()), c * step,
                        std::min(lines, (c + 1) * step));
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled CPU kernels of pykernels; addresses in, nothing checked: use the functions of pykernels.";
  m.def("linear_merge", &linear_merge);
  m.def("ties_merge", &ties_merge);
  m.def("ties_fused", &ties_fused);
  m.def("dare_merge", &dare_merge);
  m.def("l1_norms", &l1_norms);
  m.def("dot_products", &dot_products);
  m.def("kth_magnitude", &kth_magnitude);
  m.def("magnitude_histogram", &magnitude_histogram);
  m.def("elect_sign", &elect_sign);
  m.def("merge_lora", &merge_lora);
  m.def("lora_squares", &lora_squares);
  m.def("count_nonfinite", &count_nonfinite);
  m.def("ideal", &ideal);
  m.def("softmax", &softmax);
  m.def("softmax_backward", &softmax_backward);
  m.def("product", &product);
  m.def("shrink", &shrink);
  m.def("reduce", &reduce);
  m.def("advise_huge", [](uintptr_t data, size_t bytes) { pk::advise_huge(at_mutable(data), bytes); });
  for (const auto add : {pk::add_tensor_calls, pk::add_layer_calls, pk::add_merge_calls})
    if (!add(m.ptr())) throw py::error_already_set();
  m.def("own_threads", &pk::own_threads);
  m.def("forget_team", &pk::forget_team);
  m.def("isas", &pk::isas);
  m.def("isa", [] { return std::string(pk::kernels().name); });
  m.def("use_isa", &pk::use_isa);
}
