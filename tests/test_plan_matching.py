"""Which tensors make an output: aliases, buffers, what is copied, and every refusal by its message."""

from __future__ import annotations

import pytest
import torch

from pykernels.engine.files import FileError
from pykernels.engine.plan import PlanError, make_plan
from pykernels.engine.recipe import RecipeError, read_recipe
from tests.zoo import LLAMA, NO_HEAD, TIED, UNTIED, Zoo, by_name


@pytest.fixture
def zoo(tmp_path):
    return Zoo(tmp_path)


@pytest.fixture
def llamas(zoo):
    for name in ("base", "a", "b"):
        zoo.add(name, LLAMA, UNTIED)
    return zoo


# Aliases, buffers, tensors that are not averaged


def test_a_missing_head_is_read_from_the_embedding_that_the_config_ties(zoo):
    zoo.add("base", LLAMA, UNTIED)
    zoo.add("a", NO_HEAD, TIED)
    zoo.add("b", LLAMA, UNTIED)
    head = by_name(zoo.plan())["lm_head.weight"]
    assert [s.name for s in head.sources] == ["lm_head.weight", "model.embed_tokens.weight", "lm_head.weight"]
    assert head.alias_of is None
    assert "tensor 'lm_head.weight': tied, read from model.embed_tokens.weight in 'a'" in zoo.notes()


def test_a_config_that_does_not_say_ties(zoo):
    zoo.add("base", LLAMA, UNTIED)
    zoo.add("a", NO_HEAD, {"model_type": "gemma"})
    assert by_name(zoo.plan(tuned="a"))["lm_head.weight"].tuned[0].name == "model.embed_tokens.weight"


@pytest.mark.parametrize("config", [UNTIED, None, {"text_config": UNTIED}])
def test_a_missing_head_that_is_not_tied_is_an_error(zoo, config):
    zoo.add("base", LLAMA, UNTIED)
    zoo.add("a", NO_HEAD, config)
    assert zoo.refused(tuned="a") == (
        "the models do not fit together:\n- tensor 'lm_head.weight' of 'base' is missing in 'a'"
    )


def test_an_embedding_may_be_stored_under_the_name_of_the_head(zoo):
    zoo.add("base", NO_HEAD, TIED)
    zoo.add("a", {k: v for k, v in LLAMA.items() if "embed" not in k}, TIED)
    plan = zoo.plan(tuned="a")
    assert by_name(plan)["model.embed_tokens.weight"].tuned[0].name == "lm_head.weight"


def test_a_stored_copy_of_a_tied_head_is_dropped_after_a_check(zoo):
    zoo.add("base", NO_HEAD, TIED)
    zoo.add("a", LLAMA, TIED)
    plan = zoo.plan(tuned="a")
    assert "lm_head.weight" not in by_name(plan) and plan.dropped == ("lm_head.weight",)
    assert [(x.name, y.name) for x, y in plan.same] == [("lm_head.weight", "model.embed_tokens.weight")]
    assert "tensor 'lm_head.weight' of 'a': dropped, tied to 'model.embed_tokens.weight'" in zoo.notes(
        tuned="a"
    )


def test_a_head_of_its_own_has_no_place_in_a_tied_base(zoo):
    zoo.add("base", NO_HEAD, TIED)
    zoo.add("a", LLAMA, UNTIED)
    assert "tensor 'lm_head.weight' of 'a' is missing in 'base'" in zoo.refused(tuned="a")


def test_a_stored_copy_of_another_type_is_an_error(zoo):
    zoo.add("base", NO_HEAD, TIED)
    zoo.add("a", LLAMA, TIED, lm_head=torch.float32)
    assert (
        "'a' ties 'lm_head.weight' to 'model.embed_tokens.weight', but their types differ: F32 and BF16"
        in (zoo.refused(tuned="a"))
    )


