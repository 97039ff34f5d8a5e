"""Tensors to measure on: real-looking weights, never zeros, no two at the same offset in a page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

STAGGER = 320
"""Bytes between the page offsets of neighbours: equal offsets make loads wait for unrelated stores."""

LOGITS = "logits"
"""Kind of inputs whose base is N(0, 3^2); the tuned tensors are further ones: alike, spread, masked."""

LORA = "lora"
"""Kind of inputs that are a weight alone; what is merged into it, the row's options say."""

_SIGMA_BASE, _SIGMA_DELTA = 0.02, 0.002
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Spec:
    """One set of inputs: base and ``n`` tuned tensors of one shape, dtype and kind of delta."""

    shape: tuple[int, int] = (4096, 4096)
    dtype: torch.dtype = torch.bfloat16
    n: int = 3
    data: str = "gaussian"

    @property
    def label(self) -> str:
        """``4096x4096 bf16 n=3``, with the kind of delta where it is not Gaussian."""
        text = f"{self.shape[0]}x{self.shape[1]} {_SHORT[self.dtype]}"
        if self.data in (LOGITS, LORA):
            return text
        return f"{text} n={self.n}" if self.data == "gaussian" else f"{text} n={self.n} {self.data}"

    @property
    def tensor_bytes(self) -> int:
        """Size of one tensor in bytes."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """One set of tensors and an output buffer that every call of a case reuses."""

    base: torch.Tensor
    tuned: list[torch.Tensor]
    out: torch.Tensor

    @property
    def all(self) -> list[torch.Tensor]:
        """Base first, then the tuned tensors."""
        return [self.base, *self.tuned]


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, slot: int, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """An uninitialised tensor whose address is ``slot * STAGGER`` bytes into a page."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = torch.empty(nbytes + 8192, dtype=torch.uint8, device=device)
    start = -raw.data_ptr() % 4096 + slot * STAGGER % 4096
    return raw[start : start + nbytes].view(dtype).view(shape)


def make(spec: Spec, seed: int = 0, device: str | torch.device = "cpu") -> Inputs:
    """Base ~ N(0, 0.02^2); deltas of the spec's kind with an rms of about 0.002 (heavy ties: 0.0002)."""
    random = torch.Generator(device).manual_seed(seed)
    if spec.data == LOGITS:
        return _logits(spec, random, device)
    base = _normal(spec.shape, random).mul_(_SIGMA_BASE)
    base_out = empty(spec.shape, spec.dtype, 0, device).copy_(base)
    # The delta is added to the base as it was rounded, as a fine-tune starts from the stored weights.
    base.copy_(base_out)
    tuned = []
    for i in range(spec.n):
        delta = _DELTAS[spec.data](spec.shape, random)
        tuned.append(empty(spec.shape, spec.dtype, i + 1, device).copy_(delta.add_(base)))
    out = empty(spec.shape, spec.dtype, spec.n + 1, device).fill_(1.0)
    return Inputs(base_out, tuned, out)


def _logits(spec: Spec, random: torch.Generator, device: str | torch.device) -> Inputs:
    """3 randn, then up to three more: 3 randn, 30 randn, and 3 randn of which a fifth is -inf."""
    tensors = []
    for slot, size in enumerate((3, 3, 30, 3)[: spec.n + 1]):
        values = _normal(spec.shape, random).mul_(size)
        if slot == 3:
            values.masked_fill_(torch.rand(spec.shape, generator=random, device=device) < 0.2, -math.inf)
        tensors.append(empty(spec.shape, spec.dtype, slot, device).copy_(values))
    out = empty(spec.shape, spec.dtype, spec.n + 1, device).fill_(1.0)
    return Inputs(tensors[0], tensors[1:], out)


def sets(spec: Spec) -> list[Inputs]:
    """As many sets as it takes to push the first out of the last-level cache by the end of a round."""
    count = math.ceil(3 * last_level_cache() / (spec.tensor_bytes * (spec.n + 1)))
    return [make(spec, seed) for seed in range(count)]


def last_level_cache() -> int:
    """Bytes of the largest cache of this machine, 32 MiB where it does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text.rstrip("KMG")) * units.get(text[-1:], 1))
    return max(found)


def _normal(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random, device=random.device)


def _exponential(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    """Its negative: the logarithm of uniform numbers."""
    return torch.rand(shape, generator=random, device=random.device).log_()


def _gaussian(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    return _normal(shape, random).mul_(_SIGMA_DELTA)


def _heavy_ties(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    return _normal(shape, random).mul_(_SIGMA_DELTA / 10)


def _student(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    """Student-t with 4 degrees of freedom: a chi-square of 4 is twice the sum of two exponentials."""
    chi = _exponential(shape, random).add_(_exponential(shape, random)).mul_(-0.5).clamp_(min=1e-6)
    return _normal(shape, random).div_(chi.sqrt_()).mul_(_SIGMA_DELTA / math.sqrt(2))


def _block_scaled(shape: tuple[int, int], random: torch.Generator) -> torch.Tensor:
    """Every block of 128 columns has its own scale, log-normal with sigma 1."""
    scale = _normal((1, math.ceil(shape[1] / 128)), random).exp_()
    return _gaussian(shape, random).mul_(scale.repeat_interleave(128, 1)[:, : shape[1]])


_DELTAS: dict[str, Callable[[tuple[int, int], torch.Generator], torch.Tensor]] = {
    "gaussian": _gaussian,
    "heavy ties": _heavy_ties,
    "student-t 4": _student,
    "block-scaled 128": _block_scaled,
}
