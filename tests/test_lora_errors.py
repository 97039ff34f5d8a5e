"""Every message about adapters, by its text."""

from __future__ import annotations

import math
import re

import pytest
import torch

import pykernels as pk
from pykernels import LoRA

W, HALF, WIDE = torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(4, 6).double()
A, B, M = torch.zeros(2, 6), torch.zeros(4, 2), torch.zeros(4)
GOOD = LoRA(A, B, 1.0)
STORE = torch.zeros(100)
LEARNED = torch.zeros(2, 6, requires_grad=True)


def merge(*adapters, weight=W, **options):
    """merge_lora with arguments that are right unless given."""
    return pk.merge_lora(weight, adapters or [GOOD], **options)


def compose(*adapters, weights=1.0, **options):
    """compose_lora with arguments that are right unless given."""
    return pk.compose_lora(adapters or [GOOD], weights, **options)


V, T = ValueError, TypeError
MERGE = [
    (lambda: merge(weight=[1.0]), T, "weight must be a tensor, got list"),
    (lambda: merge(weight=M), V, "weight must have shape [out, in], got [4]"),
    (lambda: merge(weight=M, fan_in_fan_out=True), V, "weight must have shape [in, out], got [4]"),
    (lambda: merge(weight=W.t()), V, "weight must be contiguous, got strides [1, 6]"),
    (lambda: merge(fan_in_fan_out=1), V, "fan_in_fan_out must be one of True, False, got 1"),
    (lambda: merge(rounding="twice"), V, "rounding must be one of 'once', 'peft', got 'twice'"),
    (lambda: pk.merge_lora(W, GOOD), T, "adapters must be a sequence of LoRA, got one LoRA"),
    (lambda: pk.merge_lora(W, W), T, "adapters must be a sequence of LoRA, got Tensor"),
    (lambda: pk.merge_lora(W, iter([GOOD])), T, "adapters must be a sequence of LoRA, got list_iterator"),
    (lambda: pk.merge_lora(W, []), V, "adapters must hold at least one LoRA, got none"),
    (lambda: merge(GOOD, (A, B, 1.0)), T, "adapters[1] must be a LoRA, got tuple"),
    (lambda: merge(LoRA(1.0, B, 1.0)), T, "adapters[0].A must be a tensor, got float"),
    (lambda: merge(LoRA(A.to_sparse(), B, 1.0)), V,
     "adapters[0].A must be a dense tensor with data, got torch.sparse_coo on cpu"),
    (lambda: merge(LoRA(A, B.to("meta"), 1.0)), V,
     "adapters[0].B must be a dense tensor with data, got torch.strided on meta"),
    (lambda: merge(LoRA(A.int(), B, 1.0)), T,
     "adapters[0].A must be float32, bfloat16, float16 beside torch.float32, got torch.int32"),
    (lambda: merge(LoRA(A.double(), B.double(), 1.0)), T,
     "adapters[0].A must be float32, bfloat16, float16 beside torch.float32, got torch.float64"),
    (lambda: merge(LoRA(A.int(), B, 1.0), weight=WIDE), T,
     "adapters[0].A must be float32, bfloat16, float16 or float64 beside torch.float64, got torch.int32"),
    (lambda: merge(LoRA(A, B.bfloat16(), 1.0)), T,
     "adapters[0].B must have A's dtype torch.float32, got torch.bfloat16"),
    (lambda: merge(GOOD, LoRA(torch.zeros(16, 5), B, 1.0)), V,
     "adapters[1].A must have shape [r, 6], got [16, 5]"),
    (lambda: merge(LoRA(torch.zeros(0, 6), torch.zeros(4, 0), 1.0)), V,
     "adapters[0].A must have shape [r, 6], got [0, 6]"),
    (lambda: merge(LoRA(M, B, 1.0)), V, "adapters[0].A must have shape [r, 6], got [4]"),
    (lambda: merge(LoRA(A, B.t(), 1.0)), V, "adapters[0].B must have shape [4, 2], got [2, 4]"),
    (lambda: merge(GOOD, fan_in_fan_out=True), V, "adapters[0].A must have shape [r, 4], got [2, 6]"),
    (lambda: merge(LoRA(A, B, 1.0, M[:3])), V, "adapters[0].magnitude must have shape [4], got [3]"),
    (lambda: merge(LoRA(A, B, 1.0, M.int())), T,
     "adapters[0].magnitude must be float32, bfloat16, float16 beside torch.float32, got torch.int32"),
    (lambda: merge(LoRA(A, B, math.nan)), V, "adapters[0].scaling must be finite in float32, got nan"),
    (lambda: merge(LoRA(A, B, "1")), T, "adapters[0].scaling must be a number, got str"),
    (lambda: merge(out=W.t()), V, "out must be contiguous, got strides [1, 6]"),
    (lambda: merge(out=torch.zeros(6, 4)), V, "out must have the inputs' shape [4, 6], got [6, 4]"),
    (lambda: merge(out=HALF, rounding="peft"), T,
     "out must have out_dtype torch.float32, got torch.bfloat16"),
    (lambda: merge(weight=STORE[:24].view(4, 6), out=STORE[8:32].view(4, 6)), V,
     "out must be an input itself or share no memory with it, overlaps input 0 in part"),
    (lambda: merge(LoRA(STORE[:12].view(2, 6), B, 1.0), out=STORE[8:32].view(4, 6)), V,
     "out must share no memory with adapters[0].A"),
    (lambda: merge(LoRA(A, STORE[:8].view(2, 4).t(), 1.0), out=STORE[7:31].view(4, 6)), V,
     "out must share no memory with adapters[0].B"),
    (lambda: merge(LoRA(A, B, 1.0, STORE[31:35]), out=STORE[8:32].view(4, 6)), V,
     "out must share no memory with adapters[0].magnitude"),
    (lambda: merge(LoRA(LEARNED, B, 1.0), out=torch.zeros(4, 6)), V,
     "out must be None where a gradient is asked for: out= records none"),
    (lambda: merge(LoRA(LEARNED, B, 1.0, M)), V,
     "adapters[0].A must not require grad, as no gradient is defined: pass adapters[0].A.detach()"),
    (lambda: merge(GOOD, LoRA(A, B, 1.0, LEARNED[0, :4])), V, "adapters[1].magnitude must not require grad"),
]  # fmt: skip

