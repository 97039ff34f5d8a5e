// Calls that take tensors as objects: the everyday softmax, whose checks in Python took longer than the rows.
// Knows Python and not pybind11; torch only as objects that it was handed.
#include "bindings_tensors.h"

#include <algorithm>
#include <new>

#include "drive/softmax.h"
#include "lent.h"

namespace pk {
namespace {

/// What calls need of torch; borrowed from `lend_tensors`, which keeps it for the life of the process.
struct : Lent {
  PyTypeObject* type = nullptr;
  PyObject* empty_like = nullptr;
} lent;

/// What the question for memory needs; from `know_tensors`, for good.
struct {
  const exchange::Api* api = nullptr;
  PyTypeObject *type = nullptr, *parameter = nullptr;
  Storages storages;
} known;

constexpr int64_t kPages = 1 << 16;  // elements from which on a new result's pages are worth a thought

/// A tensor as kernels take it, or a question for the caller: `elements` is 0.
struct Rows {
  exchange::Tensor at;
  int64_t elements = 0;
  int dtype = -1;

  /// Of a new tensor nobody asks whether its memory is there.
  explicit Rows(PyObject* object, bool fresh = false) {
    if (Py_TYPE(object) != lent.type) return;
    if (lent.api->lend(object, &at)) {
      PyErr_Clear();
      return;
    }
    dtype = exchange::dtype_of(at);
    const int64_t count = exchange::contiguous_elements(at);
    if (at.device_type != exchange::kCpu || dtype < 0 || count < 1 || !at.data) return;
    if (at.ndim < 1 && !fresh) return;
    if (fresh || lent.has_memory(object, at)) elements = count;
  }
};

bool last_dimension(PyObject* dim, int ndim) {
  if (!PyLong_CheckExact(dim)) return false;
  int beyond;
  const long at = PyLong_AsLongAndOverflow(dim, &beyond);
  return !beyond && (at == -1 || at == ndim - 1);
}

/// Whether `out` may be filled while `x` is read: it is x, or lies apart.
bool may_fill(const Rows& out, const Rows& x) {
  if (out.dtype != x.dtype || !exchange::same_shape(out.at, x.at)) return false;
  const char *a = exchange::data_of(out.at), *b = exchange::data_of(x.at);
  const int64_t bytes = x.elements * (x.dtype == kF32 ? 4 : 2);
  return a == b || a + bytes <= b || b + bytes <= a;
}

bool run(int kind, const Rows& out, const Rows& x) {
  const int64_t n = x.at.shape[x.at.ndim - 1];
  cpu::Softmax job{};
  job.kind = kind;
  job.out = exchange::data_of(out.at);
  job.x = exchange::data_of(x.at);
  job.out_dtype = job.dtype = x.dtype;
  job.outer = x.elements / n;
  job.n = n;
  job.inner = 1;
  job.temperature = 1;
  job.mask_kind = cpu::kNoMask;
  if (x.elements <= cpu::kRowBatch) {  // too short for a second thread, and to wait for the interpreter after
    softmax(job, 1);
    return true;
  }
  const Held threads(PyObject_CallNoArgs(lent.threads));
  if (!threads.object) return false;
  const int count = int(PyLong_AsLong(threads.object));
  const Waiting waiting;
  softmax(job, count);
  return true;
}

/// Whether a plain tensor has memory behind all its elements; false as well where a question is open.
bool holds(PyObject* object) {
  exchange::Tensor at;
  if (Py_TYPE(object) != known.type && Py_TYPE(object) != known.parameter) return false;
  if (known.api->lend(object, &at)) {
    PyErr_Clear();
    return false;
  }
  const int64_t bytes = exchange::bytes_of(at);
  return !bytes || (at.data && known.storages.hold(object, bytes, at.bits / 8));
}

/// have_memory(tensors): whether each of a list or tuple has, as `holds` knows it.
PyObject* have_memory(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 1 || !(PyList_CheckExact(given[0]) || PyTuple_CheckExact(given[0])) || !known.api)
    Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(given[0]); i++) {
    const Held tensor(Py_NewRef(PySequence_Fast_GET_ITEM(given[0], i)));
    if (!holds(tensor.object)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

/// know_tensors(type, parameter): whether `have_memory` will be able to tell.
PyObject* know_tensors(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "know_tensors: takes 2 arguments, got %zd", count);
  for (int i = 0; i < 2; i++) Py_INCREF(given[i]);
  known.api = exchange::of_type(given[0]);
  known.type = reinterpret_cast<PyTypeObject*>(given[0]);
  known.parameter = reinterpret_cast<PyTypeObject*>(given[1]);
  known.storages.take(given[0]);
  return PyBool_FromLong(known.api != nullptr);
}

/// lend_tensors(type, forced, empty_like, written, threads, watches), `written` a tensor and saying whether
/// it counted a change: whether rows of that type will be taken.
PyObject* lend_tensors(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 6) return PyErr_Format(PyExc_TypeError, "lend_tensors: takes 6 arguments, got %zd", count);
  for (int i = 0; i < 6; i++) Py_INCREF(given[i]);
  lent.type = reinterpret_cast<PyTypeObject*>(given[0]);
  lent.empty_like = given[2];
  return PyBool_FromLong(lent.take(given[0], given[1], given[4], given[5], given[3]));
}

/// take_shortcuts(library, type, trials): whether torch's library is asked from now on where Python was.
PyObject* take_shortcuts(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "take_shortcuts: takes 3 arguments, got %zd", count);
  const bool taken = shortcuts.take(given[0], exchange::of_type(given[1]), given[2]);
  PyErr_Clear();
  return PyBool_FromLong(taken);
}

