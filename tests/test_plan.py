"""Plans from headers alone: sources, aliases, refusals, layout to the byte, notes and the JSON round trip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pykernels.engine.layers import layer_of, natural, stacks
from pykernels.engine.plan import ROW_HEAD, Plan
from pykernels.engine.recipe import read_recipe
from tests.zoo import LLAMA, NO_HEAD, TIED, UNTIED, Zoo, by_name


@pytest.fixture
def zoo(tmp_path):
    return Zoo(tmp_path)


@pytest.fixture
def llamas(zoo):
    for name in ("base", "a", "b"):
        zoo.add(name, LLAMA, UNTIED)
    return zoo


# What a plan holds


def test_outputs_sources_and_parameters(llamas):
    plan = llamas.plan(parameters={"weight": [0.0, 1.0], "density": 0.5}, dtype="float32", seed=9)
    assert [o.name for o in plan.outputs] == [
        "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.weight",
        "model.layers.1.mlp.weight", "model.layers.2.mlp.weight", "model.norm.weight",
    ]  # fmt: skip
    assert (plan.method, plan.scope, plan.seed, plan.base, plan.config_from) == ("ties", "tensor", 9, 2, 2)
    assert [Path(m.path).name for m in plan.models] == ["a", "b", "base"]
    mlp = by_name(plan)["model.layers.1.mlp.weight"]
    assert mlp.params == {
        "weight": [0.5, 0.5], "density": [0.5, 0.5], "normalize": True, "lambda": 1.0, "tie": "index",
        "elect": "weighted", "rescale": None, "int8_mask": False, "seed": 9,
        "name": "model.layers.1.mlp.weight",
    }  # fmt: skip
    assert by_name(plan)["lm_head.weight"].params["weight"] == [0.0, 0.0]
    assert (mlp.action, mlp.dtype, mlp.shape, mlp.flat, mlp.alias_of) == ("merge", "F32", (4, 4), None, None)
    assert mlp.base is not None and mlp.base.model == 2 and [s.model for s in mlp.tuned] == [0, 1]
    assert {s.nbytes for s in mlp.sources} == {32} and mlp.nbytes == 64
    assert plan.recipe["seed"] == 9 and read_recipe(plan.recipe).seed == 9
    assert plan.total_read == 3 * 232 and plan.total_size == 2 * 232
    assert set(plan.models[0].identities) == {mlp.tuned[0].file}


def test_sources_are_the_bytes_of_the_tensor(zoo):
    for i, name in enumerate(("base", "a")):
        (zoo.home / name).mkdir()
        tensors = {"x.weight": torch.full((3,), i + 1.0), "y.weight": torch.full((2,), i + 5.0)}
        save_file(tensors, zoo.home / name / "model.safetensors")
    out = by_name(zoo.plan(tuned="a"))["y.weight"]
    for source, value in zip(out.sources, (5.0, 6.0), strict=True):
        raw = Path(source.file).read_bytes()[source.start : source.end]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32), torch.full((2,), value))


def test_json_round_trip_is_exact(llamas):
    (llamas.home / "c").mkdir()
    odd = {"\u00e9\x01.weight": torch.zeros(2), "ids": torch.zeros(2, dtype=torch.int64)}
    save_file(odd, llamas.home / "c/model.safetensors")
    plans = [
        llamas.plan(
            scope="model", seed=2**64 - 1, shard_size=64, parameters={"weight": 1 / 3, "density": 0.1}
        ),
        llamas.plan("linear", None, "c"),
        llamas.plan("dare_linear", parameters={"weight": [0.1, 0.7], "rescale": False}),
    ]
    for plan in plans:
        again = Plan.from_json(plan.to_json())
        assert again == plan and again.to_json() == plan.to_json()
        assert Plan.from_json(plan.to_json(indent=1)) == plan
        assert [again.header(i) for i in range(len(plan.shards))] == [
            plan.header(i) for i in range(len(plan.shards))
        ]


def test_rows_for_a_table(llamas):
    rows = llamas.plan(parameters={"weight": [0.0, 1.0], "density": 0.25}).rows()
    assert all(len(row) == len(ROW_HEAD) for row in rows)
    assert rows[3][:5] == ("model.layers.1.mlp.weight", "4 x 4", "BF16", "BF16", "model.safetensors")
    assert rows[3][5].startswith("weight 0.5, density 0.25, ") and "tie index" in rows[3][5]


def test_linear_without_a_base(llamas):
    plan = llamas.plan("linear", None, "a b")
    assert (plan.base, plan.config_from) == (None, 0)
    assert all(o.base is None and len(o.tuned) == 2 for o in plan.outputs)


def test_linear_with_a_base_that_only_gives_the_config(llamas):
    plan = llamas.plan("linear", "base", "a b")
    assert (plan.base, plan.config_from, len(plan.models)) == (None, 2, 3)
    assert [s.model for s in plan.outputs[0].sources] == [0, 1]
    assert "base' gives config and tokenizer only" in llamas.notes("linear", "base", "a b")


def test_linear_with_its_base_among_the_models(llamas):
    plan = llamas.plan("linear", "b", "a b")
    assert (plan.base, plan.config_from, len(plan.models)) == (None, 1, 2)
    assert [s.model for s in plan.outputs[0].sources] == [0, 1]


def test_the_base_among_the_models_gives_no_delta(llamas):
    plan = llamas.plan("ties", "base", "a base b")
    assert (plan.base, plan.config_from) == (1, 1)
    assert [s.model for s in plan.outputs[0].tuned] == [0, 2]
    assert plan.outputs[0].params["weight"] == [1.0, 1.0]
    assert "'base' is the base and has no delta to itself" in llamas.notes("ties", "base", "a base b")


def test_models_of_weight_zero_stay(llamas):
    assert len(llamas.plan(parameters={"weight": 0}).outputs[0].tuned) == 2


# Layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts.5.w1.weight", ("model.layers", 3)), ("h.11.attn.bias", ("h", 11)),
        ("0.weight", ("", 0)), ("lm_head.weight", None), ("block4.weight", None), ("a.5", None),
        ("a." + "9" * 5000 + ".b", None),
    ],
)  # fmt: skip
def test_layer_of_a_name(name, layer):
    assert layer_of(name) == layer


def test_natural_order():
    names = ["l.10.b", "l.2.b", "l.2.a", "k", "l.02.a", "l." + "9" * 5000]
    assert sorted(names, key=natural) == ["k", "l.02.a", "l.2.a", "l.2.b", "l.10.b", "l." + "9" * 5000]


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, 3), ({"num_hidden_layers": 3}, 3), ({"num_hidden_layers": 9}, 9), ({"n_layer": 9}, 9),
        ({"text_config": {"num_hidden_layers": 9}}, 9), ({"num_hidden_layers": "9"}, 3),
        ({"num_hidden_layers": 2}, 3),  # another stack has that number: the names are right about this one
    ],
)  # fmt: skip
def test_number_of_layers(config, length):
    names = ["vision.0.w", "vision.1.w", *(f"model.layers.{i}.{w}" for i in range(3) for w in "qkv")]
    assert stacks(names, config) == {"vision": 2, "model.layers": length}


def test_gradient_runs_over_the_layers_of_the_config(zoo):
    for name in ("base", "a"):
        zoo.add(name, NO_HEAD, {"num_hidden_layers": 5})
    plan = zoo.plan(tuned="a", parameters={"weight": [0.0, 1.0]})
    assert [o.params["weight"][0] for o in plan.outputs] == [0.0, 0.0, 0.25, 0.5, 0.0]


# Model-wide scope


def test_segment_is_in_the_order_of_names_with_tied_tensors_once(zoo):
    shapes = {**LLAMA, "model.layers.10.mlp.weight": (4, 4), "ids.weight": (3,)}
    for name in ("base", "a"):
        zoo.add(name, shapes, TIED, ids=torch.int32)
    plan = zoo.plan(tuned="a", scope="model")
    assert [(o.name, o.flat) for o in plan.segment()] == [
        ("model.embed_tokens.weight", 0), ("model.layers.0.mlp.weight", 32),
        ("model.layers.1.mlp.weight", 48), ("model.layers.10.mlp.weight", 64),
        ("model.layers.2.mlp.weight", 80), ("model.norm.weight", 96),
    ]  # fmt: skip
    assert by_name(plan)["lm_head.weight"].flat == 0 and by_name(plan)["ids.weight"].flat is None
    assert all(o.flat is None for o in zoo.plan(tuned="a").outputs)


def test_one_density_for_the_whole_model(llamas):
    density = [{"filter": "layers.1", "value": 0.5}, {"value": 0.25}]
    models = [{"model": str(llamas.home / m), "parameters": {}} for m in "ab"]
    models[1]["parameters"] = {"density": density}
    assert llamas.refused(scope="model", models=models) == (
        "recipe: scope model needs one density for all tensors of a model, but the density of 'b' is 0.25 "
        "for 'lm_head.weight' and 0.5 for 'model.layers.1.mlp.weight'"
    )
    models[1]["parameters"] = {"density": 0.5}
    assert llamas.plan(scope="model", models=models).outputs[0].params["density"] == [1.0, 0.5]
    tie = {"weight": 1, "tie": ["index", "keep"]}
    assert "needs one tie for all tensors of a model, but the tie is index for" in (
        llamas.refused(scope="model", parameters=tie)
    )


# Layout


def test_one_shard_is_what_the_format_says(llamas, tmp_path):
    plan = llamas.plan(dtype="float32")
    assert [s.name for s in plan.shards] == ["model.safetensors"]
    check_layout(plan, tmp_path)


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (232, [6]), (231, [5, 1]), (160, [3, 3]), (128, [2, 4]), (64, [1, 1, 2, 2]), (63, [1, 1, 1, 1, 2]),
        (32, [1] * 6), (1, [1] * 6),
    ],
)  # fmt: skip
def test_shards_fill_in_order_and_a_large_tensor_has_its_own(llamas, tmp_path, size, groups):
    plan = llamas.plan(shard_size=size)
    assert [len(s.tensors) for s in plan.shards] == groups
    count = len(groups)
    if count > 1:
        assert [s.name for s in plan.shards] == [
            f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
    check_layout(plan, tmp_path)


def test_every_tensor_is_aligned_to_its_elements(zoo, tmp_path):
    shapes = {"a.weight": (3,), "b.weight": (1,), "c.weight": (3,), "d.weight": (), "e.weight": (0, 7)}
    for name in ("base", "a"):
        zoo.add(name, shapes, a=torch.int8, b=torch.float64, d=torch.float32)
    plan = zoo.plan(tuned="a")
    assert [o.name[0] for o in plan.outputs] == ["b", "d", "c", "e", "a"]
    assert all(
        o.start % torch.empty((), dtype=t).element_size() == 0
        for o, t in zip(
            plan.outputs,
            (torch.float64, torch.float32, torch.bfloat16, torch.bfloat16, torch.int8),
            strict=True,
        )
    )
    check_layout(plan, tmp_path)


def check_layout(plan: Plan, path: Path) -> None:
    """Write the planned files with a pattern as data and read them back with the format's own reader."""
    assert sum(s.nbytes for s in plan.shards) == plan.total_write
    for i, shard in enumerate(plan.shards):
        held = [o for o in plan.outputs if o.shard == i]
        header = plan.header(i)
        assert len(header) % 4096 == 0 and held[0].start == len(header)
        assert [o.name for o in held] == list(shard.tensors)
        assert [a.end for a in held] == [*(b.start for b in held[1:]), shard.nbytes]
        body = bytes(n % 251 for n in range(shard.nbytes - len(header)))
        (path / shard.name).write_bytes(header + body)
        with safe_open(path / shard.name, "pt") as f:
            assert f.metadata() == {"format": "pt"} and set(f.keys()) == set(shard.tensors)
            for o in held:
                tensor = f.get_tensor(o.name)
                assert tuple(tensor.shape) == o.shape and tensor.numel() == o.numel
                raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                assert raw == body[o.start - len(header) : o.end - len(header)]
                assert len(raw) == o.nbytes


