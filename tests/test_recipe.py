"""The recipe door: what is accepted, what every refusal says, and the value of a parameter for a tensor."""

from __future__ import annotations

import time

import pytest
import yaml

from pykernels.engine import strict_yaml
from pykernels.engine.recipe import Recipe, RecipeError, read_recipe
from pykernels.methods import METHODS

MODELS = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 1}}]


def ties(**changes: object) -> dict[str, object]:
    return {"merge_method": "ties", "base_model": "base", "models": MODELS, **changes}


def refused(recipe: object) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe)  # type: ignore[arg-type]
    return str(caught.value)


def values(
    parameters: dict[str, object], name: str, tensor: str, layer: int | None, layers: int = 5
) -> object:
    """One resolved parameter of a ties recipe; per model it is the first model's."""
    recipe = read_recipe(ties(parameters={"weight": 1.0, **parameters}, models=[{"model": "a"}]))
    found = recipe.resolve(tensor, layer, layers)[name]
    return found[0] if isinstance(found, list) else found


# Reading: where a recipe may come from, and what its text may do


TEXT = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.5, density: [0.2, 0.6]}
  - model: b
parameters:
  weight: 1e-1
  normalize: false
dtype: bfloat16
"""


def test_path_text_mapping_and_recipe_are_one_recipe(tmp_path):
    path = tmp_path / "r.yml"
    path.write_text(TEXT)
    from_text = read_recipe(TEXT)
    assert from_text.as_dict() == read_recipe(path).as_dict() == read_recipe(str(path)).as_dict()
    assert read_recipe(from_text) is from_text
    assert read_recipe(from_text.as_dict()).as_dict() == from_text.as_dict()
    assert from_text.label == "recipe" and read_recipe(path).label == str(path)
    assert from_text.resolve("x", None, 4) == {
        "weight": [0.5, 0.1], "density": [0.2, 1.0], "normalize": False, "lambda": 1.0, "tie": "index",
        "elect": "weighted", "int8_mask": False, "seed": 0, "name": "x",
    }  # fmt: skip


def test_one_line_of_text_is_yaml_and_not_a_path():
    assert read_recipe("{merge_method: linear, models: [{model: a}], parameters: {weight: 1}}").members == (
        0,
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_table_is_known(method):
    recipe = read_recipe({"merge_method": method, "base_model": "base", "models": MODELS})
    assert recipe.resolve("x", None, 1)["weight"] == [0.5, 1.0]


def test_messages_begin_with_the_file(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("merge_method: tees\n")
    assert refused(path).startswith(
        f"{path}: merge_method: unknown method 'tees'; did you mean ties? Known: "
    )


def test_a_file_that_is_none(tmp_path):
    assert "no such recipe file" in refused(tmp_path / "none.yml")
    (tmp_path / "latin.yml").write_bytes(b"merge_method: caf\xe9\n")
    assert "not UTF-8 text at byte 17" in refused(tmp_path / "latin.yml")
    (tmp_path / "large.yml").write_bytes(b"#" * 1_000_001)
    assert "longer than 1000000 bytes" in refused(tmp_path / "large.yml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1\nb: 2", "line 2: not valid YAML: "),
        ("merge_method: ties\nmerge_method: linear\n", "line 2: key 'merge_method' stands twice"),
        (
            "models:\n - model: a\n   parameters: {weight: 1, weight: 2}\n",
            "line 3: key 'weight' stands twice",
        ),
        ("1: x\n", "line 1: a key must be text, got '1'"),
        ("[a]: x\n", "line 1: a key must be text"),
        ("a: 1\n---\nb: 2\n", "not valid YAML: "),
        ("a: !!python/object:os.system x\n", "not valid YAML: "),
        ("a: *nothing\n", "alias *nothing has no anchor"),
        ("a: &a [*a]\n", "alias *a has no anchor before it, or holds itself"),
        ("a: " + "[" * 60 + "]" * 60 + "\n", "nested deeper than 50 levels"),
        ("a: " + "[" * 50_000 + "\n", "nested deeper than 50 levels"),
        ("a: \x00\n", "not valid YAML: "),
        ("a: " + "9" * 5000 + "\n", "recipe: "),
        ("# nothing\n", "a recipe is a mapping of keys to values, got None"),
        ("- a\n- b\n", "a recipe is a mapping of keys to values, got ['a', 'b']"),
    ],
)
@pytest.mark.parametrize("loader", sorted({yaml.SafeLoader.__name__, strict_yaml._SafeLoader.__name__}))
def test_text_that_is_refused(text, says, loader, monkeypatch):
    monkeypatch.setattr(strict_yaml, "_SafeLoader", getattr(yaml, loader))
    assert says in refused(text)


def test_alias_bombs_are_refused_at_once():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    start = time.monotonic()
    assert "more than 100000 values once aliases are expanded" in refused(bomb)
    assert time.monotonic() - start < 1


def test_anchors_and_merge_keys_work():
    recipe = read_recipe(
        "merge_method: ties\nbase_model: base\nmodels:\n"
        " - {model: a, parameters: &p {weight: 0.5, density: 0.25}}\n"
        " - {model: b, parameters: {<<: *p, weight: 2}}\n"
    )
    assert recipe.resolve("x", None, 1)["weight"] == [0.5, 2.0]
    assert recipe.resolve("x", None, 1)["density"] == [0.25, 0.25]


# Keys, methods and models


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (ties(dtyp="float32"), "dtyp: unknown key; did you mean dtype? Known: base_model, dtype, elect,"),
        (ties(merge_method="slerp"), "merge_method: unknown method 'slerp'; "),
        (ties(merge_method=None), "merge_method: must be the name of a method, got None; Known: dare_linear"),
        (ties(merge_method=3), "merge_method: must be the name of a method, got 3"),
        (ties(slices=[]), "slices: not supported yet"),
        (ties(modules={}), "modules: not supported yet"),
        (ties(tokenizer={"source": "union"}), "tokenizer: not supported yet"),
        (ties(tokenizer_source="union"), "tokenizer_source: not supported yet"),
        (ties(chat_template="auto"), "chat_template: not supported yet"),
        (ties(base_model=None), "base_model: ties merges differences to a base and needs one"),
        (
            ties(base_model="m+lora"),
            "base_model: 'm+lora' asks for an adapter on a model, which is not supported",
        ),
        (ties(base_model=7), "base_model: Input should be a valid string, got 7"),
        (ties(models=[{"model": "m+lora"}]), "models[0].model: 'm+lora' asks for an adapter"),
        (ties(models=None), "models: Field required"),
        (ties(models=[]), "models: List should have at least 1 item"),
        (ties(models="a"), "models: Input should be a valid list, got 'a'"),
        (ties(models=["a"]), "models[0]: must be a mapping with the key model, got 'a'"),
        (
            ties(models=[{"modle": "a"}]),
            "models[0].modle: unknown key; did you mean model? Known: model, param",
        ),
        (ties(models=[{"parameters": {}}]), "models[0].model: Field required"),
        (ties(models=[{"model": 1}]), "models[0].model: Input should be a valid string, got 1"),
        (
            ties(models=[{"model": "a"}, {"model": "a"}]),
            "models[1].model: 'a' is listed twice, first as models[0]",
        ),
        (ties(models=[{"model": "base"}]), "models: nothing to merge besides the base 'base'"),
        (ties(models=[{"model": str(i)} for i in range(65)]), "models: List should have at most 64 items"),
        (ties(parameters=[1]), "parameters: must be a mapping, got [1]"),
        (
            ties(models=[{"model": "a", "parameters": 1}]),
            "models[0].parameters: Input should be a valid dictionary",
        ),
        (ties(dtype="int8"), "dtype: unknown type 'int8'; Known: bfloat16, float16, float32, float64"),
        (ties(out_dtype="bf16"), "out_dtype: unknown type 'bf16'; "),
        (ties(scope="row"), "scope: Input should be 'tensor' or 'model', got 'row'"),
        (
            ties(merge_method="dare_ties", scope="model"),
            "scope: model is for methods that trim by magnitude; ",
        ),
        (ties(seed=-1), "seed: Input should be greater than or equal to 0, got -1"),
        (ties(seed=2**64), "seed: Input should be less than or equal to 18446744073709551615"),
        (ties(seed=1.5), "seed: Input should be a valid integer, got 1.5"),
        (ties(seed=True), "seed: Input should be a valid integer, got True"),
        (
            ties(seed=1, parameters={"seed": 2}),
            "seed: stands at the top level and under parameters; keep one",
        ),
        (ties(tie="keep", parameters={"tie": "keep"}), "tie: stands at the top level and under parameters"),
        (
            ties(merge_method="linear", tie="keep"),
            "parameters.tie: no parameter of linear; Known: normalize, weight",
        ),
    ],
)
def test_keys_that_are_refused(recipe, says):
    assert refused(recipe).startswith("recipe: " + says)


def test_a_directory_with_a_plus_in_its_name_is_a_directory(tmp_path):
    (tmp_path / "a+b").mkdir()
    assert read_recipe(
        ties(models=[{"model": str(tmp_path / "a+b"), "parameters": {"weight": 1}}])
    ).members == (0,)


def test_empty_keys_mean_absent():
    recipe = read_recipe("merge_method: linear\nbase_model:\nmodels: [{model: a, parameters: }]\ndtype:\n")
    assert recipe.base_model is None and recipe.output_dtype is None and recipe.models[0].parameters == {}


def test_ours_may_stand_in_either_place():
    top = read_recipe(ties(tie="keep", elect="plain", scope="model", seed=7))
    under = read_recipe(ties(parameters={"tie": "keep", "elect": "plain", "scope": "model", "seed": 7}))
    assert top.as_dict() == under.as_dict()
    assert (top.scope, top.seed) == ("model", 7)
    p = top.resolve("x", None, 1)
    assert (p["tie"], p["elect"], p["seed"]) == ("keep", "plain", 7)


def test_the_base_among_the_models_has_no_delta_but_is_a_member_of_linear():
    models = [{"model": "a"}, {"model": "base"}, {"model": "b"}]
    shared = {"base_model": "base", "models": models, "parameters": {"weight": 1}}
    assert read_recipe({"merge_method": "ties", **shared}).members == (0, 2)
    assert len(read_recipe({"merge_method": "ties", **shared}).resolve("x", None, 1)["weight"]) == 2
    assert read_recipe({"merge_method": "linear", **shared}).members == (0, 1, 2)


def test_seed_of_the_command_line_wins():
    recipe = read_recipe(ties(seed=5))
    assert recipe.with_seed(None).seed == 5 and recipe.with_seed(0).seed == 0 and recipe.seed == 5
    with pytest.raises(RecipeError, match="seed: Input should be greater"):
        recipe.with_seed(-3)


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ({}, None), ({"dtype": "float16"}, "F16"), ({"dtype": "torch.bfloat16"}, "BF16"),
        ({"dtype": "float16", "out_dtype": "float32"}, "F32"), ({"out_dtype": "float64"}, "F64"),
    ],
)  # fmt: skip
def test_out_dtype_wins_over_dtype(keys, code):
    assert read_recipe(ties(**keys)).output_dtype == code


# Parameters: what may be written


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (
            {"densty": 1},
            "densty: no parameter of ties; did you mean density? Known: density, elect, int8_mask",
        ),
        ({"density": 1.5}, "density: must be between 0 and 1, got 1.5"),
        ({"density": [0.5, -0.1]}, "density[1]: must be between 0 and 1, got -0.1"),
        ({"density": float("nan")}, "density: must be between 0 and 1, got nan"),
        ({"weight": float("inf")}, "weight: must be finite in float32, got inf"),
        ({"weight": 1e39}, "weight: must be finite in float32, got 1e+39"),
        ({"weight": 10**400}, "weight: must be a number, got 1000"),
        ({"weight": "much"}, "weight: must be a number, got 'much'"),
        ({"weight": True}, "weight: must be a number, got True"),
        ({"weight": None}, "weight: must be a number, got None"),
        ({"weight": []}, "weight: an empty list says nothing"),
        ({"weight": [1, [2]]}, "weight[1]: must be a number, got [2]"),
        (
            {"weight": [1, {"value": 2}]},
            "weight: a list holds either values over the layers or filters, not both",
        ),
        ({"weight": {"filter": "mlp"}}, "weight: a filter needs a value"),
        ({"weight": [{"value": 1, "fliter": "x"}]}, "weight[0]: unknown key 'fliter'; did you mean filter?"),
        ({"weight": [{"value": 1, "filter": 3}]}, "weight[0].filter: must be text, got 3"),
        ({"weight": [{"value": [{"value": 1}]}]}, "weight[0].value: a filter may hold a value or a gradient"),
        (
            {"density": [{"value": 0}, {"value": [0, 2]}]},
            "density[1].value[1]: must be between 0 and 1, got 2",
        ),
        ({"normalize": "yes"}, "normalize: must be true or false or count, got 'yes'"),
        ({"normalize": 2}, "normalize: must be true or false or count, got 2"),
        ({"int8_mask": "count"}, "int8_mask: must be true or false, got 'count'"),
        ({"tie": "drop"}, "tie: must be index or keep, got 'drop'"),
        ({"elect": True}, "elect: must be weighted or plain, got True"),
        ({"lambda": "x" * 500}, "lambda: must be a number, got 'xxx"),
    ],
)
def test_values_that_are_refused(parameters, says):
    message = refused(ties(parameters=parameters))
    assert message.startswith("recipe: parameters." + says)
    assert len(message) < 300


def test_values_of_a_model_are_named_by_its_place():
    models = [{"model": "a"}, {"model": "b", "parameters": {"density": 3}}]
    assert "models[1].parameters.density: must be between" in refused(ties(models=models))
    models[1] = {"model": "b", "parameters": {"lambda": 1}}
    assert "models[1].parameters.lambda: holds for the whole merge; move it to" in refused(
        ties(models=models)
    )


@pytest.mark.parametrize(
    ("method", "written", "read"),
    [
        ("dare_ties", True, "density"), ("dare_ties", False, None), ("dare_ties", "l1", "l1"),
        ("dare_ties", "density", "density"), ("dare_linear", 1, "density"), ("dare_linear", 0, None),
    ],
)  # fmt: skip
def test_rescale(method, written, read):
    recipe = read_recipe(ties(merge_method=method, parameters={"rescale": written}))
    assert recipe.resolve("x", None, 1)["rescale"] == read
    assert "rescale: must be true or false or density or l1, got 'l2'" in refused(
        ties(merge_method=method, parameters={"rescale": "l2"})
    )


def test_count_needs_an_election():
    assert read_recipe(ties(parameters={"normalize": "count"})).resolve("x", None, 1)["normalize"] == "count"
    message = refused(ties(merge_method="task_arithmetic", parameters={"normalize": "count"}))
    assert "parameters.normalize: must be true or false, got 'count'" in message


def test_int8_mask_is_accepted():
    assert values({"int8_mask": True}, "int8_mask", "x", None) is True


# Parameters: their value for a tensor, as mergekit 0.1.5 resolves it

GRADIENT = [0.0, 1.0, 0.5]
FILTERS = [{"filter": "mlp", "value": 0.25}, {"filter": "attn", "value": [0.0, 1.0]}, {"value": 0.75}]


@pytest.mark.parametrize(
    ("written", "tensor", "layer", "layers", "read"),
    [
        (0.5, "x", None, 5, 0.5),
        ("1e-1", "x", None, 5, 0.1),
        (GRADIENT, "l.0.x", 0, 5, 0.0),
        (GRADIENT, "l.1.x", 1, 5, 0.5),
        (GRADIENT, "l.2.x", 2, 5, 1.0),
        (GRADIENT, "l.3.x", 3, 5, 0.75),
        (GRADIENT, "l.4.x", 4, 5, 0.5),
        (GRADIENT, "lm_head.weight", None, 5, 0.0),  # outside the layers: the first value, also behind them
        (GRADIENT, "l.0.x", 0, 1, 0.5),  # a single layer is the last one
        (GRADIENT, "l.9.x", 9, 5, 0.5),  # a layer past the config's number counts as the last
        ([0.2, 0.6], "l.1.x", 1, 4, 0.2 * (1 - 1 / 3) + 0.6 * (1 / 3)),
        ([0.7], "l.3.x", 3, 5, 0.7),
        (["1e-1", 0.2], "l.4.x", 4, 5, 0.2),
        (FILTERS, "l.1.mlp.up", 1, 5, 0.25),
        (FILTERS, "l.1.self_attn.q", 1, 5, 0.25),  # a gradient behind a filter
        (FILTERS, "l.3.self_attn.q", 3, 5, 0.75),
        (FILTERS, "l.1.attn.mlp", 1, 5, 0.25),  # the first match wins
        (FILTERS, "norm", None, 5, 0.75),
        ([{"filter": "*", "value": 0.1}, {"filter": "mlp", "value": 0.9}], "mlp", None, 5, 0.1),
        ([{"filter": "m.p", "value": 0.1}], "mlp", None, 5, 1.0),  # a substring, no pattern; then the default
        ({"filter": "mlp", "value": 0.3}, "mlp", None, 5, 0.3),  # a lone filter needs no list
        ({"filter": None, "value": 0.3}, "x", None, 5, 0.3),
    ],
)
def test_value_of_a_setting(written, tensor, layer, layers, read):
    assert values({"density": written}, "density", tensor, layer, layers) == read


@pytest.mark.parametrize(
    ("layer", "read"), [(0, "index"), (1, "index"), (2, "keep"), (3, "keep"), (4, "index")]
)
def test_lists_of_words_pick_and_do_not_interpolate(layer, read):
    assert values({"tie": ["index", "keep", "index"]}, "tie", "x", layer) == read


@pytest.mark.parametrize(("layer", "read"), [(0, True), (3, True), (4, False)])
def test_lists_of_flags_pick_and_do_not_interpolate(layer, read):
    assert values({"normalize": [True, False]}, "normalize", "x", layer) is read
    assert values({"normalize": [1, 0]}, "normalize", "x", layer) is read


def test_scopes_fall_through_from_model_to_top_to_default():
    recipe = read_recipe(
        ties(
            models=[
                {"model": "a", "parameters": {"weight": 1, "density": [{"filter": "mlp", "value": 0.1}]}},
                {"model": "b", "parameters": {"weight": 1, "density": 0.2}},
                {"model": "c", "parameters": {"weight": 1}},
            ],
            parameters={"density": [{"filter": "attn", "value": 0.3}, {"filter": "mlp", "value": 0.4}]},
        )
    )
    assert recipe.resolve("mlp", None, 1)["density"] == [0.1, 0.2, 0.4]
    assert recipe.resolve("attn", None, 1)["density"] == [0.3, 0.2, 0.3]
    assert recipe.resolve("norm", None, 1)["density"] == [1.0, 0.2, 1.0]


def test_a_missing_weight_names_model_and_tensor():
    recipe = read_recipe(
        ties(models=[{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}}])
    )
    assert recipe.resolve("mlp", None, 1)["weight"] == [1.0]
    with pytest.raises(RecipeError) as caught:
        recipe.resolve("norm.weight", None, 1)
    assert str(caught.value) == (
        "recipe: models[0].parameters.weight ('a'): ties needs one for tensor 'norm.weight', and neither the "
        "model's nor the top-level parameters give it"
    )


def test_a_recipe_is_frozen():
    recipe = read_recipe(ties())
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
