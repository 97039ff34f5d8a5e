"""Files of adapters: what is read, and every refusal with file, tensor, rule and value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pykernels.adapters.config import VARIANTS
from pykernels.engine.plan import make_plan
from pykernels.engine.recipe import adapter_recipe
from pykernels.engine.units import Adapted, Plan
from tests.adapter_files import PREFIX, factors, write_adapter, write_base, write_experts
from tests.checkpoints import write_model

LAYER = "model.layers.0.q_proj"
GOOD = factors(LAYER, 67, 131)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to plan merges into; nothing writes to it."""
    path = tmp_path_factory.mktemp("models") / "base"
    write_base(path)
    return path


def planned(base: Path, *adapters: Path, weights: tuple[float, ...] = ()) -> Plan:
    """The plan, which survives JSON."""
    plan = make_plan(adapter_recipe(str(base), [str(a) for a in adapters], weights))
    assert Plan.from_json(plan.to_json()) == plan
    return plan


def refused(base: Path, *adapters: Path, weights: tuple[float, ...] = ()) -> str:
    """The text of the refusal."""
    with pytest.raises(ValueError) as error:
        planned(base, *adapters, weights=weights)
    return str(error.value)


def changes(plan: Plan, name: str) -> Any:
    """What happens to a tensor."""
    [source] = next(o for o in plan.outputs if o.name == name).sources
    assert isinstance(source, Adapted)
    return source.changes


CONFIGS = [
    *(({key: [7]}, f"{key}: '[7]': {why}") for key, why in VARIANTS.items()),
    *(({key: {}}, f"{key}: '{{}}': {VARIANTS[key]}") for key in ("kasa_config", "use_bdlora")),
    ({"peft_type": "LOHA"}, "peft_type: 'LOHA': only LORA adapters can be merged"),
    ({"peft_type": None}, "peft_type: 'None': only LORA"),
    ({"use_new_thing": True}, "use_new_thing: 'True': not a switch of PEFT 0.21.2"),
    ({"init_lora_weights": "mica"}, "init_lora_weights: 'mica': MiCA is a variant"),
    (
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights: 'pissa_niter_4': the adapter belongs to what",
    ),
    ({"init_lora_weights": "MiCA"}, "init_lora_weights: 'MiCA': MiCA is a variant"),
    ({"init_lora_weights": "minor"}, "init_lora_weights: 'minor': not known here, and it may have taken"),
    ({"init_lora_weights": 1}, "init_lora_weights: '1': not known here"),
    ({"r": 0}, "r: '0': a rank must be an integer of at least 1"),
    ({"r": True}, "r: 'True': a rank must be"),
    ({"r": 10**400}, "(401 characters): a rank must be an integer of at least 1, and of 64 bits"),
    ({"lora_alpha": 10**400}, "(401 characters): must be a finite number, of at most 1.7e+38"),
    ({"lora_alpha": 1e39}, "lora_alpha: '1e+39': must be a finite number"),
    ({"rank_pattern": {"((q|.)+)+x": 1}}, "rank_pattern: '((q|.)+)+x': repeats a group"),
    ({"lora_alpha": "8"}, "lora_alpha: '8': must be a finite number"),
    ({"use_dora": 1}, "use_dora: '1': must be true or false"),
    ({"bias": "some"}, "bias: 'some': must be none, all or lora_only"),
    ({"rank_pattern": [1]}, "rank_pattern: '[1]': must be an object"),
    ({"rank_pattern": {"(": 1}}, "rank_pattern: '(': not a regular expression"),
    ({"alpha_pattern": {"q": None}}, "alpha_pattern: 'None': must be a finite number"),
    ({"modules_to_save": "norm"}, "modules_to_save: 'norm': must be a list of names"),
    (
        {"trainable_token_indices": [1, 1]},
        "trainable_token_indices: '[1, 1]': must be lists of different rows",
    ),
    ({"trainable_token_indices": [-1]}, "trainable_token_indices: '[-1]': must be lists"),
    ({"task_type": 3}, "task_type: '3': must be text"),
    (
        {"r": 8},
        f"tensor '{PREFIX}{LAYER}.lora_A.weight': has rank 4, r and rank_pattern of the config give 8",
    ),
    ({"rank_pattern": {"q_proj": 5}}, "has rank 4, r and rank_pattern of the config give 5"),
    ({"use_dora": True}, "use_dora is true, and the magnitude's tensor says not"),
    ({"lora_bias": True}, "lora_bias is true, and the bias of B says not"),
]


