"""The references as a backend: the truth in blocks of at most 2**20 elements, rounded once into ``out``.

Signatures are those of the kernels. Memory beyond inputs and output is that of one block, whatever the size;
the block shrinks with the number of models, so that all their deltas together count 2**20 elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from pykernels.cut import Cut
from pykernels.ref import dare_merge as _dare_merge
from pykernels.ref import dot_products as _dot_products
from pykernels.ref import drop_rescale as _drop_rescale
from pykernels.ref import elect_sign as _elect_sign
from pykernels.ref import l1_norms as _l1_norms
from pykernels.ref import linear_merge as _linear_merge
from pykernels.ref import magnitude_histogram as _histogram
from pykernels.ref import ties_merge as _ties_merge
from pykernels.ref import trim as _trim
from pykernels.ref.block_sums import BLOCK
from pykernels.ref.delta import delta as _delta
from pykernels.ref.delta import key as _key
from pykernels.ref.kth_magnitude import kth_magnitude as _kth_magnitude
from pykernels.ref.kth_magnitude import none_kept
from pykernels.ref.rounding import round_once
from pykernels.ref.softmax_blocks import log_softmax as log_softmax
from pykernels.ref.softmax_blocks import log_softmax_backward as log_softmax_backward
from pykernels.ref.softmax_blocks import logsumexp as logsumexp
from pykernels.ref.softmax_blocks import softmax as softmax
from pykernels.ref.softmax_blocks import softmax_backward as softmax_backward

LARGEST = 2**20
SORTED = 2**16  # up to here sorting all keys beats counting them into as many bins
DIGIT = 16

Tensors = Sequence[torch.Tensor]
Block = tuple[int, torch.Tensor | None, list[torch.Tensor]]


def linear_merge(out: torch.Tensor, base: torch.Tensor | None, tuned: Tensors, weight: list[float]) -> None:
    """out = base + sum(weight * (tuned - base)), or sum(weight * tuned) without a base."""
    _fill(out, base, tuned, lambda start, b, t: _linear_merge.linear_merge(b, t, weight))


task_arithmetic = linear_merge


def ties_merge(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    cut: Cut,
    weight: list[float],
    vote: list[float] | None,
    share: list[float] | None,
    lambda_: float,
    elect: str | None,
    offset: int = 0,
) -> None:
    """Trim by known cuts, elect, average."""
    _fill(
        out, base, tuned,
        lambda start, b, t: _ties_merge.ties_merge(
            b, t, cut, weight, vote, share, lambda_, elect, offset + start
        ),
    )  # fmt: skip


def dare_merge(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    threshold: list[int],
    model: list[int],
    key: int,
    weight: list[float],
    vote: list[float] | None,
    share: list[float] | None,
    lambda_: float,
    elect: str | None,
    offset: int = 0,
) -> None:
    """Drop by stateless draws, then add up or elect and average."""
    _fill(
        out, base, tuned,
        lambda start, b, t: _dare_merge.dare_merge(
            b, t, threshold, model, key, weight, vote, share, lambda_, elect, offset + start
        ),
    )  # fmt: skip


def elect_sign(out: torch.Tensor, deltas: Tensors, weight: list[float], elect: str) -> None:
    """+1 or -1 per element, int8."""
    _fill(out, None, deltas, lambda start, _, d: _elect_sign.elect_sign(d, weight, elect))


def trim(out: torch.Tensor, delta: torch.Tensor, cut: Cut, offset: int = 0) -> None:
    """delta where kept, 0 elsewhere."""
    _fill(out, None, [delta], lambda start, _, d: _trim.trim(d[0], cut, offset + start))


def drop_rescale(
    out: torch.Tensor, delta: torch.Tensor, threshold: int, key: int, scale: float, offset: int = 0
) -> None:
    """scale * delta where kept, 0 elsewhere."""
    _fill(
        out, None, [delta],
        lambda start, _, d: _drop_rescale.drop_rescale(d[0], threshold, key, scale, offset + start),
    )  # fmt: skip


def l1_norms(
    base: torch.Tensor | None,
    tuned: Tensors,
    threshold: list[int],
    model: list[int],
    key: int,
    offset: int = 0,
) -> torch.Tensor:
    """Sums [blocks, n, 2] in float64 of |delta| and the kept |delta| per block of 4096 elements."""
    sums = [tuned[0].new_empty(0, len(tuned), 2, dtype=torch.float64)]
    for start, b, t in _blocks(base, tuned):
        sums.append(_l1_norms.l1_norms(b, t, threshold, model, key, offset + start))
    return torch.cat(sums)


def dot_products(grad: torch.Tensor, base: torch.Tensor | None, tuned: Tensors) -> torch.Tensor:
    """Sums [blocks, n] in float64 of grad * delta per block of 4096 elements."""
    flat = grad.view(-1)
    sums = [tuned[0].new_empty(0, len(tuned), dtype=torch.float64)]
    for start, b, t in _blocks(base, tuned):
        sums.append(_dot_products.dot_products(flat[start : start + t[0].numel()], b, t))
    return torch.cat(sums)


def magnitude_histogram(
    base: torch.Tensor | None, tuned: Tensors, shift: int, prefix: list[int] | None
) -> torch.Tensor:
    """Counts [n, 65536] of (key >> shift) & 0xFFFF over the keys whose higher bits equal the prefix."""
    bins = tuned[0].new_zeros(len(tuned), _histogram.BINS, dtype=torch.int64)
    for _, b, t in _blocks(base, tuned):
        bins += _histogram.magnitude_histogram(b, t, shift, prefix)
    return bins


def kth_magnitude(base: torch.Tensor | None, tuned: Tensors, k: list[int]) -> Cut:
    """The exact cut of every model, digit by digit: no more than a block's keys are ever held."""
    if tuned[0].numel() <= SORTED:
        return _kth_magnitude(base, tuned, k)
    cuts = [_radix_cut(base, t, count) for t, count in zip(tuned, k, strict=True)]
    return Cut([cut[0] for cut in cuts], [cut[1] for cut in cuts])


