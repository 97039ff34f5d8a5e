"""Parameters that PEFT wraps one by one (target_parameters): which of a base they are."""

from __future__ import annotations

import pytest

from tests.adapter_files import factors, write_adapter
from tests.test_adapters import changes, planned, refused, stack


def test_parameters_of_equal_shapes_go_by_the_order_of_their_definition(tmp_path):
    base = stack(tmp_path, {f"experts.{name}": (3, 8, 8) for name in ("gate_up_proj", "down_proj")})
    both = {**factors("experts", 8, 8, rank=12), **factors("experts.base_layer", 8, 8, rank=12)}
    targets = ["experts.down_proj", "experts.gate_up_proj"]
    plan = planned(base, write_adapter(tmp_path / "a", both, target_parameters=targets))
    [first] = changes(plan, "experts.gate_up_proj")
    assert "base_layer" in first.tensors[0].name


def test_parameters_that_nothing_tells_apart_are_refused(tmp_path):
    base = stack(tmp_path, {f"experts.{name}": (3, 8, 8) for name in ("one", "two")})
    both = {**factors("experts", 8, 8, rank=12), **factors("experts.base_layer", 8, 8, rank=12)}
    path = write_adapter(tmp_path / "a", both, target_parameters=["experts.one", "experts.two"])
    assert "do not tell which of target_parameters it belongs to (candidates: one, two)" in refused(
        base, path
    )


def test_a_parameter_that_is_a_matrix(tmp_path):
    base = stack(tmp_path, {"router.gate": (6, 8)})
    path = write_adapter(tmp_path / "a", factors("router", 6, 8), target_parameters=["router.gate"])
    [change] = changes(planned(base, path), "router.gate")
    assert (change.experts, change.rounded) == (0, True)


@pytest.mark.parametrize("home", ["mlp.gate", "block_sparse_moe.gate"])
def test_a_router_is_a_parameter_wherever_a_base_keeps_it(tmp_path, home):
    """Under its path in transformers 5 or in Mixtral's checkpoints; PEFT rounds its product first."""
    base = stack(tmp_path, {f"m.{home}.weight": (6, 6)})
    path = write_adapter(tmp_path / "a", factors("m.mlp.gate", 6, 6), target_parameters=["gate.weight"])
    [change] = changes(planned(base, path), f"m.{home}.weight")
    assert (change.experts, change.rounded, change.transposed) == (0, True, False)
    layer = write_adapter(tmp_path / "layer", factors("m.mlp.gate", 6, 6))
    if home == "mlp.gate":
        [change] = changes(planned(base, layer), "m.mlp.gate.weight")
        assert not change.rounded
    else:
        assert "changes 'm.mlp.gate.weight', which" in refused(base, layer)


def test_a_base_with_more_experts_than_the_adapter_is_refused(tmp_path):
    base = stack(tmp_path, {f"mlp.experts.{e}.down_proj.weight": (6, 8) for e in range(4)})
    tensors = factors("mlp.experts", 6, 8, rank=12)
    path = write_adapter(tmp_path / "a", tensors, target_parameters=["experts.down_proj"])
    assert "do not tell which" in refused(base, path)
