"""The one table of what is measured on a GPU: ops, shapes and dtypes; first what the targets are set for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pykernels import backends
from pykernels.bench import cases
from pykernels.bench.inputs import LOGITS, Inputs, Spec
from pykernels.ops.kth_magnitude import counts
from pykernels.ops.ties_pass import ties_pass

PASS = "ties_pass"
"""TIES with known cuts: the merge pass alone."""


@dataclass(frozen=True)
class Case:
    """One row: an op, or :data:`PASS`, on inputs of one kind. ``options`` go to the op as they are."""

    op: str
    spec: Spec
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def like(self) -> cases.Case:
        """The row of the CPU's table with the same op, inputs and options."""
        return cases.Case("ties_merge" if self.op == PASS else self.op, self.spec, self.options)

    @property
    def name(self) -> str:
        """Unique and readable."""
        return self.like.name.replace("ties_merge", self.op, 1)

    @property
    def nbytes(self) -> int:
        """Least traffic of the mathematics: every input once, the output once."""
        return self.like.nbytes

    def on(self, spec: Spec) -> Case:
        """The same on other inputs."""
        return Case(self.op, spec, self.options)

    def call(self, x: Inputs) -> Callable[[], Any]:
        """The timed call on one set of inputs; the cuts of :data:`PASS` are found now."""
        if self.op != PASS:
            return self.like.call(x)
        k = counts([self.options["density"]] * len(x.tuned), x.base.numel())
        cut = backends.call("kth_magnitude", x.base)(x.base, x.tuned, k)
        weight = cases.weights(x)
        rules: dict[str, Any] = {"lambda_": 1.0, "normalize": True, "elect": "weighted"}

        def run() -> torch.Tensor:
            ties_pass(x.out, x.base, x.tuned, cut, weight=weight, **rules)
            return x.out

        return run


_D2, _D5 = {"density": 0.2}, {"density": 0.5}
_CONSENSUS = {**_D5, "consensus": "ties"}
_MERGES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("linear_merge", {}),
    ("task_arithmetic", {}),
    (PASS, _D2),
    ("kth_magnitude", _D2),
    ("ties_merge", _D2),
    ("ties_merge", {**_D2, "tie": "keep"}),
    ("dare_merge", _D5),
    ("dare_merge", _CONSENSUS),
)
_OTHERS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("ties_merge", _D5),
    ("dare_merge", {**_D5, "rescale": "l1"}),
    ("elect_sign", {}),
)
_SINGLES: tuple[tuple[str, Mapping[str, Any]], ...] = (("trim", _D2), ("drop_rescale", _D5))

SQUARE, WIDE, LARGE = (4096, 4096), (4096, 14336), (8192, 28672)
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16

GROUPS: tuple[tuple[Spec, tuple[tuple[str, Mapping[str, Any]], ...]], ...] = (
    (Spec(SQUARE, BF16, 3), _MERGES + _OTHERS),
    (Spec(LARGE, BF16, 3), _MERGES),
    (Spec(SQUARE, FP32, 3), _MERGES),
    (Spec(LARGE, FP32, 3), _MERGES),
    (Spec(SQUARE, BF16, 8), _MERGES),
    (Spec(LARGE, BF16, 8), _MERGES),
    (Spec(SQUARE, FP32, 8), _MERGES),
    (Spec(LARGE, FP32, 8), _MERGES),
    (Spec(WIDE, BF16, 3), _MERGES),
    (Spec(SQUARE, FP16, 3), _MERGES),
    (Spec(SQUARE, BF16, 1), _SINGLES),
    (Spec(SQUARE, BF16, 3, "heavy ties"), _MERGES[3:5]),
    (Spec(SQUARE, BF16, 3, "student-t 4"), _MERGES[3:5]),
    (Spec(SQUARE, BF16, 3, "block-scaled 128"), _MERGES[3:5]),
)
"""Rows that share inputs, in the order in which they are measured while there is time."""

_EAGER = ("naive torch", "tuned torch")
_AGAINST: tuple[tuple[str, Mapping[str, Any], tuple[str, ...]], ...] = (
    ("ties_merge", _D2, ("mergekit", "peft", *_EAGER)),
    ("dare_merge", _CONSENSUS, ("mergekit", "peft", *_EAGER)),
    ("dare_merge", _D5, ("mergekit", "peft", *_EAGER)),
    ("linear_merge", {}, ("mergekit", *_EAGER)),
    ("task_arithmetic", {}, ("mergekit", *_EAGER)),
)


def _peers(shape: tuple[int, int], names: tuple[str, ...] = ()) -> tuple[cases.Case, ...]:
    spec = Spec(shape, BF16, 3)
    return tuple(
        cases.Case(op, spec, options, peers=dict.fromkeys(names or those, 1.0))
        for op, options, those in _AGAINST
    )


PEERS = (*_peers(SQUARE), *_peers(WIDE), *_peers(SQUARE, ("torch.compile",)))
"""Rows that are timed against competitors; the compiler's last, as it takes its time."""


def table() -> list[tuple[Spec, list[Case]]]:
    """All groups as cases."""
    return [(spec, [Case(op, spec, options) for op, options in rows]) for spec, rows in GROUPS]


_ELEMENTS = 1 << 26
VOCABULARY = 151_936


def _logits(rows: int, n: int, dtype: torch.dtype, more: int = 0) -> Spec:
    return Spec((rows, n), dtype, more, LOGITS)


def softmax() -> list[tuple[Spec, list[Case]]]:
    """Softmax by row length, at small batches of a whole vocabulary, and its gradients.

    First what the targets are set for.
    """
    found: list[tuple[Spec, str, Mapping[str, Any]]] = []

    def plain(*lengths: int) -> None:
        found.extend((_logits(_ELEMENTS // n, n, d), "softmax", {}) for n in lengths for d in (BF16, FP32))

    plain(1024, 4096)
    found += [(_logits(rows, VOCABULARY, FP32), "softmax", {"temperature": 0.7}) for rows in (1, 16, 128)]
    found += [
        (_logits(_ELEMENTS // n, n, d, 1), f"{op}_backward", {})
        for n, op in ((4096, "softmax"), (32_768, "softmax"), (4096, "log_softmax"))
        for d in (BF16, FP32)
    ]
    plain(131_072, 262_144)  # not before, as torch's compiler takes its time for them
    plain(16_384, 32_768, 65_536, 2048, 8192)
    found += [
        (_logits(16_384, 4096, FP32), "log_softmax", {}),
        (_logits(16_384, 4096, FP32), "logsumexp", {}),
    ]
    return [(spec, [Case(op, spec, options)]) for spec, op, options in found]
