"""A tiny Llama made, saved, merged, loaded and run by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pykernels
from pykernels.engine.run import merge
from pykernels.engine.verify import verify

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes with tied embeddings, saved in shards."""
    home = tmp_path_factory.mktemp("llamas")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=200, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(home / "base", max_shard_size="100KB")
    for i in range(2):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        base.save_pretrained(home / f"t{i}", max_shard_size="100KB")
    return home


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_merged_llama_loads_and_runs(llamas: Path, tmp_path: Path, method: str) -> None:
    density = {} if method in ("linear", "task_arithmetic") else {"density": 0.5}
    models = [{"model": str(llamas / f"t{i}"), "parameters": {"weight": 0.5, **density}} for i in range(2)]
    recipe = {
        "merge_method": method,
        "base_model": str(llamas / "base"),
        "models": models,
        "dtype": "float32",
    }
    merge(recipe, tmp_path / "out", shard_size="150KB")
    assert verify(tmp_path / "out", samples=2).ok
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", torch_dtype="auto")
    assert model.dtype == torch.float32
    logits = model(torch.arange(12)[None]).logits
    assert logits.shape == (1, 12, 200) and bool(logits.isfinite().all())
    if method == "ties":
        name = "model.layers.1.mlp.down_proj.weight"
        states = [
            transformers.AutoModelForCausalLM.from_pretrained(llamas / n, torch_dtype="auto").state_dict()[
                name
            ]
            for n in ("base", "t0", "t1")
        ]
        wanted = pykernels.ties_merge(states[0], states[1:], density=0.5, weight=0.5, out_dtype=torch.float32)
        assert torch.equal(model.state_dict()[name], wanted)
