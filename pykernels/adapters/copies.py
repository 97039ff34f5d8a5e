"""Full tensors and rows in several adapters: they replace the base's, so they are kept where all agree.

Two equal copies say the same, whatever the sum of their changes would be; that is how a merge takes them too.
With weights a copy C of a base W stands for the change C - W, and the sum of the changes is C again only if
the weights of those that hold it sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from pykernels.adapters.checkpoint import Adapter
from pykernels.adapters.keys import TOKENS, A
from pykernels.adapters.pairs import refuse
from pykernels.engine.mapped import Inputs
from pykernels.engine.shard import TensorInfo
from pykernels.engine.strict_json import shown

KEEPING = ("cat", "svd")
"""Methods of plain sums; the others trim, drop or elect what they are given, and a copy is no delta."""


@dataclass
class Kept:
    """What a composed adapter takes over: ``tensors`` by key, ``rows`` of modules, and PEFT's settings."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    bias: str = "none"


def keep(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: str,
    changed: Collection[str],
    inputs: Inputs,
) -> Kept:
    """Copies and token rows of all adapters; ``changed``: modules with factors. Raises FileError by name."""
    return _Keeping(adapters, weights, method, changed, inputs).run()


class _Keeping:
    def __init__(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        method: str,
        changed: Collection[str],
        inputs: Inputs,
    ) -> None:
        self._adapters = adapters
        self._weights = weights
        self._method = method
        self._changed = changed
        self._inputs = inputs
        self._kept = Kept()

    def run(self) -> Kept:
        copies: dict[str, list[tuple[int, TensorInfo]]] = {}
        rows: dict[str, dict[int, list[tuple[int, TensorInfo, int]]]] = {}
        for number, adapter in enumerate(self._adapters):
            self._check_tied(adapter)
            for name, info in adapter.keys.copies.items():
                copies.setdefault(name, []).append((number, info))
            for parts in adapter.keys.modules:
                if (delta := parts.tensors.get(TOKENS)) is not None:
                    indices = adapter.config.rows(parts.module) or ()
                    if len(delta.shape) != 2 or len(indices) != delta.shape[0]:
                        why = f"must have a row for each of {len(indices)} trainable tokens"
                        refuse(delta, f"{why}, got {list(delta.shape)}")
                    for at, row in enumerate(indices):
                        rows.setdefault(parts.module, {}).setdefault(row, []).append((number, delta, at))
        for name, holders in copies.items():
            self._copy(name, holders)
        for module, held in rows.items():
            self._rows(module, held, [info for _, info in copies.get(f"{module}.weight", [])])
        return self._kept

    def _check_tied(self, adapter: Adapter) -> None:
        """Halves of a tied change would be added one by one, and copies would part what they are tied to."""
        apart = [p.tensors for p in adapter.keys.modules if p.embedding or TOKENS in p.tensors]
        both = [*(next(iter(t.values())) for t in apart), *adapter.keys.copies.values()]
        if adapter.config.tied and both:
            refuse(both[0], "ensure_weight_tying is true, and what is composed is not kept tied")

    def _copy(self, name: str, holders: Sequence[tuple[int, TensorInfo]]) -> None:
        """One full tensor; a base layer's own copy says nothing, so it may have any weight."""
        module, _, parameter = name.rpartition(".")
        first = holders[0][1]
        trained = [(n, info) for n, info in holders if not self._of_base(n, info, module, parameter)]
        if trained:
            numbers = [number for number, _ in trained]
            self._check_weights(trained[0][1], numbers, "a full copy replaces the base's tensor")
            if parameter != "bias" and module in self._changed:
                refuse(trained[0][1], "one adapter replaces what another changes")
            for number in numbers:
                config = self._adapters[number].config
                self._kept.saved += [m for m in config.modules_to_save if m not in self._kept.saved]
                if parameter == "bias" and self._kept.bias != "all" and config.bias != "none":
                    self._kept.bias = config.bias
        tensor = self._whole(first)
        for _, info in holders[1:]:
            other = self._whole(info)
            if other.dtype != tensor.dtype or not torch.equal(other, tensor):
                refuse(info, f"differs from the copy in {shown(first.file)}, and one only can be kept")
        key = f"{module}.base_layer.{parameter}" if module in self._changed else name
        self._kept.tensors[key] = tensor

    def _of_base(self, number: int, info: TensorInfo, module: str, parameter: str) -> bool:
        low_rank = {p.module for p in self._adapters[number].keys.modules if A in p.tensors}
        return ".base_layer." in info.name and module in low_rank and parameter == "weight"

    def _rows(
        self,
        module: str,
        held: dict[int, list[tuple[int, TensorInfo, int]]],
        copies: Sequence[TensorInfo],
    ) -> None:
        rows = []
        for row, holders in held.items():
            first = holders[0][1]
            if copies or module in self._changed:
                refuse(first, "overwrites rows of a module that is changed or replaced as well")
            self._check_weights(first, [number for number, _, _ in holders], "rows are overwritten")
            values = [self._inputs.matrix(info)[at] for _, info, at in holders]
            if any(v.dtype != values[0].dtype or not torch.equal(v, values[0]) for v in values):
                refuse(first, f"row {row} is overwritten twice, with other values")
            rows.append(values[0])
        if len({(row.dtype, len(row)) for row in rows}) > 1:
            refuse(first, "has rows of another length or type than those of another adapter")
        self._kept.rows[module] = list(held)
        self._kept.tensors[f"{module}.token_adapter.trainable_tokens_delta"] = torch.stack(rows)

    def _check_weights(self, info: TensorInfo, numbers: Sequence[int], why: str) -> None:
        if self._method not in KEEPING:
            refuse(
                info, f"{why}, and {self._method} has nothing to do there; {' and '.join(KEEPING)} keep it"
            )
        weights = [self._weights[number] for number in numbers]
        if any(w != 1 for w in weights) and not math.isclose(math.fsum(weights), 1.0, rel_tol=1e-9):
            refuse(info, f"{why}, and weights of {weights} cannot be used: each must be 1, or their sum")

    def _whole(self, info: TensorInfo) -> torch.Tensor:
        if not math.prod(info.shape) or not info.shape:
            refuse(info, f"is no weight of a module, got {list(info.shape)}")
        return self._inputs.matrix(info).view(info.shape)
