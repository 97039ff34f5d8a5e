#include "shortcuts.h"

#include <dlfcn.h>

#include <cstring>

#include "objects.h"

namespace pk {
namespace {

template <class Function>
bool found(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

/// A tensor, the address of what C++ holds behind it, and what its methods say.
struct Trial {
  PyObject* tensor = nullptr;
  unsigned long long word = 0;
  long long bytes = 0, offset = 0;
  int negated = 0, learned = 0;

  explicit Trial(PyObject* given) {
    if (PyArg_ParseTuple(given, "OKLLpp", &tensor, &word, &bytes, &offset, &negated, &learned)) return;
    PyErr_Clear();
    tensor = nullptr;
  }
  /// Where in the object that address stands; 0 where it does not.
  Py_ssize_t place() const {
    if (!tensor) return 0;
    const char* const object = reinterpret_cast<const char*>(tensor);
    for (Py_ssize_t at = sizeof(PyObject); at + Py_ssize_t(sizeof(word)) <= Py_TYPE(tensor)->tp_basicsize;
         at += sizeof(word))
      if (!memcmp(object + at, &word, sizeof(word))) return at;
    return 0;
  }
};

int64_t version_of(PyObject* tensor) {
  const Held version(PyObject_GetAttrString(tensor, "_version"));
  return version.object ? PyLong_AsLongLong(version.object) : -1;
}

}  // namespace

bool Shortcuts::find(void* library) {
  int32_t (*code)() = nullptr;
  const auto coded = [&](const char* name, int32_t& to) {
    if (!found(library, name, code)) return false;
    to = code();
    return true;
  };
  return library && coded("aoti_torch_device_type_cpu", cpu_) &&
         coded("aoti_torch_dtype_float32", codes_[kF32]) &&
         coded("aoti_torch_dtype_bfloat16", codes_[kBF16]) &&
         coded("aoti_torch_dtype_float16", codes_[kF16]) &&
         found(library, "aoti_torch_get_storage_size", storage_size_) &&
         found(library, "aoti_torch_get_storage_offset", storage_offset_) &&
         found(library, "aoti_torch_empty_strided", empty_) &&
         found(library, "aoti_torch_delete_tensor_object", drop_) &&
         found(library, "_ZN2at6native6is_negERKNS_6TensorE", is_neg_) &&
         found(library, "_ZNK3c1010TensorImpl13requires_gradEv", requires_grad_) &&
         found(library, "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv", modes_) &&
         found(library, "_ZN5torch3jit6tracer15getTracingStateEv", trace_) &&
         found(library, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", count_) &&
         found(library, "_Z16THPVariable_WrapRKN2at10TensorBaseE", wrap_);
}

bool Shortcuts::take(PyObject* library, const exchange::Api* api, PyObject* trials) {
  place_ = 0;
  const char* file = PyUnicode_AsUTF8(library);
  if (!file || !api || !PyList_CheckExact(trials) || !PyList_GET_SIZE(trials)) return false;
  if (!find(dlopen(file, RTLD_LAZY | RTLD_NOLOAD))) return false;
  const Trial first(PyList_GET_ITEM(trials, 0));
  place_ = first.place();
  bool right = place_ && makes(api, first.tensor) && counts(first.tensor);
  for (Py_ssize_t i = 0; right && i < PyList_GET_SIZE(trials); i++)
    right = answers(PyList_GET_ITEM(trials, i));
  if (!right) place_ = 0;
  return right;
}

bool Shortcuts::answers(PyObject* given) const {
  const Trial trial(given);
  int64_t bytes, offset;
  if (trial.place() != place_) return false;
  void* const at = handle(trial.tensor);
  return !storage_size_(at, &bytes) && bytes == trial.bytes && !storage_offset_(at, &offset) &&
         offset == trial.offset && is_neg(trial.tensor) == bool(trial.negated) &&
         requires_grad(trial.tensor) == bool(trial.learned);
}

bool Shortcuts::makes(const exchange::Api* api, PyObject* tensor) const {
  exchange::Tensor like, got;
  if (api->lend(tensor, &like)) {
    PyErr_Clear();
    return false;
  }
  const Held made(empty_like(like));
  if (!made.object || Py_TYPE(made.object) != Py_TYPE(tensor) || api->lend(made.object, &got)) {
    PyErr_Clear();
    return false;
  }
  const int64_t bytes = exchange::bytes_of(like);
  return Py_REFCNT(made.object) == 1 && exchange::same_shape(like, got) &&
         exchange::dtype_of(like) == exchange::dtype_of(got) && got.device_type == exchange::kCpu &&
         got.data && got.data != like.data && hold(made.object, bytes, 1) && !hold(made.object, bytes + 1, 1);
}

bool Shortcuts::counts(PyObject* tensor) const {
  const int64_t before = version_of(tensor);
  return before >= 0 && written(tensor) && version_of(tensor) == before + 1;
}

bool Shortcuts::written(PyObject* tensor) const {
  try {
    count_(handle(tensor));
    return true;
  } catch (...) {  // a tensor of inference mode outside of it, which torch allows no change of
    return false;
  }
}

PyObject* Shortcuts::empty_like(const exchange::Tensor& like) const {
  const int dtype = exchange::dtype_of(like);
  if (dtype < 0 || like.ndim > kDimensions) return nullptr;
  int64_t strides[kDimensions], step = 1;
  for (int d = like.ndim - 1; d >= 0; d--) {
    strides[d] = step;
    step *= like.shape[d];
  }
  Handle made;
  if (empty_(like.ndim, like.shape, strides, codes_[dtype], cpu_, 0, &made)) return nullptr;
  PyObject* const object = wrap_(made);
  drop_(made);
  if (!object) PyErr_Clear();
  return object;
}

}  // namespace pk
