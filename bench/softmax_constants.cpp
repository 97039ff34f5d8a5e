// What softmax_constants.py times: the softmax kernels of one instruction set with their constants as
// variables. Compiled with a copy of csrc in which they are.
#include "cpu/jobs.h"
#include "drive/isa.h"
#include "drive/softmax.h"

namespace pk {
namespace cpu::PK_ISA {

Regime regime;

void softmax_rows(const Softmax&, int64_t, int64_t, float*);
RowSum softmax_store(const Softmax&, int64_t, int64_t, int64_t, float, float*, int*);
void softmax_scale(const Softmax&, int64_t, int64_t, int64_t, float*, const int*, const Answer&);
void softmax_columns(const Softmax&, int64_t, int64_t, int, float*);
void softmax_narrow(const Softmax&, int64_t, float*);
RowSum softmax_sum(const Softmax&, int64_t, int64_t, int64_t, float);
RowScan softmax_scan(const Softmax&, int64_t, int64_t, int64_t);
Answer softmax_answer(const Softmax&, int64_t, const RowSum*, int64_t, float);
Answer softmax_infinite(const Softmax&, float, bool);
void softmax_write(const Softmax&, int64_t, int64_t, int64_t, float, const Answer&);
double softmax_backward_sum(const SoftmaxBackward&, int64_t, int64_t, int64_t);
void softmax_backward_write(const SoftmaxBackward&, int64_t, int64_t, int64_t, float);
void softmax_backward_rows(const SoftmaxBackward&, int64_t, int64_t);
void softmax_backward_columns(const SoftmaxBackward&, int64_t, int64_t, float*);

}  // namespace cpu::PK_ISA

const cpu::Kernels& kernels() {
  static const cpu::Kernels table = [] {
    using namespace cpu::PK_ISA;
    cpu::Kernels k{};
    k.softmax_regime = [] { return regime; };
    k.softmax_rows = softmax_rows;
    k.softmax_store = softmax_store;
    k.softmax_scale = softmax_scale;
    k.softmax_columns = softmax_columns;
    k.softmax_narrow = softmax_narrow;
    k.softmax_sum = softmax_sum;
    k.softmax_scan = softmax_scan;
    k.softmax_answer = softmax_answer;
    k.softmax_infinite = softmax_infinite;
    k.softmax_write = softmax_write;
    k.softmax_backward_sum = softmax_backward_sum;
    k.softmax_backward_write = softmax_backward_write;
    k.softmax_backward_rows = softmax_backward_rows;
    k.softmax_backward_columns = softmax_backward_columns;
    return k;
  }();
  return table;
}

}  // namespace pk

extern "C" {

void set_regime(int64_t stored, int64_t streamed) { pk::cpu::PK_ISA::regime = {stored, streamed}; }

void forward(int kind, int dtype, void* out, const void* x, int64_t outer, int64_t n, int64_t inner) {
  pk::cpu::Softmax job{};
  job.kind = kind;
  job.out = out;
  job.x = x;
  job.out_dtype = job.dtype = dtype;
  job.outer = outer;
  job.n = n;
  job.inner = inner;
  job.temperature = 1;
  job.mask_kind = pk::cpu::kNoMask;
  pk::softmax(job, 1);
}

/// `x` is grad and y at once.
void backward(int dtype, void* out, const void* x, int64_t outer, int64_t n) {
  pk::softmax_backward({0, out, x, x, dtype, dtype, dtype, outer, n, 1, 1, false}, 1);
}
}
