"""Parameters: what may be written, what every refusal says, and the value for a tensor."""

from __future__ import annotations

import pytest

from pykernels.engine.recipe import RecipeError, read_recipe
from pykernels.engine.settings import reader
from pykernels.methods import Method
from tests.test_recipe import refused, ties


def values(
    parameters: dict[str, object], name: str, tensor: str, layer: int | None, layers: int = 5
) -> object:
    """One resolved parameter of a ties recipe; per model it is the first model's."""
    recipe = read_recipe(ties(parameters={"weight": 1.0, **parameters}, models=[{"model": "a"}]))
    found = recipe.resolve(tensor, layer, layers)[name]
    return found[0] if isinstance(found, list) else found


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


def test_a_method_row_with_a_default_of_no_known_kind_is_a_fault_of_the_table():
    with pytest.raises(TypeError, match="parameter gamma of odd has a default of an unknown kind: None"):
        reader(Method("odd", "no paper", True, {}, {"gamma": None}), "gamma")


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


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_methods_that_do_not_rescale_accept_false_only(method):
    recipe = read_recipe(ties(merge_method=method, parameters={"rescale": False}))
    assert recipe.resolve("x", None, 1)["rescale"] is None
    for written in (True, "density", "l1", "no"):
        assert "parameters.rescale: must be false, as only the dare methods rescale here, got" in refused(
            ties(merge_method=method, parameters={"rescale": written})
        )
