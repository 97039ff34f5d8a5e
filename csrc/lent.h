// What calls that take tensors as objects have borrowed from Python, once and for the life of the process.
#pragma once
#include "exchange.h"
#include "objects.h"

namespace pk {

/// What all of them need of torch and of the package.
struct Lent {
  const exchange::Api* api = nullptr;
  PyObject *forced = nullptr, *threads = nullptr, *written = nullptr, *requires_grad = nullptr;
  Method is_neg;
  Watches watches;
  Storages storages;

  /// References stay with the caller; `written` counts a change of a tensor and says whether it could.
  /// Returns whether tensors of that type will be taken.
  bool take(PyObject* type, PyObject* forced_, PyObject* threads_, PyObject* watches_, PyObject* written_) {
    api = exchange::of_type(type);
    forced = forced_;
    threads = threads_;
    written = written_;
    watches.take(watches_);
    is_neg.take(type, "is_neg");
    storages.take(type);
    requires_grad = PyUnicode_InternFromString("requires_grad");
    return api != nullptr;
  }
  /// Whether the context leaves the choice of a backend to us, and nobody waits for an operator.
  bool chosen_freely() const { return api && holds_none(forced) && watches.none(); }
  /// Whether memory holds the values themselves. A negated view is the one thing that the protocol hides.
  bool holds_values(PyObject* tensor) const {
    return shortcuts ? !shortcuts.is_neg(tensor) : says_no(is_neg.of(tensor));
  }
  bool has_memory(PyObject* tensor, const exchange::Tensor& at) const {
    return storages.hold(tensor, exchange::bytes_of(at), at.bits / 8);
  }
  bool wants_no_gradient(PyObject* tensor) const {
    return shortcuts ? !shortcuts.requires_grad(tensor) : says_no(PyObject_GetAttr(tensor, requires_grad));
  }
  /// Counts a change of a tensor; false, with an error set or not, where torch allows none.
  bool count_change(PyObject* tensor) const {
    return shortcuts ? shortcuts.written(tensor)
                     : Held(PyObject_CallOneArg(written, tensor)).object == Py_True;
  }
};

}  // namespace pk
