// The table of this instruction set's kernels.
#include "jobs.h"

namespace pk::cpu {
namespace PK_ISA {

void linear_merge(const Merge&, int64_t, int64_t);
void ties_merge(const Merge&, int, int64_t, int64_t);
void ties_fused(const Merge&, int, Band*, Records*, int64_t, int64_t);
void dare_merge(const Merge&, int, int64_t, int64_t);
void l1_norms(const Merge&, double*, int64_t, int64_t);
void dot_products(const Merge&, int, const void*, double*, int64_t, int64_t);
void count_band(int, const void*, Band*, int, int64_t, int64_t);
void gather_keys(int, const void*, const void*, const int64_t*, int64_t, uint32_t*);
int64_t band_of_records(int, const Records&, int, uint32_t, uint32_t, uint32_t*, uint32_t*);
void histogram(int, const void*, const void*, int, bool, uint32_t, int64_t*, int64_t, int64_t);
int64_t nth_equal(int, const void*, const void*, uint32_t, int64_t, int64_t, int64_t);
void elect_sign(int8_t*, const Merge&, int, int64_t, int64_t);
int64_t count_nonfinite(int, const void*, int64_t, int64_t);
void ideal(void*, const void* const*, int, int64_t, int64_t);
void merge_lora(const MergeLora&, int64_t, int64_t, float*);
void lora_squares(const MergeLora&, bool, double*, int64_t, int64_t, float*);
void pack_panels(const MergeLora&, float*, int64_t, int64_t);
int panel_width();
Regime softmax_regime();
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
void gemm_widen(const Matrix&, const int64_t*, int64_t, int64_t, int64_t, int64_t, const Dropout*, int64_t,
                bool, float*);
void gemm_pack(const Matrix&, const int64_t*, int64_t, int64_t, int64_t, int64_t, float, const Dropout*,
               float*);
void gemm_multiply(const float*, int64_t, const float*, int64_t, int64_t, float*, bool, const Ahead*,
                   int64_t);
void gemm_dots(const Matrix&, int64_t, int64_t, const float*, int64_t, int64_t, int64_t, float*);
bool gemm_expand(const Matrix&, int64_t, int64_t, int64_t, float, const float*, float*);
void gemm_add_kept(float*, const float*, const int64_t*, int64_t, int64_t, int64_t, int64_t, const Dropout&);
void gemm_finish(const float*, const GemmOut&, const int64_t*, int64_t, int64_t, int64_t, int64_t);

}  // namespace PK_ISA

#define PK_TEXT_OF(x) #x
#define PK_TEXT(x) PK_TEXT_OF(x)
#define PK_JOIN_OF(a, b) a##b
#define PK_JOIN(a, b) PK_JOIN_OF(a, b)

extern const Kernels PK_JOIN(kernels_, PK_ISA);
const Kernels PK_JOIN(kernels_, PK_ISA) = {
    PK_TEXT(PK_ISA),
    PK_ISA::linear_merge,
    PK_ISA::ties_merge,
    PK_ISA::ties_fused,
    PK_ISA::dare_merge,
    PK_ISA::l1_norms,
    PK_ISA::dot_products,
    PK_ISA::count_band,
    PK_ISA::gather_keys,
    PK_ISA::band_of_records,
    PK_ISA::histogram,
    PK_ISA::nth_equal,
    PK_ISA::elect_sign,
    PK_ISA::count_nonfinite,
    PK_ISA::ideal,
    PK_ISA::merge_lora,
    PK_ISA::lora_squares,
    PK_ISA::pack_panels,
    PK_ISA::panel_width,
    PK_ISA::softmax_regime,
    PK_ISA::softmax_rows,
    PK_ISA::softmax_store,
    PK_ISA::softmax_scale,
    PK_ISA::softmax_columns,
    PK_ISA::softmax_narrow,
    PK_ISA::softmax_sum,
    PK_ISA::softmax_scan,
    PK_ISA::softmax_answer,
    PK_ISA::softmax_infinite,
    PK_ISA::softmax_write,
    PK_ISA::softmax_backward_sum,
    PK_ISA::softmax_backward_write,
    PK_ISA::softmax_backward_rows,
    PK_ISA::softmax_backward_columns,
    PK_ISA::gemm_widen,
    PK_ISA::gemm_pack,
    PK_ISA::gemm_multiply,
    PK_ISA::gemm_dots,
    PK_ISA::gemm_expand,
    PK_ISA::gemm_add_kept,
    PK_ISA::gemm_finish,
};

}  // namespace pk::cpu
