"""rounding="peft" against the layers of PEFT themselves, bit for bit; "once" nearer to float64 than they."""

from __future__ import annotations

import pytest
import torch

import pykernels as pk
from pykernels import LoRA
from pykernels.ops import merge_lora_peft
from tests.bounds import assert_same_bits
from tests.cases import DTYPES, SHORT
from tests.lora_cases import adapter, truth, weight

peft = pytest.importorskip("peft")


def layer(w: torch.Tensor, adapters: list[LoRA], fan_in_fan_out: bool = False) -> torch.nn.Module:
    """A layer of PEFT with these very tensors, nothing merged yet."""
    from peft.tuners.lora.layer import Linear

    rows, cols = reversed(w.shape) if fan_in_fan_out else w.shape
    base = torch.nn.Linear(cols, rows, bias=False, device="meta")
    base.weight = torch.nn.Parameter(w.clone())
    made: Linear | None = None
    for i, a in enumerate(adapters):
        options = {"r": len(a.A), "lora_alpha": 1}
        dora = a.magnitude is not None
        config = peft.LoraConfig(**options, use_dora=dora, fan_in_fan_out=fan_in_fan_out)
        if made is None:
            made = Linear(base, str(i), config=config, **options)
        else:
            made.update_layer(str(i), options["r"], lora_alpha=1, config=config)
        made.lora_A[str(i)].weight.data = a.A.clone()
        made.lora_B[str(i)].weight.data = a.B.clone()
        made.scaling[str(i)] = a.scaling
        if a.magnitude is not None:
            made.lora_magnitude_vector[str(i)].weight.data = a.magnitude.clone()
    assert made is not None
    return made


def merged_by_peft(w: torch.Tensor, adapters: list[LoRA], fan_in_fan_out: bool = False) -> torch.Tensor:
    """What ``merge`` of a layer leaves in its weight."""
    made = layer(w, adapters, fan_in_fan_out)
    made.merge(adapter_names=[str(i) for i in range(len(adapters))])
    return made.get_base_layer().weight.data


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("dora", ["", "0", "1", "012", "02"])
@pytest.mark.parametrize("kind", DTYPES, ids=lambda d: f"adapter-{SHORT[d]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
def test_the_bits_of_peft(dtype, kind, dora, fan):
    w = weight(24, 40, dtype, fan_in_fan_out=fan)
    adapters = [
        adapter(24, 40, 2 + i, 10 * i, dora=str(i) in dora, dtype=kind if i else torch.float32)
        for i in range(3)
    ]
    got = pk.merge_lora(w, adapters, fan_in_fan_out=fan, rounding="peft")
    assert_same_bits(got, merged_by_peft(w, adapters, fan))


def test_the_bits_of_peft_on_a_larger_layer():
    w = weight(300, 500, torch.bfloat16)
    adapters = [adapter(300, 500, 16, 0), adapter(300, 500, 64, 10, dtype=torch.bfloat16)]
    assert_same_bits(pk.merge_lora(w, adapters, rounding="peft"), merged_by_peft(w, adapters))
    out = w.clone()
    assert pk.merge_lora(out, adapters, rounding="peft", out=out) is out
    assert_same_bits(out, merged_by_peft(w, adapters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=SHORT.get)
def test_rounding_once_is_nearer_to_float64(dtype):
    w, adapters = weight(256, 256, dtype), [adapter(256, 256, 16, 10 * i) for i in range(8)]
    exact = truth(w, adapters)

    def error(merged: torch.Tensor) -> float:
        return float((merged.double() - exact).abs().mean())

    once = error(pk.merge_lora(w, adapters))
    assert error(merged_by_peft(w, adapters)) > 1.5 * once
    assert error(merged_by_peft(w, adapters[:1])) > 0  # one adapter differs in no rounding but its delta's


def test_magnitudes_are_those_of_peft():
    """In float32 both are near the truth: the norm is that of the weight before anything was merged."""
    w, adapters = weight(30, 50, torch.float32), [adapter(30, 50, 3, 10 * i, dora=True) for i in range(2)]
    theirs = merged_by_peft(w, adapters)
    torch.testing.assert_close(pk.merge_lora(w, adapters), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fan", [False, True], ids=["out-in", "in-out"])
def test_pieces_have_the_bits_of_the_whole(fan, monkeypatch):
    w = weight(9, 20, torch.bfloat16, fan_in_fan_out=fan)
    adapters = [adapter(9, 20, 3, 0, dtype=torch.bfloat16), adapter(9, 20, 2, 10)]
    whole = merge_lora_peft.Layer(w, fan)
    for a in adapters:
        whole.merge(merge_lora_peft.delta(a.A, a.B, a.scaling, fan), None)
    monkeypatch.setattr(merge_lora_peft, "_PIECE", 40)
    assert_same_bits(pk.merge_lora(w, adapters, fan_in_fan_out=fan, rounding="peft"), whole.weight)
