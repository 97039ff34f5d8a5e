"""Merge methods as rows: name, parameters, passes, paper.

A method takes chunks of one tensor at a time and knows neither files nor YAML: the engine hands it parameters
that are resolved for the tensor (``Params``, plain JSON), a base, the tuned tensors and an output to fill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from pykernels.ops.dare_pass import DarePass, dare_pass
from pykernels.ops.kth_statistic import KthStatistic
from pykernels.ops.linear_merge import linear_pass
from pykernels.ops.task_arithmetic import arithmetic_pass
from pykernels.ops.ties_pass import ties_pass, ties_whole, trims

Params = dict[str, Any]
Tensors = Sequence[torch.Tensor]

REQUIRED: Any = object()
"""Marks a parameter without a default."""


class Statistic(Protocol):
    """A statistics pass: feed every chunk of the scope once per round, in any order, until ``done``."""

    done: bool

    def update(self, base: torch.Tensor | None, tuned: Tensors, offset: int) -> None:
        """Take in one chunk that starts at flat index ``offset`` of the scope."""

    def next_round(self) -> None:
        """Every chunk was seen once: digest the round."""

    def finish(self) -> Any:
        """What the merge pass needs; has ``at(start)`` to shift a model-wide result to a tensor's start."""


@dataclass(frozen=True)
class Method:
    """One merge method. ``model_parameters`` are per model, ``parameters`` per tensor, with defaults.

    ``max_models``: how many it can take, besides a base; None for any number.
    """

    name: str
    paper: str
    needs_base: bool
    model_parameters: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    max_models: int | None = None
    op: ClassVar[str]
    """The op whose kernels merge."""

    def statistic(self, p: Params, numel: int) -> Statistic | None:
        """The pass that must see the whole scope (``numel`` elements) first, or None."""
        return None

    def merge(
        self, p: Params, out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, offset: int, stats: Any
    ) -> None:
        """Fill ``out`` with the merge of one chunk that starts at flat index ``offset`` of its tensor."""
        raise TypeError(f"method {self.name} has no merge pass")

    def whole(self, p: Params, out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors) -> bool:
        """Merge a whole tensor in one pass over memory; False where there is no such form."""
        return False

    def scratch(self, numel: int, models: int) -> int:
        """Bytes of anonymous scratch that ``whole`` may take at the most."""
        return 0


class Linear(Method):
    """out = sum(weight * tensor) / sum(weight)."""

    op = "linear_merge"

    def merge(
        self, p: Params, out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, offset: int, stats: Any
    ) -> None:
        """One streaming pass."""
        linear_pass(out, tuned, p["weight"], normalize=p["normalize"])


class Passthrough(Method):
    """out = the one model's tensor, as it is or as adapters change it."""

    op = "merge_lora"

    def merge(
        self, p: Params, out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, offset: int, stats: Any
    ) -> None:
        """A copy; the engine lets an adapted tensor be computed where it goes, without one."""
        out.copy_(tuned[0])


class TaskArithmetic(Method):
    """out = base + lambda * sum(weight * delta)."""

    op = "task_arithmetic"

    def merge(
        self, p: Params, out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, offset: int, stats: Any
    ) -> None:
        """One streaming pass."""
        arithmetic_pass(out, base, tuned, p["weight"], lambda_=p["lambda"], normalize=p["normalize"])


class Ties(Method):
    """Trim by magnitude, elect the sign, average those who agree."""

    op = "ties_merge"

    def statistic(self, p: Params, numel: int) -> Statistic | None:
        """The exact k-th magnitude per model, unless nothing is trimmed."""
        return KthStatistic(p["density"], numel, p["tie"]) if trims(p["density"]) else None

    def merge(
        self, p: Params, out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, offset: int, stats: Any
    ) -> None:
        """Elect and merge with known cuts."""
        ties_pass(out, base, tuned, stats, offset=offset, **_ties(p))

    def whole(self, p: Params, out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors) -> bool:
        """Selection and merge in one pass over memory."""
        return ties_whole(out, base, tuned, density=p["density"], tie=p["tie"], **_ties(p))

    def scratch(self, numel: int, models: int) -> int:
        """Candidates and uncertain elements; past the bound the kernel takes two passes."""
        return 64 << 20


def _ties(p: Params) -> dict[str, Any]:
    return {k: p[k] for k in ("weight", "normalize", "elect")} | {"lambda_": p["lambda"]}


@dataclass(frozen=True)
class Dare(Method):
    """Drop at random, rescale, then add up (``consensus`` None) or elect and average ("ties")."""

    consensus: str | None = None
    op: ClassVar[str] = "dare_merge"

    def _pass(self, p: Params) -> DarePass:
        return dare_pass(
            weight=p["weight"],
            density=p["density"],
            lambda_=p["lambda"],
            normalize=p["normalize"],
            rescale=p["rescale"],
            consensus=self.consensus,
            elect=p.get("elect", "weighted"),
            seed=p["seed"],
            name=p["name"],
        )

    def statistic(self, p: Params, numel: int) -> Statistic | None:
        """The L1 norms before and after the drop, for ``rescale: l1``."""
        return self._pass(p).statistic(numel)

    def merge(
        self, p: Params, out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, offset: int, stats: Any
    ) -> None:
        """One streaming pass; masks come from the seed, the tensor's name and the element's index."""
        self._pass(p).run(out, base, tuned, offset, stats)


_DARE = {"rescale": "density", "normalize": False, "lambda": 1.0, "int8_mask": False}
_TIES_PAPER = "TIES-Merging (Yadav et al., 2023)"
_DARE_PAPER = "Language Models are Super Mario (Yu et al., 2023)"

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Linear(
            "linear",
            "Model soups (Wortsman et al., 2022)",
            False,
            {"weight": REQUIRED},
            {"normalize": True, "int8_mask": False},
        ),
        Passthrough("passthrough", "no merge: one model, with its adapters", False, {}, max_models=1),
        TaskArithmetic(
            "task_arithmetic",
            "Editing Models with Task Arithmetic (Ilharco et al., 2022)",
            True,
            {"weight": REQUIRED},
            {"normalize": False, "lambda": 1.0, "rescale": None, "int8_mask": False},
        ),
        Ties(
            "ties",
            _TIES_PAPER,
            True,
            {"weight": REQUIRED, "density": 1.0},
            {
                "normalize": True,
                "lambda": 1.0,
                "tie": "index",
                "elect": "weighted",
                "rescale": None,
                "int8_mask": False,
            },
        ),
        Dare("dare_linear", _DARE_PAPER, True, {"weight": REQUIRED, "density": 1.0}, _DARE),
        Dare(
            "dare_ties",
            f"{_DARE_PAPER}; {_TIES_PAPER}",
            True,
            {"weight": REQUIRED, "density": 1.0},
            {**_DARE, "elect": "weighted"},
            consensus="ties",
        ),
    )
}
