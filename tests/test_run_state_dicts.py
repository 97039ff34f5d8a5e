"""Merges of models in memory: the bits of the engine, and the words of every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pykernels import merge_state_dicts
from pykernels.engine.run import merge
from tests.checkpoints import METHODS, WEIGHTS, load, recipe, same, write_models


@pytest.mark.parametrize("method", METHODS)
def test_state_dicts_give_the_bits_of_the_engine(tmp_path: Path, method: str) -> None:
    write_models(tmp_path)
    merge(recipe(tmp_path, method), tmp_path / "out")
    row = dict(METHODS[method])
    parameters = {"weight": WEIGHTS, **row.pop("parameters", {}), **row}
    base = None if method == "linear" else load(tmp_path / "base")
    tuned = [load(tmp_path / f"t{i}") for i in range(3)]
    assert same(merge_state_dicts(base, tuned, method=method, **parameters), load(tmp_path / "out"))


def test_ties_are_kept_and_mixed_dtypes_widened() -> None:
    head = torch.randn(8, 4)
    base = {"embed": head, "head": head}
    tuned = torch.randn(8, 4).half()
    merged = merge_state_dicts(base, [{"embed": tuned, "head": tuned}], "ties", weight=1.0, lambda_=0.5)
    assert merged["embed"] is merged["head"] and merged["head"].dtype == torch.float32
    torch.testing.assert_close(merged["head"], head + 0.5 * (tuned.float() - head))


def test_empty_tensors_and_copies() -> None:
    state = {"e": torch.empty(0, 3), "f": torch.empty(0, 2), "n": torch.arange(2)}
    merged = merge_state_dicts(state, [state], "task_arithmetic", weight=1.0)
    assert same(merged, state) and merged["n"].data_ptr() != state["n"].data_ptr()


W, N = torch.zeros(2, 3), torch.arange(2)
STATE = {"w": W, "n": N}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "tis"}, "unknown method 'tis'; did you mean ties"),
    "no base": ({"base": None}, "ties needs a base"),
    "base": ({"method": "linear"}, "linear has no base"),
    "no model": ({"tuned": []}, "tuned must hold 1 to 64 models, got 0"),
    "parameter": ({"weigth": 1.0}, "ties has no parameter weigth; did you mean weight"),
    "required": ({"weight": None}, "ties needs weight: a number, or one per model"),
    "count": ({"weight": [1.0, 2.0]}, "weight must be a number or 1 of them, one per model, got a list of 2"),
    "range": ({"density": 2.0}, r"density must lie in \[0, 1\], got 2.0"),
    "seed below": ({"seed": -1}, r"seed must lie in \[0, 2\*\*64\), got -1"),
    "seed kind": ({"seed": 1.5}, "seed must be an integer, got float"),
    "many": ({"tuned": [STATE] * 65}, "tuned must hold 1 to 64 models, got 65"),
    "mapping": ({"tuned": STATE}, "tuned must be a sequence of state dicts, got dict"),
    "tensor": ({"tuned": [W]}, r"tuned\[0\] must be a mapping of names to tensors, got Tensor"),
    "base kind": ({"base": [W]}, "base must be a mapping of names to tensors, got list"),
    "text": ({"weight": "12"}, "weight must be a number or one per model, got '12'"),
    "lambda": ({"lambda_": float("nan")}, "lambda_ must be finite in float32, got nan"),
    "rescale": ({"rescale": True}, "rescale must be false, as only the dare methods rescale here"),
    "word": ({"tie": "random"}, "tie must be index or keep"),
    "missing": ({"tuned": [{"w": W}]}, r"tuned\[0\] lacks 1 tensors of base: 'n'"),
    "extra": ({"base": {"w": W}}, r"tuned\[0\] has 1 tensors that base lacks: 'n'"),
    "shape": (
        {"tuned": [{"w": W.T, "n": N}]},
        r"tensor 'w': tuned\[0\] must have shape \[2, 3\], got \[3, 2\]",
    ),
    "strides": ({"tuned": [{"w": torch.zeros(3, 2).T, "n": N}]}, r"must be contiguous, got strides \[1, 2\]"),
    "integer": ({"tuned": [{"w": W, "n": N + 1}]}, r"tensor 'n' .* differs between base and tuned\[0\]"),
    "kind": ({"tuned": [{"w": W.long(), "n": N}]}, "cannot be averaged"),
    "device": ({"tuned": [{"w": W.to("meta"), "n": N}]}, "must be on cpu, got meta"),
    "type": ({"tuned": [{"w": [0.0], "n": N}]}, "must be a tensor, got list"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refusals(fault: str) -> None:
    changed, words = FAULTS[fault]
    call = {"base": STATE, "tuned": [STATE], "method": "ties", "weight": 1.0, **changed}
    if call["weight"] is None:
        del call["weight"]
    with pytest.raises((ValueError, TypeError), match=words):
        merge_state_dicts(**call)


@pytest.mark.parametrize(
    "weight", [np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5, 0.5]), np.array([0.5, 0.5]), [0.5, 0.5]]
)
def test_numbers_are_accepted_as_the_ops_accept_them(weight: Any) -> None:
    tuned = [{"w": W + 1}, {"w": W + 2}]
    want = merge_state_dicts({"w": W}, tuned, "task_arithmetic", weight=0.5)
    assert same(merge_state_dicts({"w": W}, tuned, "task_arithmetic", weight=weight), want)


def test_no_rescale_may_be_said_as_in_the_ops() -> None:
    call = {"base": {"w": W}, "tuned": [{"w": W + 1}], "method": "dare_linear", "weight": 1.0, "density": 0.5}
    assert same(merge_state_dicts(**call, rescale=None), merge_state_dicts(**call, rescale=False))
