// What torch's own library says of a tensor, in nanoseconds where a method takes a tenth of a microsecond.
//
// Nothing of torch is compiled in or linked: functions are found by name in the libraries that the process
// has loaded. The aoti_ ones are torch's stable interface for C; names from C++ may go, and so may the place
// of the tensor in its object. So all of it is tried first, on tensors whose answers are known, and one wrong
// answer leaves every question to Python.
#pragma once
#include <Python.h>

#include <cstdint>

#include "exchange.h"

namespace pk {

class Shortcuts {
 public:
  static constexpr int kDimensions = 8;  // at most, of new tensors

  /// `library`: the file of torch's module. `trials`: tuples (tensor, `_cdata`, bytes of its storage, its
  /// offset, whether it is negated and wants a gradient), the first a float32; an empty list: take no
  /// shortcuts. Returns whether they are taken.
  bool take(PyObject* library, const exchange::Api* api, PyObject* trials);
  explicit operator bool() const { return place_ != 0; }

  /// Whether `bytes` from the first element of a tensor on lie within its storage; elements are `size` each.
  bool hold(PyObject* tensor, int64_t bytes, int size) const {
    int64_t whole, start;
    void* const at = handle(tensor);
    return !storage_size_(at, &whole) && !storage_offset_(at, &start) && start * size + bytes <= whole;
  }
  bool is_neg(PyObject* tensor) const { return is_neg_(handle(tensor)); }
  bool requires_grad(PyObject* tensor) const { return requires_grad_(*handle(tensor)); }
  /// Whether no mode of dispatch and no trace follows operators in this thread.
  bool unfollowed() const { return modes_() == 0 && *trace_() == nullptr; }
  /// Counts a change of the tensor; false where torch refuses.
  bool written(PyObject* tensor) const;
  /// A new tensor in row-major order; null, without an error, where torch gives none or it has more
  /// dimensions.
  PyObject* empty_like(const exchange::Tensor& like) const;

 private:
  using Handle = void**;  // the address of the one word that a tensor of C++ is
  Handle handle(PyObject* tensor) const {
    return reinterpret_cast<Handle>(reinterpret_cast<char*>(tensor) + place_);
  }
  bool find(void* library);
  bool answers(PyObject* trial) const;
  bool makes(const exchange::Api* api, PyObject* tensor) const;
  bool counts(PyObject* tensor) const;

  Py_ssize_t place_ = 0;
  int32_t (*storage_size_)(void*, int64_t*) = nullptr;
  int32_t (*storage_offset_)(void*, int64_t*) = nullptr;
  int32_t (*empty_)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*) = nullptr;
  int32_t (*drop_)(Handle) = nullptr;
  int32_t cpu_ = 0, codes_[3] = {};  // of devices and dtypes, as torch numbers them
  bool (*is_neg_)(Handle) = nullptr;
  bool (*requires_grad_)(const void*) = nullptr;
  int64_t (*modes_)() = nullptr;
  void* const* (*trace_)() = nullptr;
  void (*count_)(Handle) = nullptr;
  PyObject* (*wrap_)(Handle) = nullptr;
};

inline Shortcuts shortcuts;

}  // namespace pk