# Notes


@pytest.mark.parametrize(
    ("method", "keys", "says"),
    [
        (
            "ties",
            {},
            "arithmetic is float32 with one rounding at the end; mergekit computes in bfloat16, rounds",
        ),
        ("ties", {"dtype": "float16"}, "mergekit computes in float16"),
        ("ties", {"parameters": {"weight": 1, "density": 0.5}}, "tie index: of equal magnitudes"),
        (
            "ties",
            {"parameters": {"weight": 1, "density": 0.5, "tie": "keep"}},
            "tie keep: all magnitudes equal",
        ),
        ("ties", {"elect": "plain"}, "elect plain: signs are elected by the deltas"),
        (
            "ties",
            {"parameters": {"weight": 1, "normalize": "count"}},
            "normalize count: divides by the number",
        ),
        ("ties", {"scope": "model"}, "scope model: one threshold over all tensors"),
        (
            "ties",
            {"parameters": {"weight": [{"filter": "mpl", "value": 1}, {"value": 1}]}},
            "filter 'mpl' matches no",
        ),
        ("dare_ties", {"parameters": {"weight": 1, "density": 0.5}}, "rescale density (or true): divides by"),
        (
            "dare_ties",
            {"parameters": {"weight": 1, "density": 0.5}, "seed": 3},
            "masks are drawn from seed 3 and",
        ),
    ],
)
def test_notes_tell_where_mergekit_gives_other_numbers(llamas, method, keys, says):
    assert says in llamas.notes(method, **keys)


