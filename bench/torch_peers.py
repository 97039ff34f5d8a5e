"""The merges in plain torch, twice: as usually written, and with buffers reused and updated in place."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pykernels.bench.cases import Case, weights
from pykernels.bench.inputs import Inputs

Call = Callable[[], torch.Tensor]


def naive(case: Case, x: Inputs) -> Call:
    """Float32 task vectors stacked, one torch expression after another."""
    return {
        "linear_merge": _naive_linear,
        "task_arithmetic": _naive_arithmetic,
        "ties_merge": _naive_ties,
        "dare_merge": _naive_dare,
    }[case.op](case, x)


def tuned(case: Case, x: Inputs) -> Call:
    """The fewest float32 buffers, allocated once, and in-place arithmetic."""
    return {
        "linear_merge": _tuned_linear,
        "task_arithmetic": _tuned_arithmetic,
        "ties_merge": _tuned_ties,
        "dare_merge": _tuned_dare,
    }[case.op](case, x)


def _column(x: Inputs) -> torch.Tensor:
    return torch.tensor(weights(x), device=x.base.device).view(-1, 1, 1)


def _stacked(x: Inputs) -> torch.Tensor:
    return torch.stack([t.float() - x.base.float() for t in x.tuned])


def _naive_linear(case: Case, x: Inputs) -> Call:
    w = torch.tensor([1.0, *weights(x)], device=x.base.device).view(-1, 1, 1)
    return lambda: ((torch.stack([t.float() for t in x.all]) * w).sum(0) / w.sum()).to(x.base.dtype)


def _naive_arithmetic(case: Case, x: Inputs) -> Call:
    return lambda: (x.base.float() + (_stacked(x) * _column(x)).sum(0)).to(x.base.dtype)


def _agree(votes: torch.Tensor) -> torch.Tensor:
    up = votes.sum(0) >= 0
    return (votes != 0) & ((votes > 0) == up)


def _naive_ties(case: Case, x: Inputs) -> Call:
    density = case.options["density"]

    def run() -> torch.Tensor:
        deltas = _stacked(x)
        for delta in deltas:
            magnitude = delta.abs().flatten()
            top = torch.topk(magnitude, max(1, int(density * magnitude.numel())), sorted=False).indices
            delta.view(-1).mul_(torch.zeros_like(magnitude).index_fill_(0, top, 1.0))
        votes = deltas * _column(x)
        agree = _agree(votes)
        share = (agree * _column(x)).sum(0)
        return (x.base.float() + (votes * agree).sum(0) / share.where(share != 0, 1.0)).to(x.base.dtype)

    return run


def _naive_dare(case: Case, x: Inputs) -> Call:
    density = case.options["density"]

    def run() -> torch.Tensor:
        deltas = _stacked(x)
        votes = deltas * torch.bernoulli(torch.full_like(deltas, density)) / density * _column(x)
        if case.options.get("consensus"):
            votes *= _agree(votes)
        return (x.base.float() + votes.sum(0)).to(x.base.dtype)

    return run


def _tuned_linear(case: Case, x: Inputs) -> Call:
    w = [1.0, *weights(x)]
    total = torch.empty_like(x.base, dtype=torch.float32)

    def run() -> torch.Tensor:
        total.copy_(x.base).mul_(w[0] / sum(w))
        for t, one in zip(x.tuned, w[1:], strict=True):
            total.add_(t, alpha=one / sum(w))
        return x.out.copy_(total)

    return run


def _tuned_arithmetic(case: Case, x: Inputs) -> Call:
    w = weights(x)
    total = torch.empty_like(x.base, dtype=torch.float32)

    def run() -> torch.Tensor:
        total.copy_(x.base).mul_(1 - sum(w))
        for t, one in zip(x.tuned, w, strict=True):
            total.add_(t, alpha=one)
        return x.out.copy_(total)

    return run


def _elected(x: Inputs, votes: list[torch.Tensor], *, mean: bool) -> torch.Tensor:
    up = votes[0].clone()
    for vote in votes[1:]:
        up.add_(vote)
    sign = up.ge_(0).mul_(2).sub_(1)
    total, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for vote, one in zip(votes, weights(x), strict=True):
        agree = (vote * sign).gt_(0)
        total.addcmul_(vote, agree)
        share.add_(agree, alpha=one)
    if mean:
        total.div_(share.masked_fill_(share == 0, 1.0))
    return x.out.copy_(total.add_(x.base))


def _tuned_ties(case: Case, x: Inputs) -> Call:
    numel = x.base.numel()
    k = max(1, int(case.options["density"] * numel))
    votes = [torch.empty_like(x.base, dtype=torch.float32) for _ in x.tuned]
    magnitude = torch.empty_like(x.base, dtype=torch.float32)

    def run() -> torch.Tensor:
        for vote, t, w in zip(votes, x.tuned, weights(x), strict=True):
            vote.copy_(t).sub_(x.base)
            torch.abs(vote, out=magnitude)
            kth = magnitude.view(-1).kthvalue(numel - k + 1).values
            vote.mul_(magnitude.ge_(kth)).mul_(w)
        return _elected(x, votes, mean=True)

    return run


def _tuned_dare(case: Case, x: Inputs) -> Call:
    density = case.options["density"]
    votes = [torch.empty_like(x.base, dtype=torch.float32) for _ in x.tuned]
    mask = torch.empty_like(x.base, dtype=torch.float32)

    def run() -> torch.Tensor:
        for vote, t, w in zip(votes, x.tuned, weights(x), strict=True):
            vote.copy_(t).sub_(x.base)
            vote.mul_(mask.bernoulli_(density)).mul_(w / density)
        if case.options.get("consensus"):
            return _elected(x, votes, mean=False)
        for vote in votes[1:]:
            votes[0].add_(vote)
        return x.out.copy_(votes[0].add_(x.base))

    return run
