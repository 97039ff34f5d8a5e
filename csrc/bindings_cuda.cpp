// The CUDA module for Python: addresses, sizes and codes in, nothing of torch.
// The same text binds the emulated kernels, whose addresses are the host's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "bindings_cuda_lora.h"
#include "cuda/kernels.h"
#include "cuda/softmax.h"

namespace py = pybind11;

namespace {

using namespace pk::cuda;
using Address = uintptr_t;

template <class P>
P* at(Address address) {
  return reinterpret_cast<P*>(address);
}

Alignment least_alignment(int dtype, const std::vector<Address>& addresses) {
  Alignment least = kVectors;
  for (const Address address : addresses) least = std::min(least, alignment_of(address, dtype, 0));
  return least;
}

/// A tensor to merge. Setters fill what an op needs; the rest stays neutral.
struct PyJob : Job {
  PyJob(int dtype, Address out, int out_dtype, Address base, const std::vector<Address>& tuned, int64_t numel,
        int64_t offset) {
    if (tuned.empty() || tuned.size() > size_t(kMaxModels)) throw std::invalid_argument("1 to 64 tensors");
    memset(static_cast<void*>(static_cast<Job*>(this)), 0, sizeof(Job));
    std::vector<Address> inputs = tuned;
    if (base) inputs.push_back(base);
    head.out = at<void>(out);
    head.base = at<void>(base);
    head.numel = numel;
    head.offset = offset;
    head.lambda = 1;
    head.n = int(tuned.size());
    head.out_dtype = out_dtype;
    head.in_alignment = least_alignment(dtype, inputs);
    head.out_alignment = alignment_of(out, out_dtype, 0);
    for (size_t m = 0; m < tuned.size(); m++) {
      models[m].data = at<void>(tuned[m]);
      models[m].weight = 1;
      models[m].last = -1;
    }
  }
  template <class V, class Set>
  void each(const std::vector<V>& values, Set&& set) {
    if (values.empty()) return;
    if (int(values.size()) != head.n) throw std::invalid_argument("one number per model");
    for (int m = 0; m < head.n; m++) set(models[m], values[size_t(m)]);
  }
  void numbers(const std::vector<float>& weight, Address weights, const std::vector<float>& vote,
               Address votes, const std::vector<float>& share, Address shares, float lambda,
               Address lambda_at) {
    // A list holds models that take part, whatever their weights became.
    each(weight, [](Model& m, float x) { m.weight = x == 0 ? -0.0f : x; });
    each(vote, [](Model& m, float x) { m.vote = x; });
    each(share, [](Model& m, float x) { m.share = x; });
    head.weights = at<float>(weights);
    head.votes = at<float>(votes);
    head.shares = at<float>(shares);
    head.lambda = lambda;
    head.lambda_at = at<float>(lambda_at);
  }
  void draws(const std::vector<uint32_t>& threshold, const std::vector<uint32_t>& index, uint64_t key) {
    each(threshold, [](Model& m, uint32_t x) { m.threshold = x; });
    each(index, [](Model& m, uint32_t x) { m.index = x; });
    head.key0 = uint32_t(key);
    head.key1 = uint32_t(key >> 32);
  }
  void cut(const std::vector<uint32_t>& key, const std::vector<int64_t>& last) {
    each(key, [](Model& m, uint32_t x) { m.key = x; });
    each(last, [](Model& m, int64_t x) { m.last = x; });
  }
  void cut_at(Address key, Address last) {
    head.cut_key = at<int64_t>(key);
    head.cut_last = at<int64_t>(last);
  }
  void select(const std::vector<int64_t>& k, Address scratch) {
    each(k, [](Model& m, int64_t x) { m.rank = x; });
    head.scratch = at<char>(scratch);
  }
  void grad(Address grad, int dtype) {
    head.grad = at<void>(grad);
    head.grad_dtype = dtype;
    if (alignment_of(grad, dtype, 0) == kBytes) head.in_alignment = kBytes;
  }
};

using Jobs = std::vector<const PyJob*>;

int64_t stride_of(const Jobs& jobs) {
  return int64_t(sizeof(Head)) + jobs[0]->head.n * int64_t(sizeof(Model));
}

int64_t tiles(const Jobs& jobs) {
  int64_t sum = 0;
  for (const PyJob* job : jobs) sum += tiles_of(job->head.numel);
  return sum;
}

/// Bytes of the table of many jobs: the jobs, then the owner of every tile.
int64_t table_bytes(const Jobs& jobs) { return int64_t(jobs.size()) * stride_of(jobs) + tiles(jobs) * 4; }

/// Has the table of many jobs written to device memory. It travels as arguments of launches, so it can be
/// captured in a graph and needs no host memory that must outlive this call.
void write_table(const Jobs& jobs, char* to, cudaStream_t stream) {
  const int64_t stride = stride_of(jobs);
  std::vector<char> bytes(size_t(table_bytes(jobs)));
  std::vector<int> owner;
  for (size_t j = 0; j < jobs.size(); j++) {
    if (jobs[j]->head.n != jobs[0]->head.n) throw std::invalid_argument("jobs of one number of models");
    Job job = *jobs[j];
    job.head.first_tile = int64_t(owner.size());
    memcpy(bytes.data() + int64_t(j) * stride, &job, size_t(stride));
    owner.insert(owner.end(), size_t(tiles_of(job.head.numel)), int(j));
  }
  memcpy(bytes.data() + int64_t(jobs.size()) * stride, owner.data(), owner.size() * sizeof(int));
  upload(to, bytes.data(), int64_t(bytes.size()), stream);
}

/// Runs `work` on all jobs: one travels with the launch, many are written to `table` on the device.
template <class Work>
void run(const Jobs& jobs, int dtype, int device, Address stream_at, Address table, Work&& work) {
  Table launched;
  launched.one = *jobs[0];
  launched.stride = stride_of(jobs);
  launched.jobs = jobs.size() > 1 ? at<char>(table) : nullptr;
  launched.owner = at<int>(table + uint64_t(launched.stride) * jobs.size());
  int64_t largest = 0;
  for (const PyJob* job : jobs) largest = std::max(largest, job->head.numel);
  const py::gil_scoped_release release;
  const OnDevice here(device);
  const cudaStream_t stream = at_stream(stream_at);
  if (jobs.size() > 1) write_table(jobs, at<char>(table), stream);
  work(Launch{launched, dtype, jobs[0]->head.n, int(jobs.size()), tiles(jobs), largest, stream});
}

bool to_elements(int dtype, Address address) { return alignment_of(address, dtype, 0) != kBytes; }

/// Shapes, dtypes and addresses of a call; nothing of the device is asked for.
Softmax softmax_job(Address out, int out_dtype, Address x, int dtype, int64_t outer, int64_t n, int64_t inner,
                    int kind, Address mask, int mask_kind, std::array<int64_t, 3> mask_stride, Address sink,
                    std::array<int64_t, 2> sink_stride, float temperature, float softcap, bool safe) {
  Softmax job{};
  job.kind = kind;
  job.out = at<void>(out);
  job.x = at<void>(x);
  job.out_dtype = out_dtype;
  job.dtype = dtype;
  job.outer = outer, job.n = n, job.inner = inner;
  job.temperature = temperature;
  job.reciprocal = temperature > 0x1p-20f && temperature < 0x1p20f ? 1 / temperature : 0;
  job.softcap = softcap;
  job.mask = at<void>(mask);
  job.mask_kind = mask_kind;
  std::copy(mask_stride.begin(), mask_stride.end(), job.mask_stride);
  job.sink = at<float>(sink);
  std::copy(sink_stride.begin(), sink_stride.end(), job.sink_stride);
  job.safe = safe;
  job.plain = temperature == 1 && softcap == 0 && mask_kind == kNoMask;
  job.aligned = to_elements(dtype, x);
  job.out_aligned = to_elements(out_dtype, out);
  job.mask_aligned = mask_kind == kNoMask || mask_kind == kBoolMask || to_elements(mask_kind, mask);
  return job;
}

SoftmaxBackward backward_job(Address out, int out_dtype, Address grad, int grad_dtype, Address y, int dtype,
                             int64_t outer, int64_t n, int64_t inner, int kind, float scale) {
  SoftmaxBackward job{};
  job.kind = kind;
  job.out = at<void>(out);
  job.grad = at<void>(grad);
  job.y = at<void>(y);
  job.out_dtype = out_dtype, job.grad_dtype = grad_dtype, job.dtype = dtype;
  job.outer = outer, job.n = n, job.inner = inner;
  job.scale = scale;
  job.aligned = to_elements(dtype, y);
  job.grad_aligned = to_elements(grad_dtype, grad);
  job.out_aligned = to_elements(out_dtype, out);
  return job;
}

}  // namespace