DORA = LoRA(A, B, 1.0, M)
COMPOSE = [
    (lambda: pk.compose_lora([LoRA(A.int(), B, 1.0)], 1.0), T,
     "adapters[0].A must be float32, bfloat16, float16 or float64, got torch.int32"),
    (lambda: pk.compose_lora(GOOD, 1.0), T, "adapters must be a sequence of LoRA, got one LoRA"),
    (lambda: pk.compose_lora([], 1.0), V, "adapters must hold at least one LoRA, got none"),
    (lambda: compose(LoRA(None, B, 1.0)), T, "adapters[0].A must be a tensor, got NoneType"),
    (lambda: compose(LoRA(M, B, 1.0)), V, "adapters[0].A must have shape [r, in], got [4]"),
    (lambda: compose(LoRA(A, M, 1.0)), V, "adapters[0].B must have shape [out, r], got [4]"),
    (lambda: compose(GOOD, LoRA(A[:, :5], B, 1.0)), V, "adapters[1].A must have shape [r, 6], got [2, 5]"),
    (lambda: compose(GOOD, LoRA(A.half(), B.half(), 1.0)), T,
     "adapters[1].A must have adapters[0]'s dtype torch.float32, got torch.float16"),
    (lambda: compose(GOOD, LoRA(A.to("meta"), B, 1.0)), V, "adapters[1].A must be a dense tensor with data"),
    (lambda: compose(GOOD, DORA), V,
     "adapters[1].magnitude must be None: what a magnitude changes depends on the weight"),
    (lambda: compose(weights=[1.0, 2.0]), V,
     "weights must be a number or 1 of them, one per model, got a list"),
    (lambda: compose(method="sum"), V,
     "method must be one of 'cat', 'svd', 'ties', 'dare_ties', 'dare_linear'"),
    (lambda: compose(rank=2), V, "rank must be None with method 'cat', got 2"),
    (lambda: compose(method="peft_linear", rank=2), V, "rank must be None with method 'peft_linear', got 2"),
    (lambda: compose(method="svd", rank=5), V, "rank must lie in [1, 4], got 5"),
    (lambda: compose(method="svd", rank=0), V, "rank must lie in [1, 4], got 0"),
    (lambda: compose(method="svd", rank=2.0), T, "rank must be an integer, got float"),
    (lambda: compose(method="svd", density=0.5), V, "density must be None with method 'svd', got 0.5"),
    (lambda: compose(method="ties"), V, "density must be given with method 'ties', got None"),
    (lambda: compose(method="ties", density=1.5), V, "density must lie in [0, 1], got 1.5"),
    (lambda: compose(method="ties", density=0.5, seed=1), V, "seed must be None with method 'ties', got 1"),
    (lambda: compose(method="dare_ties", density=0.5), V,
     "seed must be given with method 'dare_ties', got None"),
    (lambda: compose(method="dare_ties", density=0.5, seed=-1), V, "seed must lie in [0, 2**64), got -1"),
    (lambda: compose(GOOD, LoRA(A[:1], B[:, :1], 1.0), method="peft_linear"), V,
     "adapters[1] must have adapters[0]'s rank 2 with method 'peft_linear', got 1"),
]  # fmt: skip

CASES = [(*case, "merge_lora: ") for case in MERGE] + [(*case, "compose_lora: ") for case in COMPOSE]


@pytest.mark.parametrize(
    ("call", "kind", "text", "op"), CASES, ids=[op + text[:50] for _, _, text, op in CASES]
)
def test_messages(call, kind, text, op):
    with pytest.raises(kind, match="^" + re.escape(op + text)):
        call()
