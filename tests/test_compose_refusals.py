"""What a composition refuses, by file, tensor and reason, every rule once; and biases as deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pykernels.adapters.compose import compose
from pykernels.ops.compose_lora import merged_delta
from tests.adapter_files import PREFIX, factors, write_adapter
from tests.checkpoints import load

Given = tuple[dict[str, torch.Tensor], dict[str, Any]]

Q, K, EXPERTS = factors("q", 12, 10), factors("k", 12, 10), factors("m.experts", 12, 10, rank=8)
PLAIN: Given = (Q, {})
OTHER: Given = (K, {})
DORA: Given = ({**Q, "q.lora_magnitude_vector": torch.ones(12)}, {"use_dora": True})
BIASED: Given = ({**Q, "q.lora_B.bias": torch.ones(12)}, {"lora_bias": True})
STACK: Given = (EXPERTS, {"target_parameters": ["experts.up_proj"]})
SAVED: Given = ({**Q, "norm.weight": torch.ones(10)}, {"modules_to_save": ["norm"]})
ROWS = {"emb.token_adapter.trainable_tokens_delta": torch.ones(2, 10)}
TOKENS: Given = ({**Q, **ROWS}, {"trainable_token_indices": {"emb": [1, 3]}})
EMBEDDED = {"emb.lora_embedding_A": torch.ones(4, 20), "emb.lora_embedding_B": torch.ones(10, 4)}


def with_keys(given: Given, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Given:
    """``given`` with other tensors or settings."""
    return {**given[0], **(tensors or {})}, {**given[1], **config}


CASES: dict[str, tuple[list[Given], dict[str, Any], str]] = {
    "DoRA, svd": (
        [DORA],
        {"method": "svd"},
        "magnitude_vector': magnitudes of DoRA belong to the changed base's",
    ),
    "DoRA, ties": ([DORA], {"method": "ties", "density": 0.5}, "only cat keeps factors as they are"),
    "DoRA twice": ([DORA, DORA], {}, "the sum of its change and another is not low-rank"),
    "DoRA beside plain": (
        [DORA, OTHER],
        {},
        "has DoRA in all its modules or in none, and others have it here",
    ),
    "DoRA of the config only": (
        [with_keys(PLAIN, use_dora=True)],
        {},
        "use_dora is true, and the magnitude's",
    ),
    "magnitudes of another length": (
        [with_keys(DORA, {"q.lora_magnitude_vector": torch.ones(9)})],
        {},
        "must hold a magnitude per output, 12, got [9]",
    ),
    "bias of the config only": (
        [with_keys(PLAIN, lora_bias=True)],
        {},
        "lora_bias is true, and the bias of B",
    ),
    "bias of another length": (
        [with_keys(BIASED, {"q.lora_B.bias": torch.ones(9)})],
        {},
        "B.bias': must have shape [12], got [9]",
    ),
    "bias, peft_linear": ([BIASED], {"method": "peft_linear"}, "PEFT's linear leaves the bias of B out"),
    "bias that is no number": (
        [with_keys(BIASED, {"q.lora_B.bias": torch.full((12,), torch.nan)})],
        {},
        "q.lora_B.bias': holds NaN or infinite elements",
    ),
    "experts, peft_linear": ([STACK], {"method": "peft_linear"}, "PEFT's linear knows no target_parameters"),
    "experts beside a bias": (
        [STACK, BIASED],
        {},
        "PEFT loads target_parameters beside neither lora_bias nor",
    ),
    "experts beside Conv1D": (
        [STACK, with_keys(PLAIN, fan_in_fan_out=True)],
        {},
        "beside neither lora_bias nor fan_in_fan_out",
    ),
    "experts of different numbers": (
        [STACK, with_keys((factors("m.experts", 12, 10, rank=12), STACK[1]))],
        {},
        "[12, 10] does not fit [8, 10]",
    ),
    "experts that are no matrices": (
        [({k: v[..., None] for k, v in EXPERTS.items()}, STACK[1])],
        {},
        "must hold the same ranks of all experts",
    ),
    "experts of no whole rank": (
        [with_keys(STACK, r=3)],
        {},
        "A [8, 10] and B [12, 8] must have rank 3 of the config",
    ),
    "a parameter without a module": (
        [with_keys(STACK, target_parameters=["up_proj"])],
        {},
        "name 'up_proj' without its module",
    ),
    "more parameters than levels": (
        [with_keys(STACK, target_parameters=["experts.up_proj", "experts.down_proj"])],
        {},
        "target_parameters name 2 parameters of its module, it has 1",
    ),
    "levels without parameters": (
        [(factors("m.experts.base_layer", 12, 10), {})],
        {},
        "lies under a base_layer, and target_parameters",
    ),
    "parameters of unknown order": (
        [STACK, with_keys(STACK, target_parameters=["experts.odd"])],
        {},
        "whether its module defines 'odd' before",
    ),
    "a weight and a parameter": (
        [STACK, (factors("m.experts", 12, 10), {})],
        {},
        "one adapter changes a module's weight, another a",
    ),
    "an embedding and a layer": (
        [(EMBEDDED, {}), (factors("emb", 10, 20), {})],
        {},
        "[4, 20] does not fit [4, 20]",
    ),
    "copy, ties": (
        [SAVED],
        {"method": "ties", "density": 0.5},
        "and ties has nothing to do there; cat and svd",
    ),
    "copy, peft_linear": (
        [SAVED],
        {"method": "peft_linear"},
        "a full copy replaces the base's tensor, and peft_",
    ),
    "copy and weight": (
        [SAVED],
        {"weights": [0.5]},
        "and weights of [0.5] cannot be used: each must be 1, or",
    ),
    "copies and weights": ([SAVED, SAVED], {"weights": [1, 0.5]}, "weights of [1, 0.5] cannot be used"),
    "copies that differ": (
        [SAVED, with_keys(SAVED, {"norm.weight": torch.zeros(10)})],
        {},
        "norm.weight': differs from the copy in",
    ),
    "copies of different types": (
        [SAVED, with_keys(SAVED, {"norm.weight": torch.ones(10).half()})],
        {},
        "differs from the copy in",
    ),
    "copy and change": (
        [PLAIN, ({"q.weight": torch.ones(12, 10)}, {})],
        {},
        "one adapter replaces what another",
    ),
    "copy of nothing": (
        [with_keys(PLAIN, {"norm.weight": torch.ones(0)})],
        {},
        "is no weight of a module, got [0]",
    ),
    "tied embedding": ([(EMBEDDED, {"ensure_weight_tying": True})], {}, "what is composed is not kept tied"),
    "tied copy": ([with_keys(SAVED, ensure_weight_tying=True)], {}, "what is composed is not kept tied"),
    "rows, ties": (
        [TOKENS],
        {"method": "ties", "density": 0.5},
        "rows are overwritten, and ties has nothing to",
    ),
    "rows and weight": (
        [TOKENS],
        {"weights": [2.0]},
        "rows are overwritten, and weights of [2.0] cannot be used",
    ),
    "rows without indices": (
        [with_keys(PLAIN, ROWS)],
        {},
        "must have a row for each of 0 trainable tokens, got [2,",
    ),
    "rows that differ": (
        [TOKENS, with_keys(TOKENS, {k: 2 * v for k, v in ROWS.items()})],
        {},
        "row 1 is overwritten twice, with other values",
    ),
    "rows of another length": (
        [
            TOKENS,
            with_keys(
                TOKENS, {k: v[:, :5] for k, v in ROWS.items()}, trainable_token_indices={"emb": [5, 6]}
            ),
        ],
        {},
        "has rows of another length or type",
    ),
    "rows and change": (
        [TOKENS, (EMBEDDED, {})],
        {},
        "overwrites rows of a module that is changed or replaced",
    ),
    "rows and copy": ([TOKENS, ({"emb.weight": torch.ones(20, 10)}, {})], {}, "that is changed or replaced"),
    "a sum beyond float32": (
        [({k: 1e30 * v for k, v in Q.items()}, {})],
        {"method": "svd"},
        "'q': compose_lora: the sum must have singular",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refusals(tmp_path: Path, name: str) -> None:
    given, options, says = CASES[name]
    paths = [
        str(write_adapter(tmp_path / f"{i}", tensors, **config)) for i, (tensors, config) in enumerate(given)
    ]
    with pytest.raises(ValueError) as error:
        compose(paths, tmp_path / "out", **options)
    assert says in str(error.value), str(error.value)
    assert ("tensor '" in str(error.value)) == ("float32" not in name)
    assert not (tmp_path / "out").exists()


def test_a_head_tied_by_the_flag_alone_is_no_hindrance(tmp_path):
    path = write_adapter(tmp_path / "a", Q, ensure_weight_tying=True)
    compose([str(path)], tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear"])
def test_biases_go_through_the_method_as_deltas(tmp_path, method):
    """As a dense composition of whole models would do: a bias is a tensor of its own."""
    biases = [torch.randn(12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    paths = []
    for i, bias in enumerate(biases):
        held = {**factors("q", 12, 10, seed=i), "q.lora_B.bias": bias}
        paths.append(str(write_adapter(tmp_path / f"{i}", held, lora_bias=True, lora_alpha=2)))
    weights = [1.0, -0.5, 2.0]

    def composed(seed: int) -> torch.Tensor:
        out = tmp_path / f"out{seed}"
        compose(paths, out, method=method, weights=weights, density=0.5, seed=seed, rank=10)
        return load(out)[f"{PREFIX}q.lora_B.bias"]

    got, other = composed(7), composed(8)
    if method == "dare_linear":  # one of all masks per element, what is kept rescaled by 1 / density
        masks = torch.cartesian_prod(*([torch.tensor([0.0, 2.0])] * 3))
        sums = masks @ (torch.stack(biases) / 2 * torch.tensor(weights)[:, None])
        assert ((sums - got).abs().min(0).values < 1e-5).all() and not torch.equal(got, other)
    else:
        deltas = [(bias / 2).view(1, -1) for bias in biases]
        assert torch.equal(got, merged_delta(method, deltas, weights, 0.5, 0).view(-1))


def test_keys_of_two_levels_without_parameters(tmp_path):
    path = write_adapter(tmp_path / "a", Q)
    save_file(
        {PREFIX + k: v for k, v in {**Q, **factors("q.base_layer", 12, 10)}.items()},
        path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="lies under a base_layer"):
        compose([str(path)], tmp_path / "out")
