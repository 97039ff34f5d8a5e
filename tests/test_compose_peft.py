"""Compositions of adapters of every kind: PEFT loads them, and they change a model as their parts do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pykernels.adapters.compose import compose
from pykernels.engine.recipe import adapter_recipe
from pykernels.engine.run import merge
from tests.checkpoints import load
from tests.peft_models import KINDS, Kind, merged_by_peft, with_adapters, write_adapter, write_base

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:.*(missing|unexpected).*keys"),
]
WEIGHTS = (0.5, -2.0)
SUMS = {"cat": None, "svd": 8}
"""Methods that are exact at this rank (each adapter here has one of at most 4)."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases in float32, made when first asked for."""
    return tmp_path_factory.mktemp("compositions")


def base_of(home: Path, kind: Kind) -> Path:
    """The base of a kind."""
    if not (home / kind.model).exists():
        write_base(kind.model, home / kind.model, torch.float32)
    return home / kind.model


def trained(home: Path, kind: Kind, path: Path, seed: int) -> Path:
    """An adapter of a kind, saved by PEFT."""
    write_adapter(kind, base_of(home, kind), path, seed, torch.float32)
    return path


def with_copies_of(path: Path, other: Path, *marks: str) -> Path:
    """``path`` with the tensors of ``other`` whose names hold a mark."""
    file = path / "adapter_model.safetensors"
    state, its = load_file(file), load_file(other / "adapter_model.safetensors")
    save_file(state | {k: v for k, v in its.items() if any(m in k for m in marks)}, file, {"format": "pt"})
    return path


def check(home: Path, kind: Kind, parts: list[Path], weights: tuple[float, ...], work: Path) -> None:
    """The parts' merge, the composition's, and PEFT's of the composition: all the same."""
    base = base_of(home, kind)
    merge(adapter_recipe(str(base), [str(p) for p in parts], weights), work / "parts")
    wanted = load(work / "parts")
    for method, rank in SUMS.items():
        if method == "svd" and kind.config.get("use_dora"):
            continue
        made = compose([str(p) for p in parts], work / method, weights=weights, method=method, rank=rank)
        assert max(made.errors.values()) < 1e-5
        merge(adapter_recipe(str(base), [str(work / method)]), work / f"merged {method}")
        found = [load(work / f"merged {method}")]
        if method == "cat":  # the others write the same keys and settings
            found.append(merged_by_peft(kind, base, [work / method], work / "peft", torch.float32))
        for got in found:
            assert got.keys() == wanted.keys()
            for name, tensor in wanted.items():
                off = (got[name].double() - tensor.double()).norm()
                assert off <= 1e-5 * (1 + tensor.double().norm()), (method, name)


PAIRS = (
    "linear", "rank and alpha patterns, rsLoRA", "embedding", "lora_bias", "Conv1D", "convolutions",
    "experts of Qwen", "experts of Qwen, one parameter", "experts in one tensor",
)  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_two_of_a_kind(home, tmp_path, name):
    parts = [trained(home, KINDS[name], tmp_path / f"{i}", i) for i in (1, 2)]
    check(home, KINDS[name], parts, WEIGHTS, tmp_path)


@pytest.mark.parametrize("name", ["embedding, DoRA", "convolutions, DoRA"])
def test_one_with_magnitudes_at_any_weight(home, tmp_path, name):
    check(home, KINDS[name], [trained(home, KINDS[name], tmp_path / "1", 1)], (0.6,), tmp_path)


def test_magnitudes_of_different_modules(home, tmp_path):
    kinds = [Kind("llama", {"target_modules": [m], "use_dora": True}) for m in ("q_proj", "down_proj")]
    parts = [trained(home, kind, tmp_path / f"{i}", i) for i, kind in enumerate(kinds)]
    check(home, kinds[0], parts, (1.0, 0.5), tmp_path)


@pytest.mark.parametrize(
    ("name", "marks", "weights"),
    [
        ("modules to save", ("lm_head", "norm"), (1.0, 1.0)),
        ("modules to save", ("lm_head", "norm"), (0.25, 0.75)),
        ("bias all", (".bias",), (1.0, 1.0)),
        ("bias lora_only", (".bias",), (1.0, 1.0)),
        ("trainable tokens", ("trainable_tokens",), (1.0, 1.0)),
    ],
)
def test_what_replaces_the_base_is_kept_where_all_agree(home, tmp_path, name, marks, weights):
    one, two = (trained(home, KINDS[name], tmp_path / f"{i}", i) for i in (1, 2))
    with pytest.raises(ValueError, match=r"differs from the copy|is overwritten twice, with other values"):
        compose([str(one), str(two)], tmp_path / "never", weights=weights)
    parts = [one, with_copies_of(two, one, *marks)]
    if weights == (1.0, 1.0) and name != "trainable tokens":  # a merge takes no row twice, equal or not
        check(home, KINDS[name], parts, weights, tmp_path)
        return
    compose([str(p) for p in parts], tmp_path / "out", weights=weights)
    kept, held = load(tmp_path / "out"), load(one)
    of_both = [key for key in held if any(m in key for m in marks)]
    assert of_both and all(torch.equal(kept[key], held[key]) for key in of_both)


def test_copies_of_one_adapter_only(home, tmp_path):
    parts = [
        trained(home, KINDS["modules to save"], tmp_path / "1", 1),
        trained(home, KINDS["linear"], tmp_path / "2", 2),
    ]
    check(home, KINDS["linear"], parts, (1.0, 0.3), tmp_path)


