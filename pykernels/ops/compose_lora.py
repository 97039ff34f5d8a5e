"""Several low-rank adapters made into one: exactly, or nearest at a given rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from pykernels import check, check_lora
from pykernels.ops.dare_merge import dare_merge
from pykernels.ops.linear_merge import linear_merge
from pykernels.ops.lora import LoRA
from pykernels.ops.low_rank_svd import truncate, truncate_product
from pykernels.ops.ties_merge import ties_merge
from pykernels.ops.trim import trim
from pykernels.uncast import uncast

OP = "compose_lora"
DENSE = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
METHODS = ("cat", "svd", *DENSE, "peft_linear")
_MODERATE = 1e20
"""Weights times scalings up to which factors whose Gram matrices serve (``low_rank_svd``) have a product in
float32."""


@uncast
def compose_lora(
    adapters: Sequence[LoRA],
    weights: float | Sequence[float],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> LoRA:
    """One adapter for the weighted sum of several, or for what a merge method makes of their deltas.

    Methods act on the deltas ``scaling * B @ A``, never on A and B apart, which would give cross terms; only
    "peft_linear" does, as PEFT's "linear". The deltas of dense methods are materialised in float32.

    Args:
        adapters: one or more of the same in and out, one dtype and device, without a magnitude.
        weights: a number or one per adapter.
        method: "cat": the sum, at the rank of all together; exact but for one rounding of A. "svd": the
            nearest to the sum of rank ``rank``. "ties" (Yadav et al., 2023), "magnitude_prune", "dare_ties",
            "dare_linear" (Yu et al., 2023): trimmed or dropped deltas, elected by their unweighted sum and
            averaged by count, or added up, as PEFT's "..._svd" of the same names; then the nearest of rank
            ``rank`` (large deltas within a hundredth of the best error). "peft_linear": the sum of the A's
            and that of the B's, each adapter with the root of its weight; one rank for all.
        rank: 1 to min(out, in), default the largest of the adapters; None with "cat" and "peft_linear".
        density: the kept fraction, in [0, 1], with the four dense methods; else None.
        seed: of the masks of "dare_ties" and "dare_linear"; else None. Give every layer its own.

    Returns:
        An adapter of scaling 1 in the adapters' dtype, without a graph; the same for the same arguments.

    Raises:
        ValueError, TypeError: an argument breaks a rule above, or a factor is NaN or infinite (not with "cat"
            and "peft_linear", which hand it on); the text names it and its value.
    """
    scaling = check_lora.alike(OP, adapters)
    given = check.per_model(OP, "weights", weights, len(adapters))
    check.choice(OP, "method", method, METHODS)
    to = _rank(method, rank, adapters)
    kept = _density(method, density)
    drawn = _seed(method, seed)
    share = [w * s for w, s in zip(given, scaling, strict=True)]
    with torch.no_grad():
        if method == "peft_linear":
            return _linear(adapters, share)
        if method == "cat":
            A = torch.cat([a.A.double() * c for a, c in zip(adapters, share, strict=True)])
            B = torch.cat([a.B for a in adapters], 1)
            return LoRA(A.to(B.dtype), B, 1.0)
        if method not in DENSE:
            return _nearest(adapters, lambda: _truncated(method, adapters, share, to))
        delta = merged_delta(method, _deltas(method, adapters, scaling), given, kept, drawn)
        check_lora.finite(OP, "the merged delta", delta, f"with method {method!r}")
        return _nearest(adapters, lambda: truncate(delta, to))


def _rank(method: str, rank: int | None, adapters: Sequence[LoRA]) -> int:
    most = min(len(adapters[0].B), adapters[0].A.shape[1])
    if method == "peft_linear":
        first = len(adapters[0].A)
        for i, adapter in enumerate(adapters):
            if len(adapter.A) != first:
                raise ValueError(
                    f"{OP}: adapters[{i}] must have adapters[0]'s rank {first} with method 'peft_linear', "
                    f"got {len(adapter.A)}"
                )
    if method in ("cat", "peft_linear"):
        if rank is not None:
            raise ValueError(f"{OP}: rank must be None with method {method!r}, got {rank!r}")
        return 0
    if rank is None:
        return min(most, max(len(a.A) for a in adapters))
    if type(rank) is not int:
        raise TypeError(f"{OP}: rank must be an integer, got {type(rank).__name__}")
    if not 1 <= rank <= most:
        raise ValueError(f"{OP}: rank must lie in [1, {most}], got {rank}")
    return rank


def _density(method: str, density: float | None) -> float:
    if method in DENSE:
        if density is None:
            raise ValueError(f"{OP}: density must be given with method {method!r}, got None")
        return check.density(OP, density, 1)[0]
    if density is not None:
        raise ValueError(f"{OP}: density must be None with method {method!r}, got {density!r}")
    return 1.0


def _seed(method: str, seed: int | None) -> int:
    if method.startswith("dare"):
        if seed is None:
            raise ValueError(f"{OP}: seed must be given with method {method!r}, got None")
        return check.seed(OP, seed)
    if seed is not None:
        raise ValueError(f"{OP}: seed must be None with method {method!r}, got {seed!r}")
    return 0


def merged_delta(
    method: str, deltas: list[torch.Tensor], weights: list[float], density: float, seed: int
) -> torch.Tensor:
    """The merge method of DENSE on deltas [out, in] in float32."""
    if method == "ties":
        return ties_merge(None, deltas, density=density, weight=weights, elect="plain", normalize="count")
    if method == "magnitude_prune":
        return linear_merge([trim(d, density) for d in deltas], weights, normalize=False)
    if method == "dare_linear":
        return dare_merge(None, deltas, density=density, seed=seed, weight=weights)
    return dare_merge(
        None,
        deltas,
        density=density,
        seed=seed,
        weight=weights,
        consensus="ties",
        elect="plain",
        normalize="count",
    )


def _linear(adapters: Sequence[LoRA], share: list[float]) -> LoRA:
    """As PEFT 0.21.2: float32 weights on stacked factors, the sign of a weight on A alone."""
    root = [math.sqrt(abs(c)) for c in share]
    signed = [math.copysign(r, c) for r, c in zip(root, share, strict=True)]
    factors = []
    for weights, tensors in ((signed, [a.A for a in adapters]), (root, [a.B for a in adapters])):
        column = torch.tensor(weights, dtype=torch.float32, device=tensors[0].device).view(-1, 1, 1)
        factors.append((torch.stack(tensors) * column).sum(0).to(tensors[0].dtype))
    return LoRA(factors[0], factors[1], 1.0)


def _truncated(
    method: str, adapters: Sequence[LoRA], share: list[float], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' and B' of this rank, of the sum in float32 or wider."""
    B, A = _wide(torch.cat([a.B for a in adapters], 1)), _wide(torch.cat([a.A for a in adapters]))
    rows = torch.tensor([len(a.A) for a in adapters], device=A.device)
    scale = torch.tensor(share, dtype=torch.float64, device=A.device).repeat_interleave(rows)

    def finite() -> None:
        _finite(method, adapters, share, torch.finfo(B.dtype).max / 2)

    if not max(map(abs, share)) <= _MODERATE:
        finite()
    return truncate_product(B, A, scale, rank, finite)


