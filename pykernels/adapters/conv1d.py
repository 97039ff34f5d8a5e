"""Layers that store [in, out]: GPT-2's Conv1D, which an adapter's keys do not tell from a linear layer."""

from __future__ import annotations

MODEL_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
"""The Conv1D of those models; their heads and whatever else they hold store [out, in]."""


def is_conv1d(model_type: str, module: str) -> bool | None:
    """Whether the layer at ``module`` stores [in, out]; None where the type of the model does not say."""
    return module.rpartition(".")[2] in LAYERS if model_type in MODEL_TYPES else None
