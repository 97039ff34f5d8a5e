"""LoRA's ops in the table of cases: our calls, PEFT's, the least bytes, and the control of a merge."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import pykernels
from pykernels import LoRA
from pykernels.bench.inputs import Inputs, Spec

Options = Mapping[str, Any]


def adapters(x: Inputs, options: Options) -> list[LoRA]:
    """Adapters of the row's number and rank in the weight's dtype, as PEFT is at its fastest with them."""
    return list(_adapters(x.base.shape, x.base.dtype, options["r"], options.get("adapters", 1)))


@functools.lru_cache(maxsize=8)  # the rows of a table, which take turns: else a call would draw its own
def _adapters(shape: torch.Size, dtype: torch.dtype, rank: int, count: int) -> tuple[LoRA, ...]:
    random = torch.Generator().manual_seed(rank)
    made = []
    for _ in range(count):
        A = torch.randn(rank, shape[1], generator=random) * 0.02
        B = torch.randn(shape[0], rank, generator=random) * 0.02
        made.append(LoRA(A.to(dtype), B.to(dtype), 2.0 / count))
    return tuple(made)


def _merge(x: Inputs, out: torch.Tensor | None, o: Options) -> Any:
    """In place, as a checkpoint's tensors are merged."""
    return pykernels.merge_lora(x.base, adapters(x, o), out=x.base)


def _compose(x: Inputs, out: torch.Tensor | None, o: Options) -> Any:
    return pykernels.compose_lora(adapters(x, o), 1.0, method=o["method"])


CALLS: dict[str, Callable[[Inputs, torch.Tensor | None, Options], Any]] = {
    "merge_lora": _merge,
    "compose_lora": _compose,
}
TRAFFIC: dict[str, Callable[[Spec], int]] = {
    "merge_lora": lambda s: 2 * s.tensor_bytes,
    "compose_lora": lambda s: 9 * 16 * sum(s.shape) * s.dtype.itemsize,  # eight of rank 16 in, one out
}


def read_modify_write(x: Inputs) -> None:
    """The least that a merge in place must move: each element read and written back."""
    x.base.view(torch.int32).bitwise_or_(0)


def values(result: Any) -> torch.Tensor:
    """The result as one tensor: an adapter's delta."""
    return result.scaling * (result.B.float() @ result.A.float()) if isinstance(result, LoRA) else result


def in_peft(op: str, weight: torch.Tensor, given: Sequence[LoRA]) -> Callable[[], Any]:
    """PEFT on a model of one layer: ``merge`` of all adapters, or ``add_weighted_adapter``.

    The adapters are of one rank and scaling; the weight is copied.
    """
    peft = importlib.import_module("peft")
    names = [str(i) for i in range(len(given))]
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = torch.nn.Parameter(weight.clone())
    rank = given[0].A.shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=given[0].scaling * rank, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(base), config, "0")
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for name, a in zip(names, given, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a.A.clone(), a.B.clone()

    def merge() -> torch.Tensor:
        layer.merge(adapter_names=names)
        layer.merged_adapters.clear()
        merged: torch.Tensor = layer.get_base_layer().weight.data
        return merged

    fresh = map("sum{}".format, itertools.count())

    def compose() -> LoRA:
        name = next(fresh)
        model.add_weighted_adapter(names, [1.0] * len(names), name, combination_type="svd")
        A, B = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
        made = LoRA(A, B, layer.scaling[name])
        model.delete_adapter(name)
        return made

    return merge if op == "merge_lora" else compose