def test_a_bias_of_a_module_that_only_the_other_changes(home, tmp_path):
    """k_proj.bias in one file is k_proj.base_layer.bias in the composed one."""
    kinds = [KINDS["bias all"], Kind("llama", {"target_modules": ["k_proj"]})]
    parts = [trained(home, kind, tmp_path / f"{i}", i) for i, kind in enumerate(kinds)]
    check(home, kinds[0], parts, (1.0, 0.3), tmp_path)
    assert any("k_proj.base_layer.bias" in key for key in load(tmp_path / "cat"))


def test_rows_of_two_adapters(home, tmp_path):
    kinds = [
        Kind("llama", {"target_modules": ["q_proj"], "trainable_token_indices": r}) for r in ([1, 7], [4])
    ]
    parts = [trained(home, kind, tmp_path / f"{i}", i) for i, kind in enumerate(kinds)]
    check(home, kinds[0], parts, (1.0, 1.0), tmp_path)


def test_experts_of_different_parameters(home, tmp_path):
    """One parameter alone has no base_layer in its key, both together have."""
    kinds = [
        Kind("qwen", {"target_modules": [], "target_parameters": [f"experts.{p}"]})
        for p in ("gate_up_proj", "down_proj")
    ]
    parts = [trained(home, kind, tmp_path / f"{i}", i) for i, kind in enumerate(kinds)]
    check(home, kinds[0], parts, WEIGHTS, tmp_path)


def test_a_bias_beside_modules_without(home, tmp_path):
    kinds = [KINDS["lora_bias"], Kind("llama", {"target_modules": ["k_proj"]})]
    parts = [trained(home, kind, tmp_path / f"{i}", i) for i, kind in enumerate(kinds)]
    check(home, kinds[0], parts, WEIGHTS, tmp_path)


def test_ranks_that_were_written_are_those_that_are_read(home, tmp_path):
    """What is composed can be composed again."""
    parts = [trained(home, KINDS["experts of Qwen"], tmp_path / f"{i}", i) for i in (1, 2)]
    compose([str(p) for p in parts], tmp_path / "once", method="svd", rank=3)
    compose([str(tmp_path / "once")], tmp_path / "twice", method="cat")
    once, twice = load(tmp_path / "once"), load(tmp_path / "twice")
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)
    configs = [json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("once", "twice")]
    assert configs[0] == configs[1] and configs[0]["target_parameters"]
    shutil.rmtree(tmp_path / "once")


def delta(path: Path, module: str, scaling: float) -> torch.Tensor:
    """The change of a module in float64."""
    held = load(path)
    a, b = (held[f"base_model.model.{module}.lora_{f}.weight"].double() for f in "AB")
    return scaling * b @ a


def weighted_by_peft(home: Path, kind: Kind, parts: list[Path], weights: tuple[float, ...], how: str):
    """PEFT's model with the composition of two adapters that ``add_weighted_adapter`` makes."""
    model = with_adapters(kind, base_of(home, kind), parts, torch.float32)
    names = [str(i) for i in range(len(parts))]
    model.add_weighted_adapter(names, list(weights), "sum", combination_type=how)
    model.set_adapter("sum")
    return model


MODULE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_peft_scales_rank_stabilised_adapters_twice(home, tmp_path, how):
    """The sum inherits use_rslora, and gets the root of its rank on top; float64 tells who is right."""
    kind = Kind("llama", {"target_modules": ["q_proj"], "use_rslora": True})
    parts = [trained(home, kind, tmp_path / f"{i}", i) for i in (1, 2)]
    wanted = sum(w * delta(path, MODULE, 3 / 2**0.5) for path, w in zip(parts, (0.5, 2.0), strict=True))
    model = weighted_by_peft(home, kind, parts, (0.5, 2.0), how)
    theirs = model.get_submodule(f"base_model.model.{MODULE}").get_delta_weight("sum").double().detach()
    compose([str(p) for p in parts], tmp_path / "out", weights=(0.5, 2.0))
    ours = delta(tmp_path / "out", MODULE, 1.0)
    assert (ours - wanted).norm() < 1e-6 * wanted.norm()
    assert (theirs - wanted).norm() > 0.9 * wanted.norm()
    if how == "cat":
        assert (theirs - 2 * wanted).norm() < 1e-6 * wanted.norm()  # the root of a rank of 4


def test_peft_leaves_the_bias_of_b_out(home, tmp_path):
    """Against the outputs of both adapters at once, in float64."""
    kind = KINDS["lora_bias"]
    parts = [trained(home, kind, tmp_path / f"{i}", i) for i in (1, 2)]
    held = [load(path)[f"base_model.model.{MODULE}.lora_B.bias"].double() for path in parts]
    wanted = 3 / 2 * (0.5 * held[0] + 2.0 * held[1])
    layer = weighted_by_peft(home, kind, parts, (0.5, 2.0), "cat").get_submodule(f"base_model.model.{MODULE}")
    theirs = layer.scaling["sum"] * layer.lora_B["sum"].bias.double().detach()
    compose([str(p) for p in parts], tmp_path / "out", weights=(0.5, 2.0))
    ours = load(tmp_path / "out")[f"base_model.model.{MODULE}.lora_B.bias"].double()
    assert (ours - wanted).norm() < 1e-6 * wanted.norm() < 0.5 * (theirs - wanted).norm()
