// Objects of Python as the calls that take tensors handle them: references, answers, and the interpreter's
// lock.
#pragma once
#include <Python.h>

#include <cstdint>
#include <new>

#include "shortcuts.h"

namespace pk {

/// A reference that is given back.
struct Held {
  PyObject* object;
  explicit Held(PyObject* owned) : object(owned) {}
  ~Held() { Py_XDECREF(object); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
};

/// Lets other threads of Python run.
struct Waiting {
  PyThreadState* state = PyEval_SaveThread();
  ~Waiting() { PyEval_RestoreThread(state); }
};

inline bool says_no(PyObject* owned) {
  const Held answer(owned);
  if (!owned) PyErr_Clear();
  return owned == Py_False;
}

/// Whether a context variable holds None here.
inline bool holds_none(PyObject* variable) {
  PyObject* value;
  if (PyContextVar_Get(variable, nullptr, &value)) return false;
  const Held held(value);
  return value == Py_None;
}

/// Answers whether somebody follows the calls of operators, which what a kernel does would escape. Made of
/// two functions: how many modes of dispatch there are, and which trace; and of the module that knows the
/// level of forward differentiation.
class Watches {
 public:
  void take(PyObject* three) {
    modes_ = PyTuple_GetItem(three, 0);
    trace_ = PyTuple_GetItem(three, 1);
    forward_ = PyTuple_GetItem(three, 2);
    level_ = PyUnicode_InternFromString("_current_level");
  }
  bool none() const {
    const Held level(PyObject_GetAttr(forward_, level_));
    const bool none = (shortcuts ? shortcuts.unfollowed() : unfollowed()) && level.object &&
                      PyLong_AsLong(level.object) < 0;
    if (!none) PyErr_Clear();
    return none;
  }

 private:
  bool unfollowed() const {
    const Held modes(PyObject_CallNoArgs(modes_)), trace(PyObject_CallNoArgs(trace_));
    return modes.object && PyLong_AsLong(modes.object) == 0 && trace.object == Py_None;
  }

  PyObject *modes_ = nullptr, *trace_ = nullptr, *forward_ = nullptr, *level_ = nullptr;
};

/// A method of a type without arguments, looked up once.
class Method {
 public:
  void take(PyObject* type, const char* name) { function_ = PyObject_GetAttrString(type, name); }
  PyObject* of(PyObject* object) const {
    return function_ ? PyObject_Vectorcall(function_, &object, 1, nullptr) : nullptr;
  }

 private:
  PyObject* function_ = nullptr;
};

/// Answers whether memory lies behind a tensor: its storage may have been freed or shrunk, and the protocol
/// tells an address alone.
class Storages {
 public:
  void take(PyObject* type) {
    storage_.take(type, "untyped_storage");
    offset_.take(type, "storage_offset");
  }
  /// `bytes` from the first element of the tensor on, which are `size` each.
  bool hold(PyObject* tensor, int64_t bytes, int size) const {
    if (shortcuts) return shortcuts.hold(tensor, bytes, size);
    const Held storage(storage_.of(tensor)), offset(offset_.of(tensor));
    const Py_ssize_t whole = storage.object ? PyObject_Size(storage.object) : -1;
    const int64_t start = offset.object ? PyLong_AsLongLong(offset.object) : -1;
    if (whole >= 0 && start >= 0) return start * size + bytes <= whole;
    PyErr_Clear();
    return false;
  }

 private:
  Method storage_, offset_;
};

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
inline PyCFunction as_method(Fast function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

/// A function of that many arguments.
template <PyObject* (*function)(PyObject* const*), Py_ssize_t wanted>
PyObject* counted(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != wanted) return PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", wanted, count);
  try {
    return function(given);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

/// None, or null where an error is set.
inline PyObject* none_unless_failed() { return PyErr_Occurred() ? nullptr : Py_NewRef(Py_None); }

}  // namespace pk
