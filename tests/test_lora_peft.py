"""Adapters that PEFT saved, merged by the engine and by PEFT's merge_and_unload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pykernels.adapters.compose import compose
from pykernels.adapters.extract import extract
from pykernels.engine.recipe import adapter_recipe
from pykernels.engine.run import merge
from pykernels.engine.verify import verify
from tests.checkpoints import load, same
from tests.peft_models import KINDS, Kind, merged_by_peft, read_base, with_adapters, write_adapter, write_base

pytestmark = pytest.mark.filterwarnings("ignore")
TIED = Kind("tied", {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True})
CASES = [(name, count) for name, kind in KINDS.items() for count in range(1, kind.most + 1)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and adapters, made when first asked for."""
    return tmp_path_factory.mktemp("peft")


def made(home: Path, name: str, count: int) -> tuple[Path, list[Path]]:
    """The base of a kind and ``count`` adapters of it."""
    kind = KINDS[name]
    base = home / kind.model
    if not base.exists():
        write_base(kind.model, base)
    paths = [home / f"{name} {i}" for i in range(count)]
    for i, path in enumerate(paths):
        if not path.exists():
            write_adapter(kind, base, path, seed=i + 1)
    return base, paths


def ours(base: Path, adapters: list[Path], out: Path, rounding: str) -> dict[str, torch.Tensor]:
    """The engine's merge, which ``verify`` must find right."""
    merge(adapter_recipe(str(base), [str(a) for a in adapters], rounding=rounding), out)
    report = verify(out)
    assert report.ok and report.recomputed, str(report)
    return load(out)


@pytest.mark.parametrize(("name", "count"), CASES, ids=[f"{n}-{count}" for n, count in CASES])
def test_peft_s_bits_and_nearer_to_float64(home, tmp_path, name, count):
    base, adapters = made(home, name, count)
    kind = KINDS[name]
    theirs = merged_by_peft(kind, base, adapters, tmp_path / "theirs")
    assert same(ours(base, adapters, tmp_path / "peft", "peft"), theirs)
    once = ours(base, adapters, tmp_path / "once", "once")
    truth = merged_by_peft(kind, base, adapters, tmp_path / "truth", torch.float64)
    assert once.keys() == truth.keys()
    for key, exact in truth.items():
        # Half a unit of bfloat16, and what sums of a few float32 terms below 64 may be off.
        half = torch.ldexp(torch.tensor(2.0**-9), torch.frexp(exact).exponent)
        assert ((once[key] - exact).abs() <= half + 2.0**-17).all(), key
        assert (once[key] - exact).abs().sum() <= (theirs[key] - exact).abs().sum() + 2.0**-17, key
    assert not same(once, load(base))


