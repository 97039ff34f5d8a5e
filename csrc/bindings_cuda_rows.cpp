// LoRA's linear layers on CUDA for Python, as bindings_cuda.cpp: addresses, sizes and codes in.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "bindings_cuda_lora.h"
#include "cuda/lora.h"

namespace py = pybind11;

namespace pk {
namespace {

using namespace cuda;
using Address = uintptr_t;
using PyMatrix = std::tuple<Address, int, int64_t, int64_t>;     // dtype, steps of rows and of columns
using PyAdapter = std::tuple<int, PyMatrix, PyMatrix, float>;    // rank, down, up, scale
using PySink = std::tuple<int, PyMatrix, float>;                 // rank, out, scale
using PyDropout = std::tuple<int, uint32_t, uint64_t, int64_t>;  // side, threshold, key, columns
using PyPlaces = std::tuple<Address, int64_t, Address, int>;     // index, its step, table, adapters

Matrix matrix_of(const PyMatrix& given) {
  const auto [at, dtype, row, col] = given;
  return {reinterpret_cast<const char*>(at), row, col, dtype, alignment_of(at, dtype, row, col == 1)};
}

Dropout dropout_of(const PyDropout& given) {
  const auto [side, threshold, key, cols] = given;
  return {side, threshold, uint32_t(key), uint32_t(key >> 32), cols};
}

Places places_of(const PyPlaces& given) {
  const auto [index, step, table, adapters] = given;
  return {reinterpret_cast<const int64_t*>(index), step, reinterpret_cast<const int64_t*>(table), adapters};
}

/// A call, and what of it is written to the device's memory because there are many adapters.
template <class Job, class Each>
struct Call {
  Job job;
  std::vector<Each> each;

  void settle() {  // the first few travel with the launch
    if (each.size() <= size_t(kFewAdapters)) std::copy(each.begin(), each.end(), job.few);
  }
  int64_t own_bytes() const {
    const int64_t bytes = int64_t(each.size() * sizeof(Each));
    return each.size() <= size_t(kFewAdapters) ? 0 : (bytes + 255) / 256 * 256;
  }
  int64_t scratch(int device) const { return own_bytes() + lora_scratch(job, device); }
  template <class Run>
  void run(int device, Address stream_at, Address scratch, Run&& launch) const {
    const py::gil_scoped_release release;
    const OnDevice here(device);
    Job mine = job;
    const cudaStream_t stream = at_stream(stream_at);
    char* room = reinterpret_cast<char*>(scratch);
    if (own_bytes()) {
      upload(room, reinterpret_cast<const char*>(each.data()), int64_t(each.size() * sizeof(Each)), stream);
      mine.many = reinterpret_cast<const Each*>(room);
    }
    launch(mine, room + own_bytes(), device, stream);
  }
};

using Rows = Call<LoraRows, Adapter>;
using Reduce = Call<LoraReduce, Sink>;

Rows rows_of(Address out, int out_dtype, Address low, int64_t low_step, Address bias, const PyMatrix& x,
             int64_t m, int64_t k, int64_t n, const std::vector<PyAdapter>& adapters, const PyPlaces& places,
             const PyDropout& drop) {
  Rows call{};
  LoraRows& job = call.job;
  job.out = reinterpret_cast<void*>(out);
  job.out_dtype = out_dtype;
  job.out_alignment = alignment_of(out, out_dtype, n);
  job.low = reinterpret_cast<float*>(low);
  job.low_step = low_step;
  job.bias = reinterpret_cast<const void*>(bias);
  job.x = matrix_of(x);
  job.m = m, job.k = k, job.n = n;
  job.native = true;
  for (const auto& [rank, down, up, scale] : adapters) {
    call.each.push_back({matrix_of(down), matrix_of(up), rank, scale});
    job.rank = std::max(job.rank, rank);
    job.native = job.native && call.each.back().down.dtype == job.x.dtype;
  }
  job.places = places_of(places);
  job.drop = dropout_of(drop);
  call.settle();
  return call;
}

Reduce reduce_of(const PyMatrix& a, Address low, int64_t low_step, int64_t m, int64_t n,
                 const std::vector<PySink>& sinks, const PyPlaces& places, const PyDropout& drop) {
  Reduce call{};
  LoraReduce& job = call.job;
  job.a = matrix_of(a);
  job.low = reinterpret_cast<const float*>(low);
  job.low_step = low_step;
  job.m = m, job.n = n;
  job.parts = 2;
  for (const auto& [rank, out, scale] : sinks) {
    const auto [at, dtype, row, col] = out;
    call.each.push_back({reinterpret_cast<void*>(at), row, col, dtype, rank, scale});
    job.rank = std::max(job.rank, rank);
    if (dtype != kBF16) job.parts = 3;
  }
  job.places = places_of(places);
  job.drop = dropout_of(drop);
  call.settle();
  return call;
}

}  // namespace

void add_lora_rows(py::module_& m) {
  py::class_<Rows>(m, "LoraRows")
      .def(py::init(&rows_of))
      .def("scratch", &Rows::scratch)
      .def("run", [](const Rows& call, int device, Address stream, Address scratch) {
        call.run(device, stream, scratch, &lora_rows);
      });
  py::class_<Reduce>(m, "LoraReduce")
      .def(py::init(&reduce_of))
      .def("scratch", &Reduce::scratch)
      .def("run", [](const Reduce& call, int device, Address stream, Address scratch) {
        call.run(device, stream, scratch, &lora_reduce);
      });
  m.def("lora_by_warp", &by_warp);
  m.def("lora_table_words",
        [](int64_t rows, int adapters, int rank) { return DealtRows(rows, adapters, rank).words(); });
  m.def("lora_deal", [](Address table, Address index, int64_t step, int64_t rows, int adapters, int rank,
                        int device, Address stream) {
    const py::gil_scoped_release release;
    const OnDevice here(device);
    lora_deal(reinterpret_cast<int64_t*>(table), reinterpret_cast<const int64_t*>(index), step, rows,
              adapters, rank, at_stream(stream));
  });
#ifdef PK_EMULATED
  m.def("lora_regimes", [](int64_t block, int64_t blocks) { lora_regimes = {block, blocks}; });
#endif
}

}  // namespace pk
