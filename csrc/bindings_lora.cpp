// Calls that take tensors as objects: the everyday linear layers with adapters, whose checks in Python took
// longer than a small product. Knows Python and not pybind11; torch only as objects that it was handed.
#include <cmath>
#include <new>
#include <vector>

#include "bindings_tensors.h"
#include "drive/lora_linear.h"
#include "drive/process.h"
#include "lent.h"

namespace pk {
namespace {

/// What calls need of torch and of the package; borrowed from `lend_layers`, which keeps it for good.
struct : Lent {
  PyTypeObject *tensor = nullptr, *parameter = nullptr, *adapter = nullptr;
  PyObject *recording = nullptr, *new_empty = nullptr;
  int64_t float_rows = 0;
} lent;

constexpr int64_t kSmall = 1 << 17;  // multiplications below which a second thread starts too late
constexpr int64_t kPages = 1 << 20;  // elements from which on a result asks for huge pages
constexpr double kLarge = 0x1p100;   // scalings below this need no closer look

/// A tensor whose memory holds its values; not `taken` where a question is open.
struct Operand {
  exchange::Tensor at;
  bool taken = false;

  Operand(PyObject* object, bool recording) {
    if (Py_TYPE(object) != lent.tensor && Py_TYPE(object) != lent.parameter) return;
    if (lent.api->lend(object, &at)) {
      PyErr_Clear();
      return;
    }
    if (at.device_type != exchange::kCpu || !at.data || at.ndim < 1) return;
    if (recording && !lent.wants_no_gradient(object)) return;
    taken = lent.has_memory(object, at) && lent.holds_values(object);
  }
  int dtype() const { return taken ? exchange::dtype_of(at) : -1; }
  bool is(int64_t rows, int64_t columns) const {
    return at.ndim == 2 && at.shape[0] == rows && at.shape[1] == columns;
  }
  int64_t stride(int d) const { return exchange::stride_of(at, d); }
  cpu::Matrix matrix() const { return {exchange::data_of(at), dtype(), stride(0), stride(1)}; }
};

/// The leading dimensions of x as one: how many rows, and how far apart; false where they are not.
bool as_rows(const Operand& x, int64_t& rows, int64_t& step) {
  rows = 1;
  step = 0;
  for (int d = x.at.ndim - 2; d >= 0; d--) {
    if (x.at.shape[d] == 1) continue;
    if (rows == 1)
      step = x.stride(d);
    else if (x.stride(d) != step * rows)
      return false;
    rows *= x.at.shape[d];
  }
  return rows > 0;
}

/// A call, as far as it was understood.
struct Call {
  LoraLinear job{};
  Operand x, weight;
  std::vector<int64_t> index;
  bool taken = false, recording;

  Call(PyObject* x_object, PyObject* weight_object, bool records)
      : x(x_object, records), weight(weight_object, records), recording(records) {
    int64_t step;
    const int dtype = x.dtype();
    if (dtype < 0 || weight.dtype() != dtype || weight.at.ndim != 2 || !as_rows(x, job.m, step)) return;
    job.n = weight.at.shape[0];
    job.k = weight.at.shape[1];
    if (job.n < 1 || job.k < 1 || x.at.shape[x.at.ndim - 1] != job.k) return;
    job.weight = weight.matrix();
    if (dtype == kF32 && !few_rows()) return;
    job.x = {exchange::data_of(x.at), dtype, step, x.stride(x.at.ndim - 1)};
    taken = true;
  }

  /// Whether a float32 product is ours: the rule of lora_linear_cpu.py.
  bool few_rows() const { return (job.weight.col == 1 || job.k == 1) && job.m <= lent.float_rows; }

  bool add(PyObject* a_object, PyObject* b_object, PyObject* scaling) {
    if (!PyFloat_CheckExact(scaling)) return false;
    const double s = PyFloat_AS_DOUBLE(scaling);
    const Operand a(a_object, recording), b(b_object, recording);
    const int dtype = a.dtype();
    if (!(std::fabs(s) < kLarge) || dtype < 0 || (dtype != kF32 && dtype != x.dtype())) return false;
    const int64_t rank = a.at.shape[0];
    if (b.dtype() != dtype || rank < 1 || !a.is(rank, job.k) || !b.is(job.n, rank)) return false;
    job.adapters.push_back({a.matrix(), b.matrix(), rank, float(s)});
    return true;
  }

  bool add(PyObject* adapter) {
    if (Py_TYPE(adapter) != lent.adapter || PyTuple_GET_SIZE(adapter) != 4) return false;
    const auto field = [&](int i) { return PyTuple_GET_ITEM(adapter, i); };
    return field(3) == Py_None && add(field(0), field(1), field(2));
  }

  bool add_bias(PyObject* object) { return add_columns(object, x.dtype(), job.out.bias); }
  bool add_scale(PyObject* object) { return add_columns(object, kF32, job.out.scale); }

  /// A number for every column, one beside the other; `to` stays null where there are none.
  bool add_columns(PyObject* object, int dtype, const void*& to) {
    if (object == Py_None) return true;
    const Operand given(object, recording);
    if (given.dtype() != dtype || given.at.ndim != 1 || given.at.shape[0] != job.n) return false;
    if (given.stride(0) != 1 && job.n > 1) return false;
    to = exchange::data_of(given.at);
    return true;
  }

