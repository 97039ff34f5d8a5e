// The everyday merge of adapters into a weight: its checks in Python, out of a cold cache, took a tenth of
// what the merge of one layer does.
#include <vector>

#include "bindings_tensors.h"
#include "drive/lora.h"
#include "operands.h"

namespace pk {
namespace {

/// A contiguous matrix of a dtype that kernels know, not empty.
bool is_weight(const Operand& x) {
  return x.dtype() >= 0 && x.at.ndim == 2 && exchange::contiguous_elements(x.at) > 0;
}

bool apart(const Operand& x, const Operand& y) {
  const char *a = exchange::data_of(x.at), *b = exchange::data_of(y.at);
  return a + exchange::bytes_of(x.at) <= b || b + exchange::bytes_of(y.at) <= a;
}

/// Whether `out` may be filled while the weight is read: it is the weight, or lies apart.
bool may_fill(const Operand& out, const Operand& weight) {
  if (!is_weight(out) || !exchange::same_shape(out.at, weight.at)) return false;
  const bool same = exchange::data_of(out.at) == exchange::data_of(weight.at);
  return (same && out.dtype() == weight.dtype()) || apart(out, weight);
}

/// A new tensor as the weight is; None and null as `new_like` has them.
PyObject* new_weight(PyObject* object, const Operand& weight, exchange::Tensor& at) {
  const Held shape(Py_BuildValue("(LL)", static_cast<long long>(weight.at.shape[0]),
                                 static_cast<long long>(weight.at.shape[1])));
  return shape.object ? new_like(object, shape.object, at) : nullptr;
}

/// Without options: neither turned nor rounded as PEFT does.
bool is_plain(PyObject* fan_in_fan_out, PyObject* rounding) {
  return fan_in_fan_out == Py_False && PyUnicode_CheckExact(rounding) &&
         PyUnicode_CompareWithASCIIString(rounding, "once") == 0;
}

/// A call, as far as it was understood.
struct Call {
  const Operand weight, given;
  std::vector<cpu::LowRank> factors;
  int64_t ranks = 0;

  Call(PyObject* weight_object, PyObject* out, bool recording)
      : weight(weight_object, recording), given(out, recording) {}
  int64_t rows() const { return weight.at.shape[0]; }
  int64_t columns() const { return weight.at.shape[1]; }

  bool add(const Factors& f) {
    if (!f.fit(rows(), columns())) return false;
    if (given.taken && !(apart(given, f.a) && apart(given, f.b))) return false;
    factors.push_back({f.b.matrix(), f.a.matrix(), f.rank(), f.scaling, 1.0});
    ranks += f.rank();
    return true;
  }

  /// Fills `out`; false with an error set.
  bool run(const exchange::Tensor& out) {
    cpu::MergeLora job{};
    job.out = exchange::data_of(out);
    job.weight = exchange::data_of(weight.at);
    job.out_dtype = exchange::dtype_of(out);
    job.dtype = weight.dtype();
    job.rows = rows();
    job.cols = columns();
    return on_threads(job.rows * job.cols * ranks,
                      [&](int threads) { merge_lora(job, factors, nullptr, false, threads); });
  }
};

/// merge(weight, adapters, fan_in_fan_out, out, rounding): the merged weight; None, and nothing done, where a
/// question is open.
PyObject* merge(PyObject* const* given) {
  if (!lent.chosen_freely() || !is_plain(given[2], given[4])) Py_RETURN_NONE;
  const Adapters adapters(given[1]);
  if (!adapters.tuple.object) return none_unless_failed();
  const bool recording = lent.records(), fresh = given[3] == Py_None;
  Call call(given[0], given[3], recording);
  if (!is_weight(call.weight) || !(fresh || may_fill(call.given, call.weight))) Py_RETURN_NONE;
  const bool fit = adapters.each(recording, [&](const Factors& f) { return call.add(f); });
  if (!fit || call.factors.empty()) Py_RETURN_NONE;
  exchange::Tensor out = call.given.at;
  const Held result(fresh ? new_weight(given[0], call.weight, out) : Py_NewRef(given[3]));
  if (!result.object || result.object == Py_None) return Py_XNewRef(result.object);
  if (!fresh && !lent.count_change(result.object)) return none_unless_failed();
  return call.run(out) ? Py_NewRef(result.object) : nullptr;
}

PyMethodDef methods[] = {{"lora_merge", as_method(counted<merge, 5>), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_merge_calls(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace pk
