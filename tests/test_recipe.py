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
        "elect": "weighted", "rescale": None, "int8_mask": False, "seed": 0, "name": "x",
    }  # fmt: skip


def test_one_line_of_text_is_yaml_and_not_a_path():
    assert read_recipe("{merge_method: linear, models: [{model: a}], parameters: {weight: 1}}").members == (
        0,
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_table_is_known(method):
    if METHODS[method].max_models is not None:
        one = {"merge_method": method, "models": [{"model": "a"}]}
        assert read_recipe(one).members == (0,)
        return
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
    assert "longer than 1000000 bytes" in refused("\n" + "\u00e9" * 500_001)
    assert "cannot be read: " in refused("x" * 5000)


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


def test_an_anchored_value_may_be_used_again():
    recipe = read_recipe("merge_method: &m linear\nmodels: [{model: *m}]\nparameters: {weight: 1}\n")
    assert recipe.models[0].model == "linear"


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
        (ties(tokenizer_source="union"), "tokenizer_source: only base is supported yet, got 'union'"),
        (ties(chat_template="auto"), "chat_template: not supported yet"),
        (ties(base_model=None), "base_model: ties merges differences to a base and needs one"),
        (ties(base_model="m+"), "base_model: 'm+': a + stands between a model and its adapters"),
        (ties(rounding="peft"), "rounding: is of adapters, and no model has any"),
        (ties(rounding="twice"), "rounding: must be 'once' or 'peft', got 'twice'"),
        (
            {"merge_method": "passthrough", "models": [{"model": "a"}, {"model": "b"}]},
            "models: passthrough takes 1 model, got 2",
        ),
        (ties(base_model=7), "base_model: must be text, got 7"),
        (
            ties(models=[{"model": "m+lora"}, {"model": "m+lora"}]),
            "models[1].model: 'm+lora' is listed twice, first as models[0]",
        ),
        (
            ties(models=[{"model": "m", "adapters": [{"adapter": 1}]}]),
            "models[0].adapters[0].adapter: must be",
        ),
        (
            ties(models=[{"model": "m", "adapters": [{"adapter": "a", "weight": float("inf")}]}]),
            "models[0].adapters[0].weight: ",
        ),
        (ties(models=None), "models: is missing"),
        (ties(base_model=""), "base_model: must not be empty, got ''"),
        (ties(models=[]), "models: must hold at least 1, got 0"),
        (ties(models="a"), "models: must be a list, got 'a'"),
        (ties(models=["a"]), "models[0]: must be a mapping with the key model, got 'a'"),
        (
            ties(models=[{"modle": "a"}]),
            "models[0].modle: unknown key; did you mean model? Known: adapters, model, param",
        ),
        (ties(models=[{"parameters": {}}]), "models[0].model: is missing"),
        (ties(models=[{"model": 1}]), "models[0].model: must be text, got 1"),
        (
            ties(models=[{"model": "a"}, {"model": "a"}]),
            "models[1].model: 'a' is listed twice, first as models[0]",
        ),
        (ties(models=[{"model": "base"}]), "models: nothing to merge besides the base 'base'"),
        (ties(models=[{"model": str(i)} for i in range(65)]), "models: must hold at most 64, got 65"),
        (ties(parameters=[1]), "parameters: must be a mapping, got [1]"),
        (
            ties(models=[{"model": "a", "parameters": 1}]),
            "models[0].parameters: must be a mapping, got 1",
        ),
        (ties(dtype="int8"), "dtype: unknown type 'int8'; Known: bfloat16, float16, float32, float64"),
        (ties(out_dtype="bf16"), "out_dtype: unknown type 'bf16'; "),
        (ties(scope="row"), "scope: must be 'tensor' or 'model', got 'row'"),
        (
            ties(merge_method="dare_ties", scope="model"),
            "scope: model is for methods that trim by magnitude; ",
        ),
        (ties(seed=-1), "seed: must be at least 0, got -1"),
        (ties(seed=2**64), "seed: must be at most 18446744073709551615, got"),
        (ties(seed=1.5), "seed: must be an integer, got 1.5"),
        (ties(seed=True), "seed: must be an integer, got True"),
        (
            ties(seed=1, parameters={"seed": 2}),
            "seed: stands at the top level and under parameters; keep one",
        ),
        (ties(tie="keep", parameters={"tie": "keep"}), "tie: stands at the top level and under parameters"),
        (
            ties(merge_method="linear", tie="keep"),
            "parameters.tie: no parameter of linear; Known: int8_mask, normalize, weight",
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


def test_adapters_of_a_model(tmp_path):
    (tmp_path / "a+b").mkdir()
    entry = {"model": "m", "adapters": [{"adapter": "x"}, {"adapter": "y", "weight": 0.5}]}
    written = [{"model": f"{tmp_path}/a+b+x+y"}, entry]
    recipe = read_recipe(ties(models=written, rounding="peft", parameters={"weight": 1}))
    assert [m.reference.model for m in recipe.models] == [f"{tmp_path}/a+b", "m"]
    assert [m.reference.adapters for m in recipe.models] == [
        (("x", 1.0), ("y", 1.0)),
        (("x", 1.0), ("y", 0.5)),
    ]
    assert recipe.models[1].reference.name == "m+x+y*0.5"
    assert read_recipe(recipe.as_dict()) == recipe


def test_the_tokenizer_may_be_asked_of_the_base():
    recipe = read_recipe(ties(tokenizer_source="base"))
    assert read_recipe(recipe.as_dict()).tokenizer_source == "base"


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
    with pytest.raises(RecipeError, match="seed: must be at least 0, got -3"):
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


def test_a_recipe_is_frozen():
    recipe = read_recipe(ties())
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
