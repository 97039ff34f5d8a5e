// The CUDA kernels on low-rank adapters as host code, for tests; kernels.cpp has the others, so that both
// compile at once.
#include "../cuda/lora_launch.cu"
#include "../cuda/lora_squares.cu"
#include "../cuda/merge_in_order.cu"
#include "../cuda/merge_lora.cu"