PYBIND11_MODULE(PK_MODULE, m) {
  m.doc() = "CUDA kernels of pykernels; addresses in, nothing checked: use the functions of pykernels.";
  py::class_<PyJob>(m, "Job")
      .def(py::init<int, Address, int, Address, const std::vector<Address>&, int64_t, int64_t>())
      .def("numbers", &PyJob::numbers)
      .def("draws", &PyJob::draws)
      .def("cut", &PyJob::cut)
      .def("cut_at", &PyJob::cut_at)
      .def("select", &PyJob::select)
      .def("grad", &PyJob::grad);
  m.def("table_bytes", &table_bytes);
  m.def("kth_scratch", &kth_scratch);
  m.def("linear_merge", [](const Jobs& jobs, int dtype, int device, Address stream, Address table) {
    run(jobs, dtype, device, stream, table, [](const Launch& l) { linear_merge(l); });
  });
  m.def("ties_merge",
        [](const Jobs& jobs, int dtype, int device, Address stream, Address table, int combine) {
          run(jobs, dtype, device, stream, table, [&](const Launch& l) { ties_merge(l, combine); });
        });
  m.def("ties_fused", [](const Jobs& jobs, int dtype, int device, Address stream, Address table, int combine,
                         bool keep_equals) {
    run(jobs, dtype, device, stream, table, [&](const Launch& l) {
      kth_magnitude(l, keep_equals);
      ties_merge(l, combine);
    });
  });
  m.def("dare_merge",
        [](const Jobs& jobs, int dtype, int device, Address stream, Address table, int combine) {
          run(jobs, dtype, device, stream, table, [&](const Launch& l) { dare_merge(l, combine); });
        });
  m.def("kth_magnitude", [](const Jobs& jobs, int dtype, int device, Address stream, Address table) {
    run(jobs, dtype, device, stream, table, [](const Launch& l) { kth_magnitude(l, false); });
  });
  m.def("magnitude_histogram", [](const Jobs& jobs, int dtype, int device, Address stream, Address table,
                                  int shift, bool all) {
    run(jobs, dtype, device, stream, table, [&](const Launch& l) { magnitude_histogram(l, shift, all); });
  });
  m.def("l1_norms", [](const Jobs& jobs, int dtype, int device, Address stream, Address table) {
    run(jobs, dtype, device, stream, table, [](const Launch& l) { l1_norms(l); });
  });
  m.def("dot_products", [](const Jobs& jobs, int dtype, int device, Address stream, Address table) {
    run(jobs, dtype, device, stream, table, [](const Launch& l) { dot_products(l); });
  });
  m.def("elect_sign",
        [](const Jobs& jobs, int dtype, int device, Address stream, Address table, int combine) {
          run(jobs, dtype, device, stream, table, [&](const Launch& l) { elect_sign(l, combine); });
        });
  py::class_<Softmax>(m, "Softmax")
      .def(py::init(&softmax_job))
      .def("scratch", [](const Softmax& job, int device) { return softmax_scratch(job, device); })
      .def("run", [](const Softmax& job, int device, Address stream, Address scratch) {
        const py::gil_scoped_release release;
        const OnDevice here(device);
        softmax(job, at<void>(scratch), device, at_stream(stream));
      });
  py::class_<SoftmaxBackward>(m, "SoftmaxBackward")
      .def(py::init(&backward_job))
      .def("scratch", [](const SoftmaxBackward& job, int device) { return softmax_scratch(job, device); })
      .def("run", [](const SoftmaxBackward& job, int device, Address stream, Address scratch) {
        const py::gil_scoped_release release;
        const OnDevice here(device);
        softmax_backward(job, at<void>(scratch), device, at_stream(stream));
      });
  pk::add_lora(m);
  pk::add_lora_rows(m);
  m.def("memory", &memory);
  m.def("unavailable", &unavailable);
#ifdef PK_EMULATED
  m.def("reverse", [](bool on) { pk::emulated::reverse = on; });
  m.def("warps", [](bool on) { pk::emulated::warps = on; });
  m.def("regimes", [](int64_t share, int64_t most, int64_t chunk, int64_t column_chunk, int64_t chunks,
                      bool clusters, int64_t shared) {
    regimes = {share, most, chunk, column_chunk, chunks};
    limits = {shared, clusters};
  });
#endif
}
