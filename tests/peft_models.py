"""Small models of every kind that PEFT's LoRA targets, and adapters of them that PEFT itself saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.checkpoints import load

_SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_LLAMA = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
_QUIET = {"bos_token_id": None, "eos_token_id": None}


class Convolutions(torch.nn.Module):
    """Every convolution, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.square = torch.nn.Conv2d(6, 8, 3)
        self.point = torch.nn.Conv2d(8, 10, 1)
        self.line = torch.nn.Conv1d(10, 12, 3)
        self.cube = torch.nn.Conv3d(4, 6, (3, 2, 1))
        self.linear = torch.nn.Linear(5, 7)
        self.grouped = torch.nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Never called: merging needs none."""
        raise NotImplementedError


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, attention_bias=True, tie_word_embeddings=False)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8, **_QUIET)
    ),
    "gpt2, own head": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8, tie_word_embeddings=False, **_QUIET
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_LLAMA, num_local_experts=3)),
    "qwen": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_LLAMA, num_experts=3, moe_intermediate_size=8)),
    "oss": lambda: GptOssForCausalLM(GptOssConfig(**_LLAMA, num_local_experts=3, **_QUIET)),
    "conv": Convolutions,
}
"""Mixtral's and Qwen's checkpoints hold a matrix per expert, GPT-OSS one tensor [experts, in, out]."""


@dataclass(frozen=True)
class Kind:
    """A model and what PEFT trains of it; ``most``: adapters that PEFT can merge into it at once."""

    model: str
    config: dict[str, Any] = field(hash=False)
    most: int = 2


_LINEAR = {"target_modules": ["q_proj", "down_proj"]}
_CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
_CONV = {"target_modules": ["square", "point", "line", "cube", "linear"]}
_BOTH = {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
_ONE = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.down_proj"],
    "rank_pattern": {"experts.down_proj": 4},
}

KINDS = {
    "linear": Kind("llama", _LINEAR),
    "rank and alpha patterns, rsLoRA": Kind(
        "llama",
        {
            **_LINEAR,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3, "proj": 5},
            "alpha_pattern": {"^model.layers.0": 7, "down_proj": 1},
        },
    ),
    "all linear but for some": Kind("llama", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "DoRA": Kind("llama", {**_LINEAR, "use_dora": True}),
    "embedding": Kind("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, DoRA": Kind("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding and head": Kind("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "modules to save": Kind("llama", {**_LINEAR, "modules_to_save": ["lm_head", "norm"]}, 1),
    "trainable tokens": Kind("llama", {**_LINEAR, "trainable_token_indices": [1, 7]}, 1),
    "tokens of both": Kind(
        "llama", {**_LINEAR, "trainable_token_indices": {"embed_tokens": [0], "lm_head": [39, 2]}}, 1
    ),
    "lora_bias": Kind("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
    "bias all": Kind("llama", {"target_modules": ["q_proj"], "bias": "all"}, 1),
    "bias lora_only": Kind("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}, 1),
    "tied embedding": Kind("tied", {"target_modules": ["embed_tokens"]}),
    "tied, head targeted": Kind("tied", {"target_modules": ["lm_head"]}),
    "tied, tokens": Kind("tied", {**_LINEAR, "trainable_token_indices": [3]}, 1),
    "tied, head saved": Kind("tied", {**_LINEAR, "modules_to_save": ["lm_head"]}, 1),
    "Conv1D": Kind("gpt2", _CONV1D),
    "Conv1D, DoRA": Kind("gpt2", {**_CONV1D, "use_dora": True}),
    "Conv1D, bias all": Kind("gpt2", {**_CONV1D, "bias": "all"}, 1),
    "Conv1D and a linear head": Kind("gpt2, own head", {"target_modules": ["c_proj", "lm_head"]}),
    "convolutions": Kind("conv", _CONV),
    "convolutions, DoRA": Kind("conv", {**_CONV, "use_dora": True}),
    "experts of Mixtral": Kind("mixtral", _BOTH),
    "router of Mixtral": Kind("mixtral", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "router and experts of Mixtral": Kind(
        "mixtral", {"target_modules": [], "target_parameters": ["gate.weight", "experts.down_proj"]}
    ),
    "router of Qwen": Kind("qwen", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "experts of Qwen": Kind("qwen", _BOTH),
    "experts of Qwen, one parameter": Kind("qwen", _ONE),
    "experts in one tensor": Kind("oss", _BOTH),
    "experts in one tensor, one parameter": Kind("oss", _ONE),
}


def write_base(name: str, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """One of MODELS with random weights, as transformers saves it."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    if name == "conv":
        path.mkdir(parents=True)
        save_file(model.state_dict(), path / "model.safetensors")
    else:
        model.save_pretrained(path)


def read_base(name: str, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model in memory."""
    if name == "conv":
        model = MODELS[name]().to(dtype)
        model.load_state_dict(load_file(path / "model.safetensors"))
        return model
    return type(MODELS[name]()).from_pretrained(path, dtype=dtype)


def write_adapter(
    kind: Kind, base: Path, path: Path, seed: int = 1, dtype: torch.dtype = torch.bfloat16
) -> None:
    """An adapter with random values in everything that it trains, saved by PEFT."""
    model = read_base(kind.model, base, dtype)
    made = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 3, **kind.config}))
    torch.manual_seed(seed)
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape).to(parameter.dtype)
            parameter.data.copy_(parameter.data * (1 + noise / 8) if "magnitude" in name else noise)
    made.save_pretrained(path)


def with_adapters(kind: Kind, base: Path, adapters: list[Path], dtype: torch.dtype) -> PeftModel:
    """PEFT's model with adapters "0", "1" ..."""
    model = PeftModel.from_pretrained(read_base(kind.model, base, dtype), adapters[0], adapter_name="0")
    for i, path in enumerate(adapters[1:], 1):
        model.load_adapter(path, adapter_name=str(i))
    return model


def merged_by_peft(
    kind: Kind, base: Path, adapters: list[Path], out: Path, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """merge_and_unload in ``dtype``, as a checkpoint's tensors."""
    model = with_adapters(kind, base, adapters, dtype)
    merged = model.merge_and_unload(adapter_names=[str(i) for i in range(len(adapters))])
    if kind.model == "conv":
        return dict(merged.state_dict())
    merged.save_pretrained(out)
    return load(out)
