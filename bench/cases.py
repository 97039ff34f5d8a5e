"""The one table of benchmark cases: op, inputs, options, least bytes, and what it has to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import pykernels
from pykernels.bench import lora_calls, lora_rows, softmax_calls
from pykernels.bench.inputs import LOGITS, LORA, Inputs, Spec

SEED = 7


@dataclass(frozen=True)
class Target:
    """A bound on this row's time by that of ``of``: "ideal", or the name of another row (``word`` in tables).

    "copy" is a plain copy of as many bytes, "ms" a millisecond. Rows of kind "call" and "memory" are held
    against the figure itself: ``of`` is its unit, "us" or "MiB" (64 MiB and 16 MiB per thread, for the two
    threads that the targets are set for).
    """

    of: str = "ideal"
    word: str = ""
    most: float | None = None
    least: float | None = None
    aim: float | None = None

    def met(self, ratio: float) -> bool:
        """Whether the ratio is within what must be reached."""
        return (self.most is None or ratio <= self.most) and (self.least is None or ratio >= self.least)


@dataclass(frozen=True)
class Case:
    """One row. ``options`` go to the op as they are; ``out="fresh"`` lets it allocate its result.

    ``kind``: "time" (milliseconds), "call" (microseconds, 64 elements), "memory" (MiB beyond in- and output),
    "cache" (microseconds on inputs that stay in the cache, by turns with the peers), "turns" (milliseconds,
    by turns with the peers: products of matrices, bound by arithmetic), "over" (microseconds beyond torch's
    frozen layer, on a tiny one).
    ``peers``: what to beat, by the least ratio: {"mergekit": 20}; empty: no peer is timed.
    """

    op: str
    spec: Spec = field(default_factory=Spec)
    options: Mapping[str, Any] = field(default_factory=dict)
    target: Target = field(default_factory=Target)
    kind: str = "time"
    out: str = "reused"
    threads: int | None = None
    isa: str | None = None
    peers: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique and readable: what the row is called in tables, JSON and test ids."""
        parts = [self.op]
        parts += [self.kind] if self.kind != "time" else []
        parts += ["64 elements" if self.kind == "call" else self.spec.label]
        parts += [f"{_WORDS.get(k, k)}={v}" for k, v in self.options.items()]
        parts += ["fresh output"] if self.out == "fresh" else []
        parts += [f"{self.threads} thread"] if self.threads else []
        parts += [self.isa] if self.isa else []
        return " ".join(parts)

    @property
    def nbytes(self) -> int:
        """Least traffic of the mathematics: every input once, the output once."""
        return _TRAFFIC[self.op](self.spec)

    def call(self, x: Inputs) -> Callable[[], Any]:
        """The timed call on one set of inputs."""
        out = None if self.out == "fresh" else x.out
        return lambda: CALLS[self.op](x, out, self.options)


_WORDS = {"density": "d"}


def weights(x: Inputs) -> list[float]:
    """A weight per tuned tensor, all different."""
    return [0.5 / (i + 1) + 0.1 for i in range(len(x.tuned))]


def _linear(x: Inputs, out: torch.Tensor | None, o: Mapping[str, Any]) -> Any:
    return pykernels.linear_merge(x.all, [1.0, *weights(x)], out=out, **o)


def _arithmetic(x: Inputs, out: torch.Tensor | None, o: Mapping[str, Any]) -> Any:
    return pykernels.task_arithmetic(x.base, x.tuned, weight=weights(x), out=out, **o)


def _kth(x: Inputs, out: torch.Tensor | None, o: Mapping[str, Any]) -> Any:
    return pykernels.kth_magnitude(x.base, x.tuned, **o)


def _ties(x: Inputs, out: torch.Tensor | None, o: Mapping[str, Any]) -> Any:
    return pykernels.ties_merge(x.base, x.tuned, weight=weights(x), out=out, **o)


def _dare(x: Inputs, out: torch.Tensor | None, o: Mapping[str, Any]) -> Any:
    return pykernels.dare_merge(x.base, x.tuned, seed=SEED, weight=weights(x), out=out, **o)


def _trim(x: Inputs, out: torch.Tensor | None, o: Mapping[str, Any]) -> Any:
    return pykernels.trim(x.tuned[0], out=out, **o)


def _elect(x: Inputs, out: torch.Tensor | None, o: Mapping[str, Any]) -> Any:
    return pykernels.elect_sign(x.tuned, weights(x), **o)


