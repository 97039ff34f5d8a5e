// The part of the CUDA module for low-rank adapters.
#pragma once
#include <pybind11/pybind11.h>

namespace pk {

void add_lora(pybind11::module_& module);

}  // namespace pk
