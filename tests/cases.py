"""The table of cases that kernels, ops and references are tested on, and the data behind it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pykernels.cut import KEEP_ALL_EQUALS, Cut
from pykernels.ref.kth_magnitude import kth_magnitude
from pykernels.ref.philox import mask_key
from pykernels.ref.rounding import NAN

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    None: "same",
}
EDGES = (
    0,
    1,
    2,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    65,
    127,
    128,
    129,
    255,
    257,
    4095,
    4096,
    4097,
    65535,
    65536,
    65537,
)
"""One below, at and one above every width in the kernels: lanes, groups, tiles, blocks, chunks."""

Tensors = list[torch.Tensor]


def gaussian(numel: int, models: int, g: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    """A layer of weights and fine-tuning changes of a fortieth of their size."""
    base = torch.randn(numel, generator=g) * 0.02
    return base, [base + torch.randn(numel, generator=g) * 5e-4 for _ in range(models)]


def student(numel: int, models: int, g: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    """Heavy tails: Student's t with 4 degrees of freedom."""
    base = torch.randn(numel, generator=g) * 0.02
    chi = [sum(torch.randn(numel, generator=g) ** 2 for _ in range(4)) / 4 for _ in range(models)]
    return base, [base + 5e-4 * torch.randn(numel, generator=g) / c.sqrt() for c in chi]


