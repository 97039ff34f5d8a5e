"""Adapters composed and extracted: what PEFT loads from them, the printed errors, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pykernels.adapters.compose import compose
from pykernels.adapters.extract import extract
from pykernels.cli import main
from pykernels.engine.recipe import adapter_recipe
from pykernels.engine.run import merge
from pykernels.ops.compose_lora import merged_delta
from tests.adapter_files import PREFIX, factors, write_adapter
from tests.checkpoints import load, write_model

DENSE = ("ties", "dare_ties", "dare_linear", "magnitude_prune")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters of different ranks; the second changes an embedding and a convolution too."""
    path = tmp_path_factory.mktemp("compose")
    state = {name: torch.randn(shape) for name, shape in (("q.weight", (40, 30)), ("k.weight", (20, 30)))}
    state |= {"embed_tokens.weight": torch.randn(50, 16), "c.weight": torch.randn(8, 6, 3, 3)}
    state |= {"norm.weight": torch.ones(30), "q.bias": torch.zeros(40), "n": torch.tensor(3)}
    write_model(path / "base", state, tie_word_embeddings=False)
    write_adapter(
        path / "a", {**factors("q", 40, 30, 2, 1), **factors("k", 20, 30, 2, 2)}, r=2, use_rslora=True
    )
    tensors = {
        **factors("q", 40, 30, 3, 3),
        "embed_tokens.lora_embedding_A": torch.randn(3, 50),
        "embed_tokens.lora_embedding_B": torch.randn(16, 3),
        "c.lora_A.weight": torch.randn(3, 6, 3, 3),
        "c.lora_B.weight": torch.randn(8, 3, 1, 1),
    }
    write_adapter(path / "b", tensors, r=3, base_model_name_or_path="base")
    return path


def merged(
    home: Path, out: Path, *adapters: Path, weights: tuple[float, ...] = ()
) -> dict[str, torch.Tensor]:
    """The base with adapters."""
    merge(adapter_recipe(str(home / "base"), [str(a) for a in adapters], weights), out)
    return load(out)


