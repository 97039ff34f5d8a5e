// Low-rank adapters on CUDA for Python, as bindings_cuda.cpp: addresses, sizes and codes in.
#include "bindings_cuda_lora.h"

#ifdef PK_EMULATED
#include "emulated/mma.h"
#endif

namespace pk {

void add_lora(pybind11::module_& m) {
#ifdef PK_EMULATED
  m.def("multiply", [](uintptr_t sum, uintptr_t left, uintptr_t right, int dtype) {
    emulated::multiply_one(reinterpret_cast<float*>(sum), reinterpret_cast<const uint16_t*>(left),
                           reinterpret_cast<const uint16_t*>(right), dtype);
  });
  m.def("split", [](uintptr_t x, uintptr_t parts, int64_t numel) {
    emulated::split_all(reinterpret_cast<const float*>(x), reinterpret_cast<uint16_t*>(parts), numel);
  });
#else
  (void)m;
#endif
}

}  // namespace pk