def test_notes_of_linear(llamas):
    models = [{"model": str(llamas.home / m), "parameters": {"weight": w}} for m, w in (("a", 1), ("b", -1))]
    assert "weights add up to 0 in 6 tensors" in llamas.notes("linear", None, models=models)
    assert "dtype float16 is the type written; mergekit rounds the inputs" in (
        llamas.notes("linear", None, dtype="float16")
    )


def test_tied_tensors_that_part_are_noted(zoo):
    for name in ("base", "a"):
        zoo.add(name, LLAMA, TIED)
    parameters = {"weight": [{"filter": "lm_head", "value": 2}, {"value": 1}]}
    says = "'lm_head.weight' and 'model.embed_tokens.weight' are tied but get different parameters"
    assert says in zoo.notes(tuned="a", parameters=parameters)
    assert says not in zoo.notes(tuned="a")


def test_no_notes_where_nothing_differs(zoo):
    for name in ("base", "a"):
        zoo.add(name, LLAMA, UNTIED, default=torch.float32)
    assert zoo.notes(tuned="a") == ""
    assert zoo.notes("dare_ties", tuned="a") == ""
    assert "rescale" not in zoo.notes(
        "dare_ties", tuned="a", parameters={"weight": 1, "density": 0.5, "rescale": "l1"}
    )


def test_warnings_about_files_are_notes(llamas):
    (llamas.home / "a/model.safetensors").rename(llamas.home / "a/model-00001-of-00001.safetensors")
    index = {
        "metadata": {"total_size": 5},
        "weight_map": dict.fromkeys(LLAMA, "model-00001-of-00001.safetensors"),
    }
    (llamas.home / "a/model.safetensors.index.json").write_text(json.dumps(index))
    assert "total_size is '5'" in llamas.notes()