def _drop(x: Inputs, out: torch.Tensor | None, o: Mapping[str, Any]) -> Any:
    return pykernels.drop_rescale(x.tuned[0], seed=SEED, out=out, **o)


CALLS: dict[str, Callable[[Inputs, torch.Tensor | None, Mapping[str, Any]], Any]] = {
    "linear_merge": _linear, "task_arithmetic": _arithmetic, "kth_magnitude": _kth, "ties_merge": _ties,
    "dare_merge": _dare, "trim": _trim, "elect_sign": _elect, "drop_rescale": _drop,
    **softmax_calls.CALLS, **lora_calls.CALLS, **lora_rows.CALLS,
}  # fmt: skip


def _merge_bytes(s: Spec) -> int:
    return (s.n + 2) * s.tensor_bytes


_TRAFFIC: dict[str, Callable[[Spec], int]] = {
    "linear_merge": _merge_bytes,
    "task_arithmetic": _merge_bytes,
    "ties_merge": _merge_bytes,
    "dare_merge": _merge_bytes,
    "kth_magnitude": lambda s: (s.n + 1) * s.tensor_bytes,
    "trim": lambda s: 2 * s.tensor_bytes,
    "drop_rescale": lambda s: 2 * s.tensor_bytes,
    "elect_sign": lambda s: s.n * s.tensor_bytes + s.shape[0] * s.shape[1],
    **softmax_calls.TRAFFIC,
    **lora_calls.TRAFFIC,
    **lora_rows.TRAFFIC,
}

SQUARE = Spec()
LARGE = Spec(shape=(4096, 11008))
FP32 = Spec(dtype=torch.float32)
FP16 = Spec(dtype=torch.float16)
EIGHT = Spec(n=8)
TIED = Spec(data="heavy ties")
STUDENT = Spec(data="student-t 4")
BLOCKS = Spec(data="block-scaled 128")
ONE = Spec(n=1)

_LINEAR = Target(most=1.3, aim=1.1)
_KTH = Target(most=2.2, aim=1.4)
_D2, _D5 = {"density": 0.2}, {"density": 0.5}
_K2, _K5 = {**_D2, "tie": "keep"}, {**_D5, "tie": "keep"}
_CONSENSUS = {**_D5, "consensus": "ties"}
_BEAT_TIES = {"naive torch": 1.0, "tuned torch": 1.0, "mergekit": 150.0, "peft": 1.0}
_BEAT_LINEAR = {"naive torch": 1.0, "tuned torch": 1.0, "mergekit": 20.0}
_BEAT_DARE = {"naive torch": 1.0, "tuned torch": 1.0, "mergekit": 60.0, "peft": 1.0}


def _index(spec: Spec, options: Mapping[str, Any]) -> Case:
    """The default tie rule, held against "keep" on the same inputs."""
    keep = Case("ties_merge", spec, {**options, "tie": "keep"}).name
    return Case("ties_merge", spec, {**options, "tie": "index"}, Target(keep, "keep", most=1.3, aim=1.1))


