// Low-rank adapters on CUDA for Python, as bindings_cuda.cpp: addresses, sizes and codes in.
#include "bindings_cuda_lora.h"

#include <pybind11/stl.h>

#include <array>

#include "cuda/merge_in_order.h"
#include "cuda/merge_lora.h"
#ifdef PK_EMULATED
#include "emulated/mma.h"
#endif

namespace py = pybind11;

namespace pk {
namespace {

using namespace pk::cuda;
using Address = uintptr_t;

template <class P>
P* at(Address address) {
  return reinterpret_cast<P*>(address);
}

/// A weight and its adapters.
struct PyLayer {
  int dtype;
  Layer layer{};
  std::vector<Factor> factors;

  PyLayer(int dtype_, Address out, int out_dtype, Address weight, int64_t rows, int64_t cols, Address scale,
          bool by_column)
      : dtype(dtype_) {
    layer.out = at<void>(out);
    layer.weight = at<void>(weight);
    layer.scale = at<float>(scale);
    layer.rows = rows, layer.cols = cols;
    layer.by_column = by_column;
    layer.out_dtype = out_dtype;
    layer.in_alignment = alignment_of(weight, dtype, cols);
    layer.out_alignment = alignment_of(out, out_dtype, cols);
  }
  /// Steps are the elements from a row (column) to the next, and from a rank to the next.
  void add(Address left, int left_dtype, std::array<int64_t, 2> left_steps, Address right, int right_dtype,
           std::array<int64_t, 2> right_steps, int rank, float scale, Address scale_at) {
    factors.push_back({at<void>(left), at<void>(right), at<float>(scale_at), left_steps[0], left_steps[1],
                       right_steps[0], right_steps[1], rank, left_dtype, right_dtype, scale});
  }
};

using PyLayers = std::vector<const PyLayer*>;

/// All layers of one dtype.
LoraLaunch launch_of(const PyLayers& layers) {
  LoraLaunch launch{layers.at(0)->dtype, {}, {}};
  for (const PyLayer* layer : layers) {
    if (layer->dtype != launch.dtype) throw std::invalid_argument("layers of one dtype");
    launch.layers.push_back(layer->layer);
    launch.factors.push_back(layer->factors);
  }
  return launch;
}

using Run = void (*)(const LoraLaunch&, int, char*, cudaStream_t);

template <Run run>
void run_layers(const PyLayers& layers, int device, Address stream, Address table) {
  const LoraLaunch launch = launch_of(layers);
  const py::gil_scoped_release release;
  const OnDevice here(device);
  run(launch, device, at<char>(table), at_stream(stream));
}

using RunInOrder = void (*)(const OrderedMerge&, cudaStream_t);

template <RunInOrder run>
void run_in_order(Address out, int out_dtype, Address weight, int dtype, int64_t rows, int64_t cols,
                  Address left, Address right, int64_t rank, Address scale, bool by_column, int device,
                  Address stream) {
  const OrderedMerge job{at<void>(out),
                         at<void>(weight),
                         at<float>(left),
                         at<float>(right),
                         at<float>(scale),
                         rows,
                         cols,
                         rank,
                         out_dtype,
                         dtype,
                         alignment_of(out, out_dtype, cols),
                         alignment_of(weight, dtype, cols),
                         by_column};
  const py::gil_scoped_release release;
  const OnDevice here(device);
  run(job, at_stream(stream));
}

}  // namespace

void add_lora(py::module_& m) {
  py::class_<PyLayer>(m, "Layer")
      .def(py::init<int, Address, int, Address, int64_t, int64_t, Address, bool>())
      .def("add", &PyLayer::add);
  m.def("lora_table_bytes", [](const PyLayers& layers) { return lora_table_bytes(launch_of(layers)); });
  m.def("merge_lora", &run_layers<merge_lora>);
  m.def("lora_squares", &run_layers<lora_squares>);
  m.def("merge_in_order", &run_in_order<merge_in_order>);
  m.def("squares_in_order", &run_in_order<squares_in_order>);
#ifdef PK_EMULATED
  m.def("lora_room", [](int64_t shared, int processors) { lora_room = {shared, processors}; });
  m.def("multiply", [](Address sum, Address left, Address right, int dtype) {
    emulated::multiply_one(at<float>(sum), at<uint16_t>(left), at<uint16_t>(right), dtype);
  });
  m.def("split", [](Address x, Address parts, int64_t numel) {
    emulated::split_all(at<float>(x), at<uint16_t>(parts), numel);
  });
#endif
}

}  // namespace pk