def test_a_head_stored_beside_its_embedding_draws_the_same_masks(zoo):
    for name in ("base", "a"):
        zoo.add(name, LLAMA, TIED)
    head = by_name(zoo.plan("dare_ties", tuned="a"))["lm_head.weight"]
    assert head.alias_of == head.params["name"] == "model.embed_tokens.weight"


def test_a_head_that_one_model_does_not_tie_is_its_own(zoo):
    zoo.add("base", LLAMA, TIED)
    zoo.add("a", LLAMA, UNTIED)
    head = by_name(zoo.plan("dare_ties", tuned="a"))["lm_head.weight"]
    assert head.alias_of is None and head.params["name"] == "lm_head.weight"
    assert "the output's config may need tie_word_embeddings: false" in zoo.notes(tuned="a")


def test_buffers_that_loaders_compute_are_dropped(zoo):
    gpt = {"h.0.attn.weight": (4, 4), "h.0.attn.c_attn.bias": (4,)}
    mask = {"h.0.attn.bias": (1, 1, 6, 6), "h.0.attn.masked_bias": ()}
    rotary = {"h.0.rotary_emb.inv_freq": (2,), "h.1.inv_freq": (2,)}
    zoo.add("base", {**gpt, "h.0.rotary_emb.inv_freq": (2,)})
    zoo.add("a", {**gpt, **mask, **rotary})
    plan = zoo.plan(tuned="a")
    assert [o.name for o in plan.outputs] == ["h.0.attn.c_attn.bias", "h.0.attn.weight"]
    assert plan.dropped == (
        "h.0.attn.bias", "h.0.attn.masked_bias", "h.0.rotary_emb.inv_freq", "h.1.inv_freq",
    )  # fmt: skip
    assert "dropped, loaders compute them: 'h.0.attn.bias', 'h.0.attn.masked_bias', " in zoo.notes(tuned="a")


def test_an_attention_bias_of_another_shape_is_a_weight(zoo):
    for name in ("base", "a"):
        zoo.add(name, {"h.0.attn.bias": (12,)})
    assert [o.name for o in zoo.plan(tuned="a").outputs] == ["h.0.attn.bias"]


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn], ids=lambda d: str(d)[6:]
)
def test_what_cannot_be_averaged_is_copied_with_all_sources(zoo, dtype):
    for name in ("base", "a", "b"):
        zoo.add(name, {"ids.weight": (3,), "x.weight": (3,)}, ids=dtype)
    out = by_name(zoo.plan(dtype="float32"))["ids.weight"]
    assert (out.action, out.params, out.nbytes) == ("copy", {}, 3 * dtype.itemsize)
    assert out.dtype == out.sources[0].dtype != "F32" and [s.model for s in out.sources] == [2, 0, 1]
    linear = by_name(zoo.plan("linear", None, "a b"))["ids.weight"]
    assert linear.base is None and len(linear.tuned) == 2


