// Weights and adapters as the everyday calls on them take them: every question answered, or none of it. Knows
// Python and not pybind11; torch only as objects that it was handed.
#pragma once
#include <cmath>

#include "cpu/gemm_jobs.h"
#include "drive/process.h"
#include "lent.h"

namespace pk {

/// What these calls need of torch and of the package; borrowed from `lend_layers`, which keeps it for good.
struct LentLayers : Lent {
  PyTypeObject *tensor = nullptr, *parameter = nullptr, *adapter = nullptr;
  PyObject *recording = nullptr, *new_empty = nullptr;
  int64_t float_rows = 0;

  bool records() const { return !says_no(PyObject_CallNoArgs(recording)); }
};

inline LentLayers lent;

constexpr int64_t kSmall = 1 << 17;  // multiplications below which a second thread starts too late
constexpr int64_t kPages = 1 << 20;  // elements from which on a result asks for huge pages
constexpr double kLarge = 0x1p100;   // scalings below this need no closer look

/// A tensor whose memory holds its values; not `taken` where a question is open.
struct Operand {
  exchange::Tensor at{};
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

/// A [rank, columns], B [rows, rank] and what scales their product.
struct Factors {
  Operand a, b;
  double scaling;

  Factors(PyObject* a_object, PyObject* b_object, PyObject* scaling_object, bool recording)
      : a(a_object, recording),
        b(b_object, recording),
        scaling(PyFloat_CheckExact(scaling_object) ? PyFloat_AS_DOUBLE(scaling_object) : HUGE_VAL) {}
  int64_t rank() const { return a.at.shape[0]; }
  bool fit(int64_t rows, int64_t columns) const {
    if (!(std::fabs(scaling) < kLarge) || a.dtype() < 0 || b.dtype() != a.dtype()) return false;
    return rank() >= 1 && a.is(rank(), columns) && b.is(rows, rank());
  }
};

/// The adapters of a list or tuple, ours, as a list could be changed meanwhile; `tuple` is null, perhaps with
/// an error set, where it is neither.
struct Adapters {
  const Held tuple;

  explicit Adapters(PyObject* given)
      : tuple(PyList_CheckExact(given) || PyTuple_CheckExact(given) ? PySequence_Tuple(given) : nullptr) {}
  /// Calls add(factors) for each in turn: whether all are adapters without a magnitude and none was refused.
  template <class Add>
  bool each(bool recording, Add&& add) const {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple.object); i++) {
      PyObject* const adapter = PyTuple_GET_ITEM(tuple.object, i);
      if (Py_TYPE(adapter) != lent.adapter || PyTuple_GET_SIZE(adapter) != 4) return false;
      const auto field = [&](int f) { return PyTuple_GET_ITEM(adapter, f); };
      if (field(3) != Py_None || !add(Factors(field(0), field(1), field(2), recording))) return false;
    }
    return true;
  }
};

/// A new tensor of that shape, else as `like`, and what lies behind it; None where a transform of torch.func
/// keeps it from us; null with an error set.
inline PyObject* new_like(PyObject* like, PyObject* shape, exchange::Tensor& at) {
  PyObject* const made = PyObject_CallMethodOneArg(like, lent.new_empty, shape);
  if (!made) return nullptr;
  if (lent.api->lend(made, &at) || at.device_type != exchange::kCpu || !at.data) {
    PyErr_Clear();
    Py_DECREF(made);
    Py_RETURN_NONE;
  }
  const int64_t bytes = exchange::bytes_of(at);
  if (bytes >= kPages * (at.bits / 8)) advise_huge(exchange::data_of(at), size_t(bytes));
  return made;
}

/// Runs work(threads), other threads of Python beside it where it takes long; false with an error set.
template <class Work>
bool on_threads(int64_t multiplications, Work&& work) {
  if (multiplications < kSmall) {
    work(1);
    return true;
  }
  const Held threads(PyObject_CallNoArgs(lent.threads));
  if (!threads.object) return false;
  const int count = int(PyLong_AsLong(threads.object));
  const Waiting waiting;
  work(count);
  return true;
}

}  // namespace pk