_FULL = (
    Case("linear_merge", SQUARE, {}, _LINEAR, peers=_BEAT_LINEAR),
    Case("task_arithmetic", SQUARE, {}, _LINEAR, peers=_BEAT_LINEAR),
    Case("kth_magnitude", SQUARE, _D2, _KTH),
    Case("ties_merge", SQUARE, _K2, Target(most=3.5, aim=2.0), peers=_BEAT_TIES),
    Case("ties_merge", SQUARE, _K5, Target(most=3.5, aim=2.0), peers=_BEAT_TIES),
    _index(SQUARE, _D2),
    _index(SQUARE, _D5),
    Case("dare_merge", SQUARE, _D5, Target(most=3.0, aim=2.0), peers=_BEAT_DARE),
    Case("dare_merge", SQUARE, _CONSENSUS, Target(most=3.8, aim=2.5), peers=_BEAT_DARE),
    Case("dare_merge", SQUARE, {**_D5, "rescale": "l1"}),
    Case("elect_sign", SQUARE),
    Case("trim", ONE, _D2),
    Case("drop_rescale", ONE, _D5),
)
_SPECS = (LARGE, FP32, FP16, EIGHT)
_OTHER_INPUTS = (
    *(Case(op, spec, {}, _LINEAR) for spec in _SPECS for op in ("linear_merge", "task_arithmetic")),
    *(Case("kth_magnitude", spec, _D2, _KTH) for spec in _SPECS),
    Case("kth_magnitude", TIED, _D2, Target(most=1.5, aim=1.4)),
    *(Case("ties_merge", LARGE, keep, Target(most=2.0, aim=1.5)) for keep in (_K2, _K5)),
    *(Case("ties_merge", FP32, keep, Target(most=2.2, aim=2.0)) for keep in (_K2, _K5)),
    *(Case("ties_merge", FP16, keep, Target(most=3.5, aim=2.0)) for keep in (_K2, _K5)),
    *(Case("ties_merge", EIGHT, keep, Target(most=3.5, aim=2.0)) for keep in (_K2, _K5)),
    *(Case("dare_merge", spec, _D5, Target(most=3.0, aim=2.0)) for spec in (LARGE, FP16, EIGHT)),
    *(Case("dare_merge", spec, _CONSENSUS, Target(most=3.8, aim=2.5)) for spec in (LARGE, FP16, EIGHT)),
    Case("dare_merge", FP32, _D5, Target(most=2.0, aim=2.0)),
    Case("dare_merge", FP32, _CONSENSUS, Target(most=2.2, aim=2.2)),
    *(Case("kth_magnitude", spec, _D2) for spec in (STUDENT, BLOCKS)),
    *(Case("ties_merge", spec, _K2) for spec in (TIED, STUDENT, BLOCKS)),
    *(_index(spec, _D2) for spec in (LARGE, FP32, EIGHT, TIED, STUDENT, BLOCKS)),
)  # fmt: skip

_CORE = tuple(case for case in _FULL if case.target.of == "ideal" and case.target.most)
_VARIANTS = (
    *(Case(c.op, c.spec, c.options, out="fresh") for c in _CORE if c.op != "kth_magnitude"),
    *(
        Case(c.op, c.spec, c.options, Target(c.name, "two threads", least=1.6, aim=1.85), threads=1)
        for c in _CORE
    ),
    *(Case(c.op, c.spec, c.options, Target(c.name, "avx512", most=2.0, aim=1.4), isa="avx2") for c in _CORE),
    *(Case(c.op, c.spec, c.options, Target("MiB", most=96), kind="memory") for c in _CORE),
    *(Case(c.op, Spec((1, 64)), c.options, Target("us", most=15, aim=5), kind="call") for c in _FULL),
)


def _logits(rows: int, n: int, dtype: torch.dtype = torch.float32, more: int = 0) -> Spec:
    return Spec((rows, n), dtype, more, LOGITS)


def _out_of_range(dtype: torch.dtype) -> tuple[Case, ...]:
    """Logits with many denormal results, or masked, held against plain ones on tensors of the same size."""
    spec = _logits(4096, 4096, dtype, 3)
    plain = Case("softmax", spec)
    as_plain = Target(plain.name, "plain", most=1.2, aim=1.1)
    cliff = {"torch": 4.0 if dtype == torch.float32 else 1.0}
    return (
        plain,
        Case("softmax", spec, {"logits": "spread"}, as_plain, peers=cliff),
        Case("softmax", spec, {"logits": "masked"}, as_plain, peers={"torch": 1.0}),
    )