@pytest.mark.parametrize(("one", "two"), [(torch.int8, torch.bfloat16), (torch.int8, torch.uint8)])
def test_types_that_do_not_meet_are_an_error(zoo, one, two):
    zoo.add("base", {"x.weight": (3,)}, default=one)
    zoo.add("a", {"x.weight": (3,)}, default=two)
    codes = {torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16"}
    assert zoo.refused(tuned="a") == (
        "the models do not fit together:\n- tensor 'x.weight' can be neither averaged nor copied, its types "
        f"differ: {codes[one]} in 'base', {codes[two]} in 'a' (averaged are F64, F32, F16, BF16)"
    )


def test_float_types_may_differ_and_the_base_decides(zoo):
    zoo.add("base", {"x.weight": (3,)}, default=torch.bfloat16)
    zoo.add("a", {"x.weight": (3,)}, default=torch.float16)
    assert zoo.plan(tuned="a").outputs[0].dtype == "BF16"
    assert zoo.plan("linear", "base", "a").outputs[0].dtype == "F16"
    assert "'x.weight' is written as bfloat16, mergekit writes float32; dtype decides" in zoo.notes(tuned="a")
    assert zoo.plan(tuned="a", dtype="float16", out_dtype="float64").outputs[0].nbytes == 24


# Refusals


def test_everything_that_does_not_fit_is_named_at_once(zoo):
    zoo.add("base", {"x.weight": (3, 2), "y.weight": (3,), "z.weight": ()})
    zoo.add("a", {"x.weight": (2, 3), "z.weight": ()})
    zoo.add("b", {"x.weight": (3, 2), "y.weight": (3,), "z.weight": (), "more\n.weight": (1,)})
    assert zoo.refused() == (
        "the models do not fit together:\n"
        "- tensor 'x.weight' has different shapes: [3, 2] in 'base', [2, 3] in 'a', [3, 2] in 'b'\n"
        "- tensor 'y.weight' of 'base' is missing in 'a'\n"
        "- tensor 'more\\n.weight' of 'b' is missing in 'base'"
    )


def test_many_problems_are_cut(zoo):
    zoo.add("base", {f"l.{i}.weight": (1,) for i in range(30)})
    zoo.add("a", {"l.0.weight": (1,)})
    message = zoo.refused(tuned="a")
    assert message.count("\n") == 9 and message.endswith("\n- and 21 more")


def test_the_shape_of_a_base_that_is_not_merged_counts(zoo):
    zoo.add("base", {"x.weight": (3,)})
    zoo.add("a", {"x.weight": (4,)})
    assert "different shapes: [4] in 'a', [3] in 'base'" in zoo.refused("linear", "base", "a")


def test_an_unknown_model_lists_those_beside_it(llamas):
    message = llamas.refused(tuned="a bb")
    assert message.startswith("recipe: models[1].model: ")
    assert "did you mean b? Known: a, b, base" in message
    assert llamas.refused(base="bsae").startswith("recipe: base_model: ")


def test_an_unknown_model_with_nothing_beside_it(zoo):
    recipe = zoo.recipe("linear", None, ["none/such"])
    with pytest.raises(PlanError, match=r"models\[0\].model: .*none/such': no such directory"):
        make_plan(read_recipe(recipe))


def test_a_model_named_in_two_ways_is_an_error(llamas):
    recipe = llamas.recipe("ties", "base", ["a"])
    recipe["models"].append({"model": f"{llamas.home}/./a"})
    with pytest.raises(
        PlanError, match=r"models\[1\].model: .* is the same directory as .*; name a model in one"
    ):
        make_plan(read_recipe(recipe))


def test_faulty_files_and_configs_are_named(llamas):
    (llamas.home / "a/config.json").write_text("[1]")
    assert "a/config.json': must be a JSON object of at most" in llamas.refused()
    (llamas.home / "a/config.json").write_text("{")
    assert "a/config.json': must be a JSON object" in llamas.refused()
    (llamas.home / "a/config.json").unlink()
    (llamas.home / "a/config.json").symlink_to("/etc/hostname")
    assert "leads out of the model directory" in llamas.refused()
    (llamas.home / "a/config.json").unlink()
    (llamas.home / "a/model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(FileError, match=r"a/model\.safetensors.*git-LFS pointer"):
        llamas.plan()


def test_a_parameter_without_a_value_is_found_while_planning(llamas):
    with pytest.raises(RecipeError, match=r"linear needs one for tensor 'lm_head\.weight'"):
        llamas.plan("linear", None, parameters={"weight": [{"filter": "model.", "value": 1}]})


def test_linear_with_nothing_but_zeros_is_an_error(llamas):
    message = llamas.refused(
        "linear", None, parameters={"weight": [{"filter": "norm", "value": 0}, {"value": 1}]}
    )
    assert message == "recipe: tensor 'model.norm.weight': every weight is 0, so linear has nothing to merge"


def test_shard_size_must_be_positive(llamas):
    assert llamas.refused(shard_size=0) == "shard size must be at least 1 byte, got 0"
