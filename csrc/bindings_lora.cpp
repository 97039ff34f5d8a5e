// Calls that take tensors as objects: the everyday linear layers with adapters, whose checks in Python took
// longer than a small product. Knows Python and not pybind11; torch only as objects that it was handed.
#include <vector>

#include "bindings_tensors.h"
#include "drive/lora_linear.h"
#include "operands.h"

namespace pk {
namespace {

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

  bool add(const Factors& f) {
    if (!f.fit(job.n, job.k) || (f.a.dtype() != kF32 && f.a.dtype() != x.dtype())) return false;
    job.adapters.push_back({f.a.matrix(), f.b.matrix(), f.rank(), float(f.scaling)});
    return true;
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
    exchange::Tensor out;
    PyObject* const made = new_like(x_object, shape.object, out);
    if (made && made != Py_None)
      job.out = {exchange::data_of(out), x.dtype(), job.n, 1, job.out.bias, job.out.scale};
    return made;
  }

  /// Fills a new tensor, or None as above; null with an error set.
  PyObject* run(PyObject* x_object) {
    const Held out(result(x_object));
    if (!out.object || out.object == Py_None) return Py_XNewRef(out.object);
    const auto work = [&](int threads) { lora_linear(job, threads); };
    return on_threads(job.m * job.n * job.k, work) ? Py_NewRef(out.object) : nullptr;
  }
};

/// layer(x, weight, lora_A, lora_B, scaling, bias, column_scale): the result; None, and nothing done, where a
/// question is open.
PyObject* layer(PyObject* const* given) {
  if (!lent.chosen_freely()) Py_RETURN_NONE;
  Call call(given[0], given[1], lent.records());
  if (!call.taken || !call.add(Factors(given[2], given[3], given[4], call.recording))) Py_RETURN_NONE;
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
  const Adapters adapters(given[2]);
  if (!adapters.tuple.object) return none_unless_failed();
  Call call(given[0], given[1], lent.records());
  if (!call.taken || !call.add_bias(given[4])) Py_RETURN_NONE;
  if (!adapters.each(call.recording, [&](const Factors& f) { return call.add(f); })) Py_RETURN_NONE;
  const Operand index(given[3], call.recording);
  if (!add_index(index, call)) Py_RETURN_NONE;
  return call.run(given[0]);
}

/// lend_layers(Tensor, Parameter, LoRA, forced, recording, threads, float_rows, watches, written), the last
/// as `Lent` has it: whether calls will be taken.
PyObject* lend_layers(PyObject* const* given) {
  for (int i = 0; i < 9; i++) Py_INCREF(given[i]);
  lent.tensor = reinterpret_cast<PyTypeObject*>(given[0]);
  lent.parameter = reinterpret_cast<PyTypeObject*>(given[1]);
  lent.adapter = reinterpret_cast<PyTypeObject*>(given[2]);
  lent.recording = given[4];
  lent.float_rows = PyLong_AsLongLong(given[6]);
  lent.new_empty = PyUnicode_InternFromString("new_empty");
  return PyBool_FromLong(lent.take(given[0], given[3], given[5], given[7], given[8]));
}

PyMethodDef methods[] = {{"lend_layers", as_method(counted<lend_layers, 9>), METH_FASTCALL, nullptr},
                         {"lora_layer", as_method(counted<layer, 7>), METH_FASTCALL, nullptr},
                         {"lora_layers", as_method(counted<layers, 5>), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_layer_calls(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace pk