_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES)
_FITS = ((8192, 4096), (512, 128256))
_FIT = Target("copy", "copy", most=1 / 0.85, aim=1 / 0.92)
_TWICE = Target(most=1 / 0.9, aim=1 / 0.95)
"""A row that does not fit is read twice: its control reads two tensors."""
_SOFTMAX = (
    *(Case("softmax", _logits(*shape), {}, _FIT, peers={"torch": 1.3}) for shape in _FITS),
    *(Case("softmax", _logits(*shape, d), peers={"torch": 1.5}) for shape in _FITS for d in _HALVES),
    Case("softmax", _logits(64, 10**6, more=1), {}, _TWICE, peers={"torch": 1.5}),
    Case("softmax", _logits(1, 10**8, more=1), {}, _TWICE, peers={"torch": 3.0}),
    *(Case("softmax", _logits(1, 10**8, d, 1), peers={"torch": 6.0}) for d in _HALVES),
    *(case for d in _FLOATS for case in _out_of_range(d)),
    *(
        Case("softmax", _logits(*shape, d), {"dim": 0}, peers={"torch": 1.5})
        for shape in ((4096, 8192), (10**6, 8))
        for d in _FLOATS
    ),
    *(Case("log_softmax", _logits(*shape), peers={"torch": 1.4}) for shape in _FITS),
    Case("logsumexp", _logits(8192, 4096), peers={"torch": 1.0}),
    *(
        Case(f"{op}_backward", _logits(8192, 4096, d, 1), peers={"torch": 1.0})
        for op in ("softmax", "log_softmax")
        for d in (torch.float32, torch.bfloat16)
    ),
    *(
        Case("softmax", _logits(rows, n, d), kind="cache", peers={"torch": 1.0})
        for d in _FLOATS
        for n in (64, 128, 256, 512, 1024, 2048, 4096)
        for rows in (1, 2**14 // n)
    ),
    *(
        Case("softmax", _logits(2**14 // n, n, d), kind="cache", peers={"torch": 1.0})
        for d in (torch.float32, torch.bfloat16)
        for n in (100, 1000)
    ),
)

_WEIGHT = Spec(n=0, data=LORA)
_EIGHT_ADAPTERS = {"r": 16, "adapters": 8}
_LORA = (
    *(
        Case("merge_lora", _WEIGHT, {"r": r}, Target(most=most, aim=aim), peers={"peft": least})
        for r, most, aim, least in ((8, 1.5, 1.15, 10.0), (16, 2.0, 1.3, 8.0), (64, 6.5, 4.0, 4.0))
    ),
    Case("merge_lora", _WEIGHT, _EIGHT_ADAPTERS, peers={"peft": 15.0}),
    Case("merge_lora", Spec(dtype=torch.float32, n=0, data=LORA), {"r": 16}),
    Case("compose_lora", Spec((2048, 2048), torch.float32, 0, LORA), {**_EIGHT_ADAPTERS, "method": "svd"},
         Target("ms", most=35, aim=15), peers={"peft": 300.0}),
)  # fmt: skip


def _lora(peers: Mapping[str, float], rows: int, spec: Spec = ONE, **options: Any) -> Case:
    return Case("lora_linear", spec, {"rank": 16, "rows": rows, **options}, kind="turns", peers=peers)


_OTHERS = {"peft compiled": 1.0, "addmm_": 1.0, "unsloth": 1.0, "lorafusion": 1.0}
_SLOW = {"addmm_": 1.0, "lorafusion": 1.0}
_FP32 = Spec(dtype=torch.float32, n=1)
_SAME = {"frozen F.linear": 1 / 1.02}
_LORA_LAYERS = (
    _lora({"own frozen": 1 / 1.05, "frozen F.linear": 1.4, "peft": 1.4, **_OTHERS, "vllm": 1.0}, 1),
    _lora({"own frozen": 1 / 1.03, "frozen F.linear": 3.5, "peft": 3.5, **_OTHERS}, 32),
    _lora({"own frozen": 1 / 1.03, "frozen F.linear": 2.8, "peft": 2.8, **_SLOW}, 512),
    _lora({"frozen F.linear": 2.8}, 2048),
    _lora({"own frozen": 1 / 1.08, "frozen F.linear": 1.4}, 1, rank=64),
    _lora({"own frozen": 1 / 1.06, "frozen F.linear": 2.8}, 512, rank=64),
    _lora({"own frozen": 1 / 1.05, "peft": 1.0, "vllm": 1.0}, 32, adapters=32),
    _lora({"own frozen": 1 / 1.03}, 128, step=True),  # torch's gradients take a quarter of a minute
    _lora({"peft": 2.5, **_OTHERS}, 8, step=True),
    _lora({"peft": 2.5, "lorafusion": 1.0}, 8, step=True, dropout=0.1),
    *(_lora({"without magnitude": 1 / 1.02, "peft": 1.0}, rows, dora=True) for rows in (1, 32)),
    *(_lora({**_SAME, "peft": 1.0}, rows, _FP32) for rows in (1, 32)),
    _lora(_SAME, 512, _FP32),
    *(
        Case("lora_linear", Spec((64, 64), d, 1), {"rank": 16, "rows": 1}, Target("us", most=30, aim=10),
             kind="over", peers={"peft": 1.0})
        for d in (torch.bfloat16, torch.float32)
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_FULL, *_OTHER_INPUTS, *_VARIANTS, *_SOFTMAX, *_LORA, *_LORA_LAYERS)