def scaled(numel: int, models: int, g: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    """Changes whose size differs from block to block of 64 elements, as along rows and heads."""
    base = torch.randn(numel, generator=g) * 0.02
    scale = torch.exp(1.5 * torch.randn(numel // 64 + 1, generator=g)).repeat_interleave(64)[:numel]
    return base, [base + 5e-4 * scale * torch.randn(numel, generator=g) for _ in range(models)]


def ties(numel: int, models: int, g: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    """Five magnitudes in all, so that every cut falls among equals."""
    base = torch.randint(-8, 9, (numel,), generator=g) / 64
    return base, [base + torch.randint(-4, 5, (numel,), generator=g) / 64 for _ in range(models)]


def zeros(numel: int, models: int, g: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    """Models that did not move."""
    base = torch.randn(numel, generator=g)
    return base, [base.clone() for _ in range(models)]


def special(numel: int, models: int, g: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    """A quarter of the elements NaN, Inf, signed zero, subnormal or largest, in base and models alike."""
    values = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 6e4, -6e4, 3e38, -3e38]
    )

    def seasoned(x: torch.Tensor) -> torch.Tensor:
        pick = values[torch.randint(len(values), (numel,), generator=g)]
        return torch.where(torch.rand(numel, generator=g) < 0.25, pick, x)

    base, tuned = gaussian(numel, models, g)
    return seasoned(base), [seasoned(t) for t in tuned]


def integers(numel: int, models: int, g: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    """Small integers: with weights that are powers of two every sum is exact, so == can be asked for."""
    base = torch.randint(-8, 9, (numel,), generator=g).float()
    return base, [base + torch.randint(-4, 5, (numel,), generator=g) for _ in range(models)]


def wide(numel: int, models: int, g: torch.Generator) -> tuple[torch.Tensor, Tensors]:
    """Magnitudes of every size, so that a sum of them shows its order, in float64 too."""
    base = torch.zeros(numel)
    return base, [
        torch.randn(numel, generator=g) * torch.exp2(torch.randint(-60, 60, (numel,), generator=g))
        for _ in range(models)
    ]


DATA: dict[str, Callable[[int, int, torch.Generator], tuple[torch.Tensor, Tensors]]] = {
    f.__name__: f for f in (gaussian, student, scaled, ties, zeros, special, integers, wide)
}


@functools.lru_cache(maxsize=4)
def make(data: str, numel: int, models: int, dtype: torch.dtype) -> tuple[torch.Tensor, Tensors]:
    """(base, tuned) in ``dtype``: the same for the same arguments, and not to be written to."""
    g = torch.Generator().manual_seed(numel * 67 + models)
    base, tuned = DATA[data](numel, models, g)
    return base.to(dtype), [t.to(dtype) for t in tuned]


def one_nan(base: torch.Tensor | None, tuned: Tensors) -> tuple[torch.Tensor | None, Tensors]:
    """The same with the canonical NaN everywhere: kernels of a GPU give all NaN the key of that one."""

    def canonical(x: torch.Tensor) -> torch.Tensor:
        bits, nan = NAN[x.dtype]
        return x.view(bits).masked_fill(x.isnan(), nan).view(x.dtype)

    return None if base is None else canonical(base), [canonical(t) for t in tuned]


def weights(models: int) -> list[float]:
    """Unequal weights, the third negative."""
    return [(-0.375 if m == 2 else 0.3 + 0.2 * (m % 4)) for m in range(models)]


@dataclass(frozen=True)
class Case:
    """One merge at the level of the kernels."""

    op: str  # linear_merge | ties_merge | dare_merge
    data: str = "gaussian"
    numel: int = 4097
    models: int = 3
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None
    with_base: bool = True
    density: float = 0.3
    tie: str = "index"
    elect: str | None = "weighted"
    normalize: object = True
    lambda_: float = 0.7
    offset: int = 0

    def __str__(self) -> str:
        parts = [self.op, self.data, f"{self.numel}x{self.models}", SHORT[self.dtype]]
        if self.out_dtype:
            parts.append(f"to_{SHORT[self.out_dtype]}")
        if not self.with_base:
            parts.append("deltas")
        if self.op != "linear_merge":
            parts += [f"d{self.density}", f"{self.elect}", f"by_{self.normalize}"]
        if self.op == "ties_merge":
            parts.append(self.tie)
        if self.offset:
            parts.append(f"at{self.offset}")
        return "-".join(parts)

    def inputs(self) -> tuple[torch.Tensor | None, Tensors]:
        """(base or None, tuned). Without a base, ``tuned`` are deltas in the same dtype."""
        base, tuned = make(self.data, self.numel, self.models, self.dtype)
        return (base, tuned) if self.with_base else (None, [t - base for t in tuned])

    def weight(self) -> list[float]:
        """Exact powers of two on integer data."""
        return (
            [2.0 ** -(m % 3) for m in range(self.models)] if self.data == "integers" else weights(self.models)
        )

    def k(self) -> list[int]:
        """Kept entries per model, around the density; none and all among them where there are many models."""
        count = [
            max(1, int(self.density * self.numel * (1 + 0.1 * m) / (1 + m // 4))) for m in range(self.models)
        ]
        if self.models > 3:
            count[3], count[1] = 0, self.numel
        return [0 if self.density == 0 else min(self.numel, c) for c in count]

    def cut(self) -> Cut:
        """The true cut, in flat indices of a tensor that begins ``offset`` elements earlier."""
        cut = kth_magnitude(*self.inputs(), self.k())
        equals = [KEEP_ALL_EQUALS if self.tie == "keep" and last >= 0 else last for last in cut.last]
        return Cut(cut.key, equals).at(-self.offset)

    def combine(self) -> tuple[list[float], list[float] | None, list[float] | None, float, str | None]:
        """(weight, vote, share, lambda_, elect) of the kernels."""
        weight = self.weight()
        vote = [1.0 + 0.5 * (m % 2) for m in range(self.models)] if self.elect == "plain" else None
        share = weight if self.normalize is True else [1.0] * self.models
        return (
            weight,
            vote,
            None if self.elect is None or self.normalize is False else share,
            self.lambda_,
            self.elect,
        )

    def masks(self) -> tuple[list[int], list[int], int]:
        """(threshold, model, key) of the random masks: none, all and odd model numbers included."""
        threshold = [round(self.density * 65536)] * self.models
        if self.models > 3:
            threshold[3], threshold[1] = 0, 65536
        return threshold, [3 * m + 1 for m in range(self.models)], mask_key(7, "layer.0")

    def arguments(self) -> tuple:
        """What follows ``out`` in the kernel's signature; the truth takes the same."""
        base, tuned = self.inputs()
        if self.op == "linear_merge":
            return base, tuned, self.weight()
        if self.op == "ties_merge":
            return base, tuned, self.cut(), *self.combine(), self.offset
        return base, tuned, *self.masks(), *self.combine(), self.offset


def table() -> list[Case]:
    """Every variant at one size, every size at one variant, and every kind of data."""
    one = [Case("linear_merge"), Case("ties_merge"), Case("dare_merge", density=0.5)]
    cases = [replace(c, dtype=d, with_base=b) for c in one for d in DTYPES for b in (True, False)]
    cases += [replace(c, numel=n, dtype=d) for n in EDGES for c, d in zip(one, _turn(n), strict=True)]
    cases += [
        replace(c, models=n, dtype=d) for n in (1, 2, 8, 9, 64) for c, d in zip(one, _turn(n), strict=True)
    ]
    cases += [
        replace(c, data=name, dtype=d) for c in one for name in DATA if name != "gaussian" for d in DTYPES
    ]
    cases += [
        replace(c, dtype=d, out_dtype=o) for c in one for d, o in itertools.product(DTYPES, DTYPES) if d != o
    ]
    cases += [replace(one[0], dtype=d, out_dtype=torch.float64) for d in DTYPES]
    for c, elect, normalize in itertools.product(
        one[1:], ("weighted", "plain", None), (True, False, "count")
    ):
        if elect or not normalize:
            cases += [
                replace(c, elect=elect, normalize=normalize, data=d, models=4) for d in ("gaussian", "ties")
            ]
    cases += [replace(one[1], density=d, tie=t, data=n) for d in (0, 0.01, 0.9, 1) for t in ("index", "keep")
              for n in ("gaussian", "ties")]  # fmt: skip
    cases += [replace(one[2], density=d) for d in (0, 2**-16, 0.1, 1 - 2**-16, 1)]
    cases += [replace(c, offset=o) for c in one[1:] for o in (4096, 2**32 - 4096, 2**36 + 8192)]
    return list(dict.fromkeys(cases))


def large() -> list[Case]:
    """Sizes past every chunk, past the reference's block, and past where results are streamed out."""
    return [
        Case("linear_merge", numel=2**20 + 4096 + 77, models=2),
        Case("ties_merge", numel=2**20 + 4096 + 77, models=2),
        Case("dare_merge", numel=2**20 + 4096 + 77, models=2, density=0.2),
        Case("ties_merge", "ties", numel=600_007, dtype=torch.float16),
        Case("ties_merge", "scaled", numel=300_007, dtype=torch.float32, elect="plain", normalize="count"),
    ]


def _turn(n: int) -> tuple[torch.dtype, ...]:
    """The dtypes, in an order that depends on ``n``, so that sizes and dtypes meet without a full product."""
    return DTYPES[n % 3 :] + DTYPES[: n % 3]
