"""Which way a layer lies in its base: of equal sides the model's type tells, and kernels have their order."""

from __future__ import annotations

import pytest
import torch

from tests.adapter_files import PREFIX, factors, write_adapter
from tests.test_adapters import changes, planned, refused, stack


@pytest.mark.parametrize("said", [False, True])
def test_square_layers_go_by_the_model_s_type(tmp_path, said):
    """PEFT's flag is of the last layer that it wrapped, so it says nothing where a model has both kinds."""
    shapes = {"h.0.attn.c_proj.weight": (8, 8), "lm_head.weight": (6, 8), "score.weight": (8, 8)}
    base = stack(tmp_path, shapes, model_type="gpt2", tie_word_embeddings=False)
    layers = {**factors("h.0.attn.c_proj", 8, 8), **factors("lm_head", 6, 8), **factors("score", 8, 8)}
    plan = planned(base, write_adapter(tmp_path / "a", layers, fan_in_fan_out=said))
    assert [changes(plan, name)[0].transposed for name in shapes] == [True, False, False]


@pytest.mark.parametrize("said", [False, True])
def test_square_layers_of_a_model_of_both_kinds_are_refused(tmp_path, said):
    shapes = {"one.weight": (8, 8), "other.weight": (6, 8) if said else (8, 6)}
    base = stack(tmp_path, shapes)
    square = write_adapter(tmp_path / "square", factors("one", 8, 8), fan_in_fan_out=said)
    assert changes(planned(base, square), "one.weight")[0].transposed is said
    layers = {**factors("one", 8, 8), **factors("other", 6, 8)}
    text = refused(base, write_adapter(tmp_path / "both", layers, fan_in_fan_out=said))
    assert f"'{PREFIX}one.lora_A.weight': fan_in_fan_out is {str(said).lower()}, other layers" in text


@pytest.mark.parametrize(("model_type", "transposed"), [("gpt_oss", True), ("qwen3_moe", False)])
def test_square_experts_go_by_the_model_s_type(tmp_path, model_type, transposed):
    base = stack(tmp_path, {"mlp.experts.up_proj": (3, 8, 8)}, model_type=model_type)
    path = write_adapter(
        tmp_path / "a", factors("mlp.experts", 8, 8, rank=12), target_parameters=["experts.up_proj"]
    )
    [change] = changes(planned(base, path), "mlp.experts.up_proj")
    assert change.transposed is transposed


def test_convolutions_have_the_kernel_of_the_base(tmp_path):
    """[3, 1] and [1, 3] have as many places."""
    base = stack(tmp_path, {"conv.weight": (6, 8, 1, 3)})
    for kernel in ((1, 3), (3, 1), (3,)):
        tensors = {
            "conv.lora_A.weight": torch.ones(4, 8, *kernel),
            "conv.lora_B.weight": torch.ones(6, 4, 1, 1),
        }
        path = write_adapter(tmp_path / str(kernel), tensors)
        if kernel == (1, 3):
            assert len(changes(planned(base, path), "conv.weight")) == 1
        else:
            assert (
                "A must have shape [4, 8, 1, 3], as the convolution 'conv.weight' has [6, 8, 1, 3], got "
                f"{[4, 8, *kernel]}"
            ) in refused(base, path)
