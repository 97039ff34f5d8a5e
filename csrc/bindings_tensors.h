// Functions of the CPU module that take tensors and not addresses.
#pragma once
#include <Python.h>

namespace pk {

/// Add them to the module; false, with Python's error set, where that fails.
bool add_tensor_calls(PyObject* module);
bool add_layer_calls(PyObject* module);
bool add_merge_calls(PyObject* module);

}  // namespace pk
