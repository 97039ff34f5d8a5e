"""What is CUDA's own: launches of many tensors, words of a launch that failed."""

from __future__ import annotations

import pytest
import torch

import pykernels as pk
from pykernels import cuda, grouping, native
from tests.bounds import assert_same_bits
from tests.cases import make, weights
from tests.where import DEVICE, nans, there


@pytest.mark.memory
def test_a_group_of_selections_gives_what_single_launches_give():
    sizes = (1, 63, 4096, 4097, 40_001, 17_000, 300)
    groups = [(make("gaussian", n, 3, torch.bfloat16), [max(1, n // 5), n, 0]) for n in sizes]
    outs = [nans(n, torch.bfloat16) for n in sizes]
    rest = (weights(3), None, weights(3), 1.0, "weighted")
    for tie in ("index", "keep"):
        with grouping.grouped():
            for ((base, tuned), k), out in zip(groups, outs, strict=True):
                cuda.ties_fused(out, there(base), there(tuned), k, tie, *rest)
        for ((base, tuned), k), out in zip(groups, outs, strict=True):
            wanted = torch.empty_like(base)
            native.ties_fused(wanted, base, tuned, k, tie, *rest)
            assert_same_bits(out.cpu(), wanted)


def test_state_dicts_in_a_few_launches(monkeypatch):
    launches = []
    real = cuda._run
    monkeypatch.setattr(
        cuda, "_run", lambda f, op, jobs: (launches.append((op, len(jobs))), real(f, op, jobs))
    )
    g = torch.Generator().manual_seed(1)
    base = {f"layer.{i}": torch.randn(100 + i, generator=g).bfloat16() for i in range(40)}
    tuned = [
        {k: v + 0.1 * torch.randn(v.shape, generator=g).bfloat16() for k, v in base.items()} for _ in "ab"
    ]
    wanted = pk.merge_state_dicts(base, tuned, method="ties", density=0.5, weight=1.0)
    with pk.use_backend("cuda"):
        got = pk.merge_state_dicts(
            {k: there(v) for k, v in base.items()}, [{k: there(v) for k, v in t.items()} for t in tuned],
            method="ties", density=0.5, weight=1.0,
        )  # fmt: skip
    assert launches == [("ties_merge", 40)]
    for name, value in got.items():
        assert_same_bits(value.cpu(), wanted[name])


def test_a_failed_launch_names_op_shapes_and_error(monkeypatch):
    def refuse(*args: object) -> None:
        raise RuntimeError("cudaErrorLaunchFailure: unspecified launch failure")

    monkeypatch.setattr(cuda._cuda, "linear_merge", refuse)
    x = torch.ones(3, 5, device=DEVICE)
    with pytest.raises(
        RuntimeError, match=r"linear_merge: launch on .* shape \[3, 5\] failed: cudaErrorLaunch"
    ):
        cuda.linear_merge(x.clone(), None, [x], [1.0])