/// A new tensor as x is.
PyObject* like(PyObject* object, const Rows& x) {
  PyObject* const made = shortcuts ? shortcuts.empty_like(x.at) : nullptr;
  return made ? made : PyObject_CallOneArg(lent.empty_like, object);
}

/// The result over the last dimension of x; None, and nothing done, where a question is open.
PyObject* result(int kind, PyObject* object, PyObject* dim, PyObject* given) {
  if (!lent.chosen_freely()) Py_RETURN_NONE;
  const Rows x(object);
  const bool fresh = given == Py_None;
  if (!x.elements || !last_dimension(dim, x.at.ndim) || (fresh && x.elements >= kPages)) Py_RETURN_NONE;
  if (!lent.wants_no_gradient(object) || !lent.holds_values(object)) Py_RETURN_NONE;
  const Held out(fresh ? like(object, x) : Py_NewRef(given));
  if (!out.object) return nullptr;
  const Rows y(out.object, fresh);
  if (!y.elements || !may_fill(y, x)) Py_RETURN_NONE;
  if (!fresh) {
    if (given != object && !(lent.wants_no_gradient(given) && lent.holds_values(given))) Py_RETURN_NONE;
    if (!lent.count_change(given)) return none_unless_failed();
  }
  return run(kind, y, x) ? Py_NewRef(out.object) : nullptr;
}

/// log(sum(e^x)) over the last dimension of x, as above.
PyObject* log_sums(PyObject* object, PyObject* dim, PyObject* keepdim) {
  if (!shortcuts || !lent.chosen_freely() || !PyBool_Check(keepdim)) Py_RETURN_NONE;
  const Rows x(object);
  if (!x.elements || x.at.ndim > Shortcuts::kDimensions || !last_dimension(dim, x.at.ndim)) Py_RETURN_NONE;
  if (!lent.wants_no_gradient(object) || !lent.holds_values(object)) Py_RETURN_NONE;
  int64_t shape[Shortcuts::kDimensions];
  std::copy_n(x.at.shape, x.at.ndim, shape);
  shape[x.at.ndim - 1] = 1;
  exchange::Tensor reduced = x.at;
  reduced.shape = shape;
  if (keepdim == Py_False) reduced.ndim--;
  const Held out(shortcuts.empty_like(reduced));
  if (!out.object) Py_RETURN_NONE;
  const Rows y(out.object, true);
  if (!y.elements) Py_RETURN_NONE;
  return run(cpu::kLogSumExp, y, x) ? Py_NewRef(out.object) : nullptr;
}

/// softmax_rows(x, dim, out), log_softmax_rows and logsumexp_rows(x, dim, keepdim).
template <int kind>
PyObject* rows(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "takes 3 arguments, got %zd", count);
  try {
    if (kind == cpu::kLogSumExp) return log_sums(given[0], given[1], given[2]);
    return result(kind, given[0], given[1], given[2]);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

PyMethodDef methods[] = {{"lend_tensors", as_method(lend_tensors), METH_FASTCALL, nullptr},
                         {"know_tensors", as_method(know_tensors), METH_FASTCALL, nullptr},
                         {"have_memory", as_method(have_memory), METH_FASTCALL, nullptr},
                         {"take_shortcuts", as_method(take_shortcuts), METH_FASTCALL, nullptr},
                         {"softmax_rows", as_method(rows<cpu::kSoftmax>), METH_FASTCALL, nullptr},
                         {"log_softmax_rows", as_method(rows<cpu::kLogSoftmax>), METH_FASTCALL, nullptr},
                         {"logsumexp_rows", as_method(rows<cpu::kLogSumExp>), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_tensor_calls(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace pk