def _finite(method: str, adapters: Sequence[LoRA], share: list[float], most: float) -> None:
    """Refuses elements that are no numbers, and products with weight and scaling beyond the dtype."""
    for i, (a, c) in enumerate(zip(adapters, share, strict=True)):
        if not _largest(a.A) * max(1.0, abs(c)) + _largest(a.B) <= most:  # NaN too
            for name, factor in (("A", a.A), ("B", a.B)):
                check_lora.finite(OP, f"adapters[{i}].{name}", factor, f"with method {method!r}")
            product = (a.A.double() * c).to(torch.promote_types(a.A.dtype, torch.float32))
            name = f"adapters[{i}].A times weight and scaling"
            check_lora.finite(OP, name, product, f"with method {method!r}")


def _largest(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, torch.inf)) if tensor.numel() else 0.0


def _deltas(method: str, adapters: Sequence[LoRA], scaling: list[float]) -> list[torch.Tensor]:
    """scaling * B @ A of every adapter, in float32 or wider."""
    deltas = [_wide(a.B) @ (_wide(a.A) * s) for a, s in zip(adapters, scaling, strict=True)]
    for i, delta in enumerate(deltas):
        check_lora.finite(OP, f"the delta of adapters[{i}]", delta, f"with method {method!r}")
    return deltas


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _nearest(adapters: Sequence[LoRA], truncated: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> LoRA:
    """Finite factors may have a product that float32 does not hold: then there is nothing to decompose."""
    try:
        A, B = truncated()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        A = B = torch.tensor(torch.nan, device="cpu")
    if not all(bool(end.isfinite()) for factor in (A, B) if factor.numel() for end in factor.aminmax()):
        raise ValueError(f"{OP}: the sum must have singular values that float32 holds, got larger ones")
    dtype = adapters[0].A.dtype
    return LoRA(A.to(dtype).contiguous(), B.to(dtype).contiguous(), 1.0)
