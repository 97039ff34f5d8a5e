// Tensors of Python as pointers, by DLPack's exchange protocol: what lies behind an object costs some
// nanoseconds to ask so, where an attribute of it costs fifty. The layout of the structures is DLPack's.
#pragma once
#include <Python.h>

#include <cstdint>

#include "math/dtype.h"

namespace pk::exchange {

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; may be null for row-major
  uint64_t byte_offset;
};

struct Api {
  uint32_t major, minor;
  Api* previous;
  void *allocate, *take, *give;
  int (*lend)(void* object, Tensor* to);  // the tensor stays the object's
  void* stream;
};

constexpr int kCpu = 1, kInt = 0, kFloat = 2, kBfloat = 4;

/// The protocol of a type of tensors; null where it has none, or one too new or too old.
inline const Api* of_type(PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  Api* api = nullptr;
  if (capsule) api = static_cast<Api*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_XDECREF(capsule);
  PyErr_Clear();
  while (api && api->major != 1) api = api->previous;
  return api && api->lend ? api : nullptr;
}

/// The dtype that kernels know, or -1.
inline int dtype_of(const Tensor& t) {
  if (t.lanes != 1) return -1;
  if (t.code == kFloat) return t.bits == 32 ? kF32 : t.bits == 16 ? kF16 : -1;
  return t.code == kBfloat && t.bits == 16 ? kBF16 : -1;
}

inline bool is_int64(const Tensor& t) { return t.lanes == 1 && t.code == kInt && t.bits == 64; }

/// How far apart, in elements, neighbours along dimension d are.
inline int64_t stride_of(const Tensor& t, int d) {
  if (t.strides) return t.strides[d];
  int64_t step = 1;
  for (int inner = t.ndim - 1; inner > d; inner--) step *= t.shape[inner];
  return step;
}

/// How many elements, or -1 where they do not lie row-major.
inline int64_t contiguous_elements(const Tensor& t) {
  int64_t count = 1;
  bool dense = true;
  for (int d = t.ndim - 1; d >= 0; d--) {
    if (t.strides && t.shape[d] != 1) dense &= t.strides[d] == count;
    count *= t.shape[d];
  }
  return dense || count == 0 ? count : -1;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.ndim == b.ndim;
  for (int d = 0; same && d < a.ndim; d++) same = a.shape[d] == b.shape[d];
  return same;
}

/// From the first element to the end of the last.
inline int64_t bytes_of(const Tensor& t) {
  int64_t last = 0;
  for (int d = 0; d < t.ndim; d++) {
    if (!t.shape[d]) return 0;
    last += (t.shape[d] - 1) * stride_of(t, d);
  }
  return (last + 1) * (t.bits / 8);
}

inline char* data_of(const Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

}  // namespace pk::exchange