def _radix_cut(base: torch.Tensor | None, tuned: torch.Tensor, k: int) -> tuple[int, int]:
    if k <= 0:
        return none_kept(tuned.dtype)
    if k >= tuned.numel():
        return 0, tuned.numel() - 1
    kth = 0
    for shift in range(64 if tuned.dtype == torch.float64 else 32, 0, -DIGIT):
        shift -= DIGIT
        bins = magnitude_histogram(base, [tuned], shift, [kth])[0]
        above = bins.flip(0).cumsum(0)  # keys that have this digit or a larger one
        place = int(torch.searchsorted(above, k))
        k -= int(above[place - 1]) if place else 0
        kth = kth << DIGIT | (_histogram.BINS - 1 - place)
    return kth, _nth_equal(base, tuned, kth, k)


def _nth_equal(base: torch.Tensor | None, tuned: torch.Tensor, key: int, n: int) -> int:
    for start, b, [t] in _blocks(base, [tuned]):
        equals = torch.nonzero(_key(_delta(b, t)) == key).reshape(-1)
        if n <= equals.numel():
            return start + int(equals[n - 1])
        n -= equals.numel()
    raise IndexError(f"fewer than {n} keys equal {key:#x}")


def _blocks(base: torch.Tensor | None, tuned: Tensors) -> Iterator[Block]:
    """(start, base or None, tuned) of every block; starts are multiples of 4096."""
    numel = tuned[0].numel()
    step = max(BLOCK, LARGEST // len(tuned) // BLOCK * BLOCK)
    flat = None if base is None else base.view(-1)
    flats = [t.view(-1) for t in tuned]
    for start in range(0, numel, step):
        part = slice(start, min(start + step, numel))
        yield start, None if flat is None else flat[part], [f[part] for f in flats]


def _fill(
    out: torch.Tensor,
    base: torch.Tensor | None,
    tuned: Tensors,
    truth: Callable[[int, torch.Tensor | None, list[torch.Tensor]], torch.Tensor],
) -> None:
    """The truth of every block into ``out``, which may be an input: a block is read before it is written."""
    flat = out.view(-1)
    for start, b, t in _blocks(base, tuned):
        flat[start : start + t[0].numel()] = round_once(truth(start, b, t), out.dtype)