@pytest.mark.parametrize(("config", "says"), CONFIGS, ids=[str(c)[:40] for c, _ in CONFIGS])
def test_configs_that_are_refused(base, tmp_path, config, says):
    text = refused(base, write_adapter(tmp_path / "a", GOOD, **config))
    assert says in text and str(tmp_path / "a") in text


def without(key: str) -> dict[str, torch.Tensor]:
    """GOOD but for one tensor."""
    return {name: tensor for name, tensor in GOOD.items() if not name.endswith(key)}


ROWS = torch.ones(2, 64)
FILES: list[tuple[dict[str, torch.Tensor], dict[str, Any], str]] = [
    (without("B.weight"), {}, "has no lora_B beside it"),
    (without("A.weight"), {}, "has no lora_A beside it"),
    (factors(LAYER, 67, 130), {}, "A [4, 130] and B [67, 4] make a change of [67, 130], the base's"),
    (factors("model.layers.7.q_proj", 8, 8), {}, "changes 'model.layers.7.q_proj.weight', which"),
    (
        {**GOOD, f"{LAYER}.lora_magnitude_vector": torch.ones(67)},
        {},
        "use_dora is false, and the magnitude's",
    ),
    (
        {**GOOD, f"{LAYER}.lora_magnitude_vector": torch.ones(3)},
        {"use_dora": True},
        "a magnitude per output, 67",
    ),
    ({**GOOD, f"{LAYER}.lora_B.bias": torch.ones(67)}, {}, "lora_bias is false, and the bias of B says not"),
    (
        {**GOOD, f"{LAYER}.lora_B.bias": torch.ones(2)},
        {"lora_bias": True},
        "must have the shape [67] of the base's",
    ),
    (
        {**factors("model.layers.1.q_proj", 33, 64), "model.layers.1.q_proj.lora_B.bias": torch.ones(33)},
        {"lora_bias": True},
        "is added to 'model.layers.1.q_proj.bias', which the base does not hold",
    ),
    ({**GOOD, f"{LAYER}.lora_E": torch.ones(4)}, {}, "no tensor of a LoRA adapter that is known here"),
    ({**GOOD, "model.norm.original_module.weight": torch.ones(64)}, {}, "no tensor of a LoRA adapter"),
    ({**GOOD, "lm_head.weight": torch.ones(2)}, {}, "changes 'lm_head.weight', which"),
    ({**GOOD, "model.norm.weight": torch.ones(63)}, {}, "the base must be resized first"),
    (
        {**GOOD, f"{LAYER}.lora_A.default.weight": GOOD[f"{LAYER}.lora_A.weight"]},
        {},
        f"means the same tensor as '{PREFIX}{LAYER}.lora_A",
    ),
    ({"model.embed_tokens.token_adapter.trainable_tokens_delta": ROWS}, {}, "does not name its module"),
    (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": ROWS},
        {"trainable_token_indices": [1]},
        "must have shape [1, 64], a row per trainable token, got [2, 64]",
    ),
    (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": ROWS},
        {"trainable_token_indices": {"embed_tokens": [1, 101]}},
        "overwrites row 101 of 101",
    ),
    (factors("model.layers.1.experts", 40, 50), {}, "changes 'model.layers.1.experts.weight', which"),
    (
        factors("model.layers.1.experts", 40, 50, rank=8),
        {"target_parameters": ["experts.up_proj"]},
        "ranks and shapes do not tell which of target_parameters it belongs to (candidates: up_proj)",
    ),
    (
        {f"{LAYER}.lora_A.weight": torch.ones(4), f"{LAYER}.lora_B.weight": torch.ones(4)},
        {},
        "must be matrices",
    ),
    ({**GOOD, f"{LAYER}.lora_B.weight": torch.ones(67, 4).int()}, {}, "I32 is no type of an adapter"),
    ({f"{LAYER}\n.lora_A.weight": torch.ones(4, 131)}, {}, "a module's path has no line breaks"),
    ({}, {}, "holds no tensors"),
]


@pytest.mark.parametrize(("tensors", "config", "says"), FILES, ids=[says[:40] for *_, says in FILES])
def test_tensors_that_are_refused(base, tmp_path, tensors, config, says):
    text = refused(base, write_adapter(tmp_path / "a", tensors, **config))
    assert says in text and str(tmp_path / "a" / "adapter_model.safetensors") in text