  /// A new tensor [*, n] that `job` then fills; None where a transform of torch.func keeps it from us; null
  /// with an error set.
  PyObject* result(PyObject* x_object) {
    const Held shape(PyTuple_New(x.at.ndim));
    if (!shape.object) return nullptr;
    for (int d = 0; d < x.at.ndim; d++) {
      PyObject* size = PyLong_FromLongLong(d + 1 < x.at.ndim ? x.at.shape[d] : job.n);
      if (!size) return nullptr;
      PyTuple_SET_ITEM(shape.object, d, size);
    }
    PyObject* made = PyObject_CallMethodOneArg(x_object, lent.new_empty, shape.object);
    if (!made) return nullptr;
    exchange::Tensor out;
    if (lent.api->lend(made, &out) || out.device_type != exchange::kCpu || !out.data) {
      PyErr_Clear();
      Py_DECREF(made);
      Py_RETURN_NONE;
    }
    job.out = {exchange::data_of(out), x.dtype(), job.n, 1, job.out.bias, job.out.scale};
    if (job.m * job.n >= kPages) advise_huge(job.out.data, size_t(job.m * job.n * dtype_size(x.dtype())));
    return made;
  }

  /// Fills a new tensor, or None as above; null with an error set.
  PyObject* run(PyObject* x_object) {
    const Held out(result(x_object));
    if (!out.object || out.object == Py_None) return Py_XNewRef(out.object);
    if (job.m * job.n * job.k < kSmall) {
      lora_linear(job, 1);
      return Py_NewRef(out.object);
    }
    const Held threads(PyObject_CallNoArgs(lent.threads));
    if (!threads.object) return nullptr;
    const int count = int(PyLong_AsLong(threads.object));
    const Waiting waiting;
    lora_linear(job, count);
    return Py_NewRef(out.object);
  }
};

bool records() { return !says_no(PyObject_CallNoArgs(lent.recording)); }

/// layer(x, weight, lora_A, lora_B, scaling, bias, column_scale): the result; None, and nothing done, where a
/// question is open.
PyObject* layer(PyObject* const* given) {
  if (!lent.chosen_freely()) Py_RETURN_NONE;
  Call call(given[0], given[1], records());
  if (!call.taken || !call.add(given[2], given[3], given[4])) Py_RETURN_NONE;
  if (!call.add_bias(given[5]) || !call.add_scale(given[6])) Py_RETURN_NONE;
  return call.run(given[0]);
}

/// Whether every row names an adapter or none. The call gets a copy: other threads may write to the tensor
/// between this look at it and its use.
bool add_index(const Operand& index, Call& call) {
  const exchange::Tensor &at = index.at, &x = call.x.at;
  if (!index.taken || !exchange::is_int64(at) || exchange::contiguous_elements(at) != call.job.m)
    return false;
  if (at.ndim != x.ndim - 1) return false;
  for (int d = 0; d < at.ndim; d++)
    if (at.shape[d] != x.shape[d]) return false;
  const auto* values = reinterpret_cast<const int64_t*>(exchange::data_of(at));
  const int64_t count = int64_t(call.job.adapters.size());
  call.index.assign(values, values + call.job.m);
  call.job.index = call.index.data();
  bool fits = true;
  for (const int64_t named : call.index) fits &= named >= -1 && named < count;
  return fits;
}

/// layers(x, weight, adapters, index, bias): the same with an adapter for every row.
PyObject* layers(PyObject* const* given) {
  if (!lent.chosen_freely()) Py_RETURN_NONE;
  if (!PyList_CheckExact(given[2]) && !PyTuple_CheckExact(given[2])) Py_RETURN_NONE;
  const Held adapters(PySequence_Tuple(given[2]));  // ours, as a list could be changed meanwhile
  if (!adapters.object) return nullptr;
  Call call(given[0], given[1], records());
  if (!call.taken || !call.add_bias(given[4])) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(adapters.object); i++)
    if (!call.add(PyTuple_GET_ITEM(adapters.object, i))) Py_RETURN_NONE;
  const Operand index(given[3], call.recording);
  if (!add_index(index, call)) Py_RETURN_NONE;
  return call.run(given[0]);
}

/// lend_layers(Tensor, Parameter, LoRA, forced, recording, threads, float_rows, watches):
/// whether calls will be taken.
PyObject* lend_layers(PyObject* const* given) {
  for (int i = 0; i < 8; i++) Py_INCREF(given[i]);
  lent.tensor = reinterpret_cast<PyTypeObject*>(given[0]);
  lent.parameter = reinterpret_cast<PyTypeObject*>(given[1]);
  lent.adapter = reinterpret_cast<PyTypeObject*>(given[2]);
  lent.recording = given[4];
  lent.float_rows = PyLong_AsLongLong(given[6]);
  lent.new_empty = PyUnicode_InternFromString("new_empty");
  return PyBool_FromLong(lent.take(given[0], given[3], given[5], given[7]));
}

template <PyObject* (*function)(PyObject* const*), Py_ssize_t wanted>
PyObject* counted(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != wanted) return PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", wanted, count);
  try {
    return function(given);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

PyMethodDef methods[] = {{"lend_layers", as_method(counted<lend_layers, 8>), METH_FASTCALL, nullptr},
                         {"lora_layer", as_method(counted<layer, 7>), METH_FASTCALL, nullptr},
                         {"lora_layers", as_method(counted<layers, 5>), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_layer_calls(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace pk