def test_a_head_that_is_kept_tied_is_changed_once(tmp_path):
    """PEFT 0.21.2 adds both halves to the one tensor that they share; the adapter itself acts once."""
    kind = TIED
    write_base("tied", tmp_path / "base", torch.float32)
    write_adapter(kind, tmp_path / "base", tmp_path / "adapter", dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        truth = with_adapters(kind, tmp_path / "base", [tmp_path / "adapter"], torch.float64)(ids).logits
        ours(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "once")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
        twice = with_adapters(kind, tmp_path / "base", [tmp_path / "adapter"], torch.float64)
        theirs = twice.merge_and_unload()(ids).logits
    error = (merged(ids).logits - truth).norm() / truth.norm()
    assert error < 1e-6 < 0.2 < (theirs - truth).norm() / truth.norm()


def test_halves_that_training_parted_are_refused(tmp_path):
    """PEFT 0.21.2 casts the adapters of a bfloat16 base to float32, each on its own, which unties them."""
    write_base("tied", tmp_path / "base")
    write_adapter(TIED, tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"lm_head.lora_A.weight' must be the transpose of .*_embedding_B'"):
        merge(adapter_recipe(str(tmp_path / "base"), [str(tmp_path / "adapter")]), tmp_path / "out")


def test_a_saved_head_unties(home, tmp_path):
    base, adapters = made(home, "tied, head saved", 1)
    merged = ours(base, adapters, tmp_path / "out", "once")
    assert "lm_head.weight" in merged and "lm_head.weight" not in load(base)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_grouped_convolutions_are_refused(tmp_path):
    write_base("conv", tmp_path / "base")
    write_adapter(Kind("conv", {"target_modules": ["grouped"]}), tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"grouped.lora_B.weight'.*a convolution of 2 groups"):
        merge(adapter_recipe(str(tmp_path / "base"), [str(tmp_path / "adapter")]), tmp_path / "out")


def test_float32_and_adapters_in_halves(tmp_path):
    """A base in float32 gets PEFT's bits; adapters in bfloat16 are widened, as PEFT loads them."""
    kind = KINDS["DoRA"]
    write_base("llama", tmp_path / "base", torch.float32)
    write_adapter(kind, tmp_path / "base", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    adapters = [tmp_path / "adapter"]
    theirs = merged_by_peft(kind, tmp_path / "base", adapters, tmp_path / "theirs", torch.float32)
    assert same(ours(tmp_path / "base", adapters, tmp_path / "out", "peft"), theirs)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_converted_residuals_belong_to_the_base(tmp_path, start):
    """What PEFT trained beside a residual and saved as a change of the base merges to the trained model."""
    write_base("llama", tmp_path / "base", torch.float32)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    model = get_peft_model(read_base("llama", tmp_path / "base", torch.float32), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation saves the start
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += torch.randn(parameter.shape) / 4
    model.save_pretrained(tmp_path / "residual")
    with pytest.raises(ValueError, match=f"init_lora_weights: '{start}': the adapter belongs to what"):
        merge(adapter_recipe(str(tmp_path / "base"), [str(tmp_path / "residual")]), tmp_path / "out")
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=tmp_path / "start")
    got = ours(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", "once")
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    for name, tensor in load(tmp_path / "theirs").items():
        assert (got[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_peft_loads_what_is_composed(tmp_path):
    """cat, and svd at the summed ranks, give the outputs of the dense composition."""
    kinds = [Kind("llama", {"target_modules": t}) for t in (["q_proj"], ["q_proj", "embed_tokens"])]
    write_base("llama", tmp_path / "base", torch.float32)
    parts = [str(tmp_path / f"{i}") for i in range(2)]
    for i, kind in enumerate(kinds):
        write_adapter(kind, tmp_path / "base", Path(parts[i]), i, torch.float32)
    ids = torch.arange(12)[None]
    merge(adapter_recipe(str(tmp_path / "base"), parts, (0.5, 2.0)), tmp_path / "both")
    with torch.no_grad():
        wanted = read_base("llama", tmp_path / "both", torch.float32)(ids).logits
        for method, rank in (("cat", None), ("svd", 4)):
            compose(parts, tmp_path / method, weights=(0.5, 2.0), method=method, rank=rank)
            got = with_adapters(kinds[0], tmp_path / "base", [tmp_path / method], torch.float32)(ids).logits
            assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_peft_loads_what_is_extracted(tmp_path):
    """Vectors that changed come with it, and one added to every row of a matrix is a change of rank 1."""
    write_base("llama", tmp_path / "base", torch.float32)
    tuned = read_base("llama", tmp_path / "base", torch.float32)
    ids = torch.arange(12)[None]
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in tuned.parameters():
            tensor += torch.randn(tensor.shape[-1]) / 4
        tuned.save_pretrained(tmp_path / "tuned")
        made = extract(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", rank=1)
        assert made.saved and made.biases
        peft = with_adapters(KINDS["linear"], tmp_path / "base", [tmp_path / "out"], torch.float32)
        wanted = tuned(ids).logits
        assert (peft(ids).logits - wanted).norm() < 1e-5 * wanted.norm()