def test_every_other_thing_that_a_directory_may_be(base, tmp_path):
    path = write_adapter(tmp_path / "a", GOOD)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    assert "only adapter_model.bin: pickled weights are never loaded" in refused(base, path)
    (path / "adapter_model.bin").unlink()
    assert "holds no adapter_model.safetensors; adapters that are not the default" in refused(base, path)
    (path / "adapter_config.json").write_text('{"r": 1, "r": 2}')
    assert "duplicate key 'r'" in refused(base, path)
    (path / "adapter_config.json").write_text("[]")
    assert "must hold a JSON object" in refused(base, path)
    (path / "adapter_config.json").unlink()
    assert "not a PEFT adapter, it holds no adapter_config.json" in refused(base, path)
    assert "no such directory" in refused(base, tmp_path / "none")


def test_links_out_of_an_adapter_are_refused(base, tmp_path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = write_adapter(tmp_path / name / "a", GOOD)
        (path / name).rename(tmp_path / name / "moved")
        (path / name).symlink_to(tmp_path / name / "moved")
        assert "leads out of the adapter's directory" in refused(base, path)


def test_keys_without_peft_s_prefix_are_refused(base, tmp_path):
    path = write_adapter(tmp_path / "a", GOOD)
    save_file(GOOD, path / "adapter_model.safetensors")
    assert "its key must begin with base_model.model." in refused(base, path)


PREFIXES = (
    "_orig_mod.base_model.model.",
    "module.base_model.model.",
    "base_model.model._fsdp_wrapped_module.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_trainers_put_into_paths_is_taken_out(base, tmp_path, prefix):
    path = write_adapter(tmp_path / "a", GOOD)
    save_file({prefix + key: tensor for key, tensor in GOOD.items()}, path / "adapter_model.safetensors")
    assert len(changes(planned(base, path), f"{LAYER}.weight")) == 1


def test_names_that_begin_otherwise_are_found_and_noted(tmp_path):
    write_base(tmp_path / "base")
    path = write_adapter(tmp_path / "a", factors("transformer.model.layers.0.q_proj", 67, 131))
    plan = planned(tmp_path / "base", path)
    assert len(changes(plan, f"{LAYER}.weight")) == 1
    assert any("names begin otherwise" in note for note in plan.notes)


def test_scalings(base, tmp_path):
    config = {"use_rslora": True, "alpha_pattern": {"^model.layers.0": 3, r"layers\.0\.q_proj": 10}}
    path = write_adapter(tmp_path / "a", {**GOOD, **factors("model.layers.1.q_proj", 33, 64)}, **config)
    plan = planned(base, path, path, weights=(0.5, -1))
    assert [c.scaling for c in changes(plan, f"{LAYER}.weight")] == [0.5 * 10 / 2, -10 / 2]
    assert changes(plan, "model.layers.1.q_proj.weight")[0].scaling == 0.5 * 6 / 2
    assert plan.models[0].modules == ({"linear": 2}, {"linear": 2})


def test_a_scaling_beyond_float32(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", GOOD, lora_alpha=1e38)
    assert f"{LAYER}.lora_A.weight': is scaled by 2.5e+37 and a weight of 10:" in refused(
        base, adapter, weights=(10.0,)
    )


def test_signs_in_escapes_and_classes_repeat_no_group(base, tmp_path):
    pattern = {r"x[)*]\)*": 3, r".*\.layers\.(0|1)\.q_(proj)?": 4}
    planned(base, write_adapter(tmp_path / "a", GOOD, r=8, rank_pattern=pattern))


def test_more_parameters_than_are_told_apart(base, tmp_path):
    """Every order of them is tried, so a file must not be able to ask for many."""
    names = [f"experts.{letter}" for letter in "abcdefghijklm"]
    tensors = factors("model.layers.1.experts", 40, 50, rank=12)
    for depth in range(1, 12):
        tensors |= factors("model.layers.1.experts" + ".base_layer" * depth, 40, 50, rank=12)
    adapter = write_adapter(tmp_path / "a", tensors, target_parameters=names)
    assert "13 of target_parameters are of its module, and at most 6 are told apart" in refused(base, adapter)


def test_weights_that_cannot_be(base, tmp_path):
    path = write_adapter(tmp_path / "a", {**GOOD, "model.norm.weight": torch.ones(64)})
    assert "a full copy replaces the base's tensor, and a weight of 0.5 cannot" in refused(
        base, path, weights=(0.5,)
    )
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": ROWS}
    tokens = write_adapter(tmp_path / "t", rows, trainable_token_indices=[1, 2])
    assert "rows are overwritten, and a weight of 2.0 cannot be used" in refused(base, tokens, weights=(2,))
    assert "give one per adapter, 1, or none; got 2" in refused(base, path, weights=(1, 2))


def test_adapters_that_exclude_each_other(base, tmp_path):
    copy = write_adapter(tmp_path / "copy", {f"{LAYER}.weight": torch.ones(67, 131)})
    add = write_adapter(tmp_path / "add", GOOD)
    assert "one replaces what the other changes" in refused(base, copy, add)
    assert "one replaces what the other changes" in refused(base, add, copy)
    rows = {"model.embed_tokens.token_adapter.trainable_tokens_delta": ROWS}
    one = write_adapter(tmp_path / "one", rows, trainable_token_indices=[1, 2])
    two = write_adapter(tmp_path / "two", rows, trainable_token_indices=[2, 3])
    assert re.search(r"'.*one' and '.*two'.*row 2 is overwritten twice", refused(base, one, two))


def test_a_quantised_base_is_refused(tmp_path):
    write_base(tmp_path / "base", quantization_config={"quant_method": "gptq"})
    assert "quantization_config; adapters are merged into float tensors" in refused(
        tmp_path / "base", write_adapter(tmp_path / "a", GOOD)
    )
    write_base(tmp_path / "other", torch.float8_e4m3fn)
    text = refused(tmp_path / "other", write_adapter(tmp_path / "b", GOOD))
    assert "is F8_E4M3, and only F64, F32, F16, BF16 are merged: dequantise the base first" in text


def test_experts_in_one_tensor(base, tmp_path):
    plan = planned(base, write_experts(tmp_path / "a"))
    [change] = changes(plan, "model.layers.1.experts.up_proj")
    assert (change.experts, change.expert, change.rank, change.transposed) == (3, None, 4, True)


def test_flags_of_dora_and_bias_are_not_for_experts(base, tmp_path):
    tensors = factors("model.layers.1.experts", 40, 50, rank=12)
    tensors["model.layers.1.experts.lora_B.bias"] = torch.ones(40)
    path = write_adapter(tmp_path / "a", tensors, target_parameters=["experts.up_proj"], lora_bias=True)
    assert "target_parameters know neither DoRA nor a bias of B" in refused(base, path)


def test_an_adapter_changes_a_copy_of_its_base_layer(base, tmp_path):
    tensors = {
        "model.embed_tokens.base_layer.weight": torch.ones(101, 64).bfloat16(),
        "model.embed_tokens.lora_embedding_A": torch.ones(4, 101),
        "model.embed_tokens.lora_embedding_B": torch.ones(64, 4),
    }
    one, two = (write_adapter(tmp_path / name, tensors) for name in "ab")
    plan = planned(base, one, two, weights=(0.5, 1))
    assert [c.kind for c in changes(plan, "model.embed_tokens.weight")] == ["replace", "add", "add"]
    assert len(plan.same) == 1


def stack(home: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> Path:
    """A base of tensors of zeros."""
    write_model(home / "base", {name: torch.zeros(shape) for name, shape in shapes.items()}, **config)
    return home / "base"


def test_what_a_tied_tensor_cannot_take(tmp_path):
    base = stack(tmp_path, {"embed_tokens.weight": (6, 8)}, tie_word_embeddings=True)
    head, embedding = (
        factors("lm_head", 6, 8),
        {
            "embed_tokens.lora_embedding_A": torch.ones(4, 6),
            "embed_tokens.lora_embedding_B": torch.ones(8, 4),
        },
    )
    norms = {
        "lm_head.lora_magnitude_vector": torch.ones(6),
        "embed_tokens.lora_magnitude_vector": torch.ones(8),
    }
    dora = write_adapter(tmp_path / "dora", {**head, **embedding, **norms}, use_dora=True)
    assert "has magnitudes of its rows and of its columns" in refused(base, dora)
    copy = write_adapter(tmp_path / "copy", {"lm_head.weight": torch.ones(6, 8)})
    assert "one adapter replaces what another changes" in refused(
        base, copy, write_adapter(tmp_path / "head", head)
    )
    tokens = {
        f"{m}.token_adapter.trainable_tokens_delta": torch.ones(1, 8) for m in ("lm_head", "embed_tokens")
    }
    rows = write_adapter(
        tmp_path / "rows", tokens, trainable_token_indices={"lm_head": [0], "embed_tokens": [0]}
    )
    assert "row 0 is overwritten twice" in refused(base, rows)