def product(adapter: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """B @ A of a module."""
    return adapter[f"{PREFIX}{module}.lora_B.weight"] @ adapter[f"{PREFIX}{module}.lora_A.weight"]


@pytest.mark.parametrize("how", [{"method": "cat"}, {"method": "svd", "rank": 5}], ids=["cat", "svd"])
def test_exact_compositions_merge_to_what_their_parts_do(home, tmp_path, how):
    weights = (0.7, -1.5)
    made = compose([str(home / "a"), str(home / "b")], tmp_path / "c", weights=weights, **how)
    assert max(made.errors.values()) < 2e-6 and len(made.errors) == 4
    wanted = merged(home, tmp_path / "parts", home / "a", home / "b", weights=weights)
    for name, tensor in merged(home, tmp_path / "whole", tmp_path / "c").items():
        assert torch.allclose(tensor.float(), wanted[name].float(), atol=1e-4), name
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["alpha_pattern"] == config["rank_pattern"]
    assert config["base_model_name_or_path"] is None  # they do not agree on it


@pytest.mark.parametrize("method", DENSE)
def test_methods_on_deltas_print_their_error(home, tmp_path, method):
    def run(rank: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        out = tmp_path / f"r{rank}"
        made = compose([str(home / "a"), str(home / "b")], out, method=method, rank=rank, density=0.5, seed=3)
        return made.errors, load(out)

    few, many = run(2), run(30)
    assert all(few[0][m] > many[0][m] for m in ("q", "k")) and many[0]["q"] < 2e-6
    dense, near = product(many[1], "q"), product(few[1], "q")
    singular = torch.linalg.svdvals(dense)
    best = singular[2:].norm() / singular.norm()
    assert few[0]["q"] == pytest.approx(float((near - dense).norm() / dense.norm()), rel=1e-4)
    assert few[0]["q"] == pytest.approx(float(best), rel=1e-2)


def dense_of(path: Path, module: str, scaling: float) -> torch.Tensor:
    """An adapter's change of a module, float64."""
    return scaling * product({key: tensor.double() for key, tensor in load(path).items()}, module)


@pytest.mark.parametrize("exact", [512, 4], ids=["whole", "by iteration"])
@pytest.mark.parametrize("method", ["svd", "ties", "magnitude_prune"])
def test_what_is_printed_is_within_a_hundredth_of_the_best(home, tmp_path, monkeypatch, method, exact):
    """Of the rank, from float64 alone: the method on dense deltas, their singular values, and the text."""
    monkeypatch.setattr("pykernels.ops.low_rank_svd.EXACT", exact)
    weights, rank = (1.5, -0.5), 3
    deltas = [dense_of(home / "a", "q", 6 / 2**0.5), dense_of(home / "b", "q", 6 / 3)]
    options: list[object] = ["--method", method, "--rank", rank, "--weight", 1.5, "--weight", -0.5]
    wanted = sum(w * d for w, d in zip(weights, deltas, strict=True))
    if method != "svd":
        options += ["--density", 0.3]
        narrow = [d.float() for d in deltas]
        wanted = merged_delta(method, narrow, list(weights), 0.3, 0).double()
    arguments = ["lora", "compose", home / "a", home / "b", tmp_path / "out", *options]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    [line] = [line for line in result.output.splitlines() if line.startswith("q: relative error ")]
    singular = torch.linalg.svdvals(wanted)
    best = float(singular[rank:].norm() / singular.norm())
    got = float((dense_of(tmp_path / "out", "q", 1.0) - wanted).norm() / wanted.norm())
    assert best * (1 - 1e-6) <= got <= 1.01 * best
    assert float(line.rsplit(" ", 1)[1]) == pytest.approx(got, rel=6e-3)  # three digits


@pytest.mark.parametrize("method", ["cat", "svd", "peft_linear"])
def test_errors_of_sums_are_those_of_the_dense_deltas(home, tmp_path, method):
    found = compose([str(home / "a")] * 2, tmp_path / "out", method=method, weights=(0.3, 2.0))
    made, parts = load(tmp_path / "out"), load(home / "a")
    scaling = json.loads((home / "a" / "adapter_config.json").read_text())["lora_alpha"] / 2**0.5
    for module in ("q", "k"):
        exact = 2.3 * scaling * product({k: v.double() for k, v in parts.items()}, module)
        off = product({k: v.double() for k, v in made.items()}, module) - exact
        assert found.errors[module] == pytest.approx(float(off.norm() / exact.norm()), rel=1e-3, abs=1e-12)
    assert (max(found.errors.values()) < 1e-6) == (method != "peft_linear")


def test_masks_differ_between_modules_and_seeds(home, tmp_path):
    both = {**factors("q", 40, 30, 2, 1), "k.lora_A.weight": factors("q", 40, 30, 2, 1)["q.lora_A.weight"]}
    both["k.lora_B.weight"] = both["q.lora_B.weight"]
    path = write_adapter(tmp_path / "twice", both, r=2)
    found = []
    for seed in (1, 1, 2):
        out = tmp_path / f"{len(found)}"
        compose([str(path)], out, method="dare_linear", rank=30, density=0.5, seed=seed)
        state = load(out)
        found.append(
            [state[f"{PREFIX}{m}.lora_B.weight"] @ state[f"{PREFIX}{m}.lora_A.weight"] for m in "qk"]
        )
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-3)


def test_an_embedding_s_copy_of_its_base_is_kept(tmp_path):
    tensors = {
        "embed_tokens.base_layer.weight": torch.ones(50, 16).bfloat16(),
        "embed_tokens.lora_embedding_A": torch.randn(4, 50),
        "embed_tokens.lora_embedding_B": torch.randn(16, 4),
    }
    one, two = (str(write_adapter(tmp_path / n, tensors)) for n in ("one", "two"))
    compose([one, two], tmp_path / "out")
    assert load(tmp_path / "out")[f"{PREFIX}embed_tokens.base_layer.weight"].dtype == torch.bfloat16
    tensors["embed_tokens.base_layer.weight"] = torch.zeros(50, 16).bfloat16()
    three = str(write_adapter(tmp_path / "three", tensors))
    with pytest.raises(ValueError, match=r"base_layer.weight': differs from the copy in"):
        compose([one, three], tmp_path / "new")


def test_what_is_not_composed_is_refused(home, tmp_path):
    def refused(*paths: Path, **options: Any) -> str:
        with pytest.raises(ValueError) as error:
            compose([str(p) for p in paths], tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    good = factors("q", 40, 30)
    half = write_adapter(tmp_path / "half", {"q.lora_A.weight": torch.ones(4, 30)})
    assert "has no lora_B beside it" in refused(half)
    other = write_adapter(tmp_path / "other", factors("q", 40, 31))
    assert "[4, 31] does not fit [2, 30] of" in refused(home / "a", other)
    assert "must have rank 9 of the config" in refused(write_adapter(tmp_path / "r", good, r=9))
    good["q.lora_B.weight"][1, 2] = torch.inf
    bad = write_adapter(tmp_path / "bad", good)
    assert "q.lora_B.weight': holds NaN or infinite elements" in refused(home / "a", bad)
    assert "give one per adapter, 1, or none; got 2" in refused(home / "a", weights=(1, 2))
    assert "density must be given with method 'ties'" in refused(home / "a", method="ties")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="exists and is no empty directory"):
        compose([str(home / "a")], tmp_path / "full")
    with pytest.raises(ValueError, match="is an input"):
        compose([str(home / "a")], home / "a")


def test_a_fault_while_writing_leaves_nothing(home, tmp_path, monkeypatch):
    def full(*rest: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pykernels.adapters.write.json.dumps", full)
    with pytest.raises(OSError, match="No space"):
        compose([str(home / "a")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def tuned(home: Path, path: Path, **changed: torch.Tensor) -> Path:
    """The base with a change of rank 3 in every matrix, a changed norm and bias, and ``changed``."""
    random = torch.Generator().manual_seed(2)
    state = load(home / "base")
    for name, tensor in state.items():
        if tensor.dim() > 1:
            rows, columns = tensor.shape[0], tensor[0].numel()
            delta = torch.randn(rows, 3, generator=random) @ torch.randn(3, columns, generator=random)
            state[name] = tensor + delta.view(tensor.shape)
    state["norm.weight"] = state["norm.weight"] + 1
    state["q.bias"] = state["q.bias"] + 1
    write_model(path, {**state, **changed}, tie_word_embeddings=False)
    return path


def test_extraction_at_the_rank_of_the_change(home, tmp_path):
    wanted = tuned(home, tmp_path / "tuned")
    found = extract(str(home / "base"), str(wanted), tmp_path / "out", rank=3)
    assert found.saved == ("norm",) and found.biases == ("q.bias",)
    assert set(found.ranks) == {"q", "k", "embed_tokens", "c"} and max(found.errors.values()) < 2e-6
    for name, tensor in merged(home, tmp_path / "merged", tmp_path / "out").items():
        assert torch.allclose(tensor.float(), load(wanted)[name].float(), atol=1e-4), name


def test_extraction_of_less_is_the_nearest(home, tmp_path):
    wanted = tuned(home, tmp_path / "tuned")
    found = extract(str(home / "base"), str(wanted), tmp_path / "out", rank=2)
    delta = load(wanted)["q.weight"] - load(home / "base")["q.weight"]
    singular = torch.linalg.svdvals(delta)
    assert found.errors["q.weight"] == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-3)


def test_extraction_of_conv1d(tmp_path):
    """GPT-2 stores [in, out], and PEFT's A and B do not; its head is a linear layer."""
    shapes = {"h.c_attn": (6, 18), "h.c_proj": (6, 6), "lm_head": (9, 6)}
    tuned = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    for name, factor in (("base", 0.0), ("tuned", 1.0)):
        state = {key: value * factor for key, value in tuned.items()}
        write_model(tmp_path / name, state, model_type="gpt2", tie_word_embeddings=False)
    extract(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", rank=6)
    held, got = load(tmp_path / "out"), merged(tmp_path, tmp_path / "merged", tmp_path / "out")
    assert all(held[f"{PREFIX}{name}.lora_A.weight"].shape == (6, 6) for name in shapes)
    assert all(torch.allclose(got[key], value, atol=1e-5) for key, value in tuned.items())


def test_what_cannot_be_extracted_is_refused(home, tmp_path):
    def refused(path: Path, **options: Any) -> str:
        with pytest.raises(ValueError) as error:
            extract(str(home / "base"), str(path), tmp_path / "out", **{"rank": 2, **options})
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "rank must be an integer of at least 1, got 0" in refused(home / "base", rank=0)
    assert "no tensor differs, so there is no adapter to write" in refused(home / "base")
    assert "tensor 'n': a scalar changed" in refused(tuned(home, tmp_path / "n", n=torch.tensor(4)))
    shape = tuned(home, tmp_path / "shape", **{"k.weight": torch.ones(21, 30)})
    assert "tensor 'k.weight' must have shape [20, 30], as in the base, got [21, 30]" in refused(shape)
    write_model(tmp_path / "vectors", {**load(home / "base"), "norm.weight": torch.full((30,), 2.0)})
    assert "tensor 'norm.weight': only vectors changed" in refused(tmp_path / "vectors")
    bad = tuned(home, tmp_path / "bad", **{"k.weight": torch.full((20, 30), torch.nan)})
    assert "tensor 'k.weight': differs from the base's by NaN or infinite elements" in refused(bad)
    whole = tuned(home, tmp_path / "whole", **{"k.weight": torch.ones(20, 30, dtype=torch.int64)})
    assert "tensor 'k.weight': I64 changed, which no adapter holds" in refused(whole)
    more = tuned(home, tmp_path / "more", extra=torch.ones(2))
    assert "lacks tensor 'extra'" in refused(more)


def test_quantised_models_are_not_extracted(tmp_path):
    """Codes without their scales have no difference that means anything."""
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        state = {"q.weight": torch.full((8, 8), value).to(torch.float8_e4m3fn)}
        write_model(tmp_path / "codes" / name, state)
        write_model(tmp_path / "said" / name, {"q.weight": torch.full((8, 8), value)})
    (tmp_path / "said" / "tuned" / "config.json").write_text('{"quantization_config": {}}')
    for folder, says in (("codes", "'q.weight': F8_E4M3 changed"), ("said", "a quantization_config;")):
        with pytest.raises(ValueError, match=says):
            extract(*(str(tmp_path / folder / n) for n in ("base", "tuned")), tmp_path / "out", rank=1)


def test_differences_below_float32_are_seen(tmp_path):
    wide = torch.ones(8, 8, dtype=torch.float64)
    for name, value in (("base", 0.0), ("tuned", 1e-9)):
        write_model(tmp_path / name, {"q.weight": wide + value})
    made = extract(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", rank=1)
    assert made.errors["q.weight"] < 1e-6


def test_a_config_is_read_as_strictly_as_a_merge_s(home, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(home / "base", base)
    (base / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json': must be a JSON object"):
        extract(str(base), str(tuned(home, tmp_path / "tuned")), tmp_path / "out", rank=1)


def test_ranks_belong_to_whole_paths(tmp_path):
    """PEFT takes a name for the end of longer ones."""
    shapes = {"fc.weight": (40, 30), "l.fc.weight": (20, 30), "z.fc.weight": (20, 30)}
    write_model(tmp_path / "base", {name: torch.zeros(shape) for name, shape in shapes.items()})
    tensors = {**factors("fc", 40, 30, 2), **factors("l.fc", 20, 30, 3), **factors("z.fc", 20, 30, 3)}
    adapter = write_adapter(tmp_path / "a", tensors, r=3, lora_alpha=3, rank_pattern={"^fc": 2})
    compose([str(adapter)], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"] == {"^fc": 2}
    assert merged(tmp_path, tmp_path / "merged", tmp_path / "out").keys() == shapes.keys()


def test_experts_and_integers_have_no_form_here(tmp_path):
    for name, value in (("base", 0), ("tuned", 1)):
        state = {"mlp.experts.up_proj": torch.full((2, 3, 4), float(value)), "w": torch.tensor([value])}
        write_model(tmp_path / name, state)
        write_model(tmp_path / f"{name}2", {"w": torch.tensor([value])})
    with pytest.raises(ValueError, match=r"up_proj': \[2, 3, 4\] changed, and only weights of modules"):
        extract(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", rank=1)
    with pytest.raises(ValueError, match="tensor 'w': I64 changed, which no adapter holds"):
        extract(str(tmp_path / "base2"), str(tmp_path / "tuned2"), tmp_path / "out", rank=1)


def test_the_commands(home, tmp_path):
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["lora", *(str(a) for a in arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    a, b = home / "a", home / "b"
    text = run("compose", a, b, tmp_path / "c", "--method", "svd", "--rank", 4, "--weight", 1, "--weight", 2)
    assert "q: relative error 0." in text and "4 modules of rank 4" in text
    assert "4 modules of rank 2 to 5" in run("compose", a, b, tmp_path / "cat")
    text = run("extract", home / "base", tuned(home, tmp_path / "t"), tmp_path / "e", "--rank", 3)
    assert "norm: copied in full" in text and "c.weight: relative error " in text
