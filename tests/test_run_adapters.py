"""Merges of adapters from end to end: right numbers, the same bits however they are cut, and recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import pykernels
from pykernels.cli import main
from pykernels.engine.factors import PATIENCE
from pykernels.engine.mapped import Inputs
from pykernels.engine.plan import make_plan
from pykernels.engine.recipe import adapter_recipe
from pykernels.engine.run import merge
from pykernels.engine.verify import verify
from pykernels.ops.lora import LoRA
from tests.adapter_files import PREFIX, factors, write_adapter, write_base, write_experts, write_mixed
from tests.checkpoints import bits, load, same, write_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and adapters: two of mixed kinds, one of experts, one of DoRA on rows and columns."""
    path = tmp_path_factory.mktemp("adapters")
    write_base(path / "base")
    write_mixed(path / "a", seed=1)
    write_mixed(path / "b", seed=2)
    write_experts(path / "experts", seed=3)
    dora = {
        **factors("model.layers.0.q_proj", 67, 131, seed=4),
        "model.layers.0.q_proj.lora_magnitude_vector": torch.rand(67) + 1,
        "model.embed_tokens.lora_embedding_A": torch.randn(4, 101),
        "model.embed_tokens.lora_embedding_B": torch.randn(64, 4),
        "model.embed_tokens.lora_magnitude_vector": torch.rand(64) + 1,
    }
    write_adapter(path / "dora", dora, use_dora=True)
    return path


ALL = ("a", "experts", "dora", "b")


def merged(
    home: Path, out: Path, *names: str, rounding: str = "once", **options: Any
) -> dict[str, torch.Tensor]:
    """The engine's merge of adapters of ``home``."""
    recipe = adapter_recipe(str(home / "base"), [str(home / n) for n in names], (), rounding)
    merge(recipe, out, **options)
    return load(out)


def loras(home: Path, name: str, module: str) -> LoRA:
    """The factors of one module."""
    held = load(home / name)
    return LoRA(*(held[f"{PREFIX}{module}.lora_{f}.weight"] for f in "AB"), 6 / 4)


def test_the_numbers_are_those_of_the_op(home, tmp_path):
    base, got = load(home / "base"), merged(home, tmp_path / "out", "a", "b", "experts")
    for module in ("model.layers.0.q_proj", "model.layers.1.q_proj"):
        pair = [loras(home, name, module) for name in "ab"]
        assert torch.equal(got[f"{module}.weight"], pykernels.merge_lora(base[f"{module}.weight"], pair))
    experts = loras(home, "experts", "model.layers.1.experts")
    A, B = experts.A.view(3, 4, 50), experts.B.view(40, 4, 3)
    stack = base["model.layers.1.experts.up_proj"]
    for e in range(3):
        wanted = pykernels.merge_lora(stack[e], [LoRA(B[..., e].t(), A[e].t(), 6 / 4)])
        assert torch.equal(got["model.layers.1.experts.up_proj"][e], wanted)
    for name in ("model.norm.weight", "model.layers.0.q_proj.bias", "model.steps"):
        assert torch.equal(bits(got[name]), bits(base[name]))


CUTS: dict[str, dict[str, Any]] = {
    "small memory": {"memory": "1.3MB"},
    "small shards": {"shard_size": "40KB"},
    "one thread": {"threads": 1},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("rounding", ["once", "peft"])
def test_bits_do_not_depend_on_how_it_is_cut(home, tmp_path, rounding, cut, monkeypatch):
    whole = merged(home, tmp_path / "whole", *ALL, rounding=rounding)
    monkeypatch.setattr("pykernels.engine.compute.CHUNK_BYTES", 5000)  # a few rows
    assert same(merged(home, tmp_path / cut, *ALL, rounding=rounding, **CUTS[cut]), whole)


def test_a_tensor_that_must_be_whole_needs_memory_for_it(tmp_path):
    write_model(tmp_path / "base", {"model.q_proj.weight": torch.ones(300, 400)})
    write_adapter(tmp_path / "a", factors("model.q_proj", 300, 400))
    with pytest.raises(ValueError, match=r"at least 1920000 bytes for .*'model.q_proj.weight', which"):
        merged(tmp_path, tmp_path / "out", "a", rounding="peft", memory="1.9MB")
    assert not (tmp_path / "out").exists()
    merged(tmp_path, tmp_path / "out", "a", memory="1MB")


def test_factors_of_all_adapters_need_memory_for_them(tmp_path):
    """Their sum is rounded once, so they are all there at once; laid out and packed where they are halves."""
    write_model(tmp_path / "base", {"model.q_proj.weight": torch.ones(30, 4000)})
    tensors = factors("model.q_proj", 30, 4000, rank=16)
    write_adapter(tmp_path / "a", tensors, r=16)
    write_adapter(tmp_path / "half", {k: v.half() for k, v in tensors.items()}, r=16)
    need = 2 * 16 * 4 * (5 * 4030 + 5 * 2 * 4030)
    with pytest.raises(ValueError, match=rf"at least {need} bytes for tensor .*, for the factors of its"):
        merged(tmp_path, tmp_path / "out", *["a", "half"] * 5, memory=need - 1)
    assert not (tmp_path / "out").exists()
    merged(tmp_path, tmp_path / "out", *["a", "half"] * 5, memory=need)


def test_deltas_that_a_later_norm_needs_need_memory_too(tmp_path):
    write_model(tmp_path / "base", {"model.q_proj.weight": torch.ones(300, 400)})
    tensors = factors("model.q_proj", 300, 400)
    write_adapter(tmp_path / "a", tensors)
    norms = {"model.q_proj.lora_magnitude_vector": torch.ones(300)}
    write_adapter(tmp_path / "dora", {**tensors, **norms}, use_dora=True)
    for names, copies in ((["a"] * 5, 4), (["dora", "a", "a"], 6), (["a", "a", "dora"], 8)):
        need = 4 * copies * 300 * 400
        with pytest.raises(ValueError, match=f"at least {need} bytes"):
            merged(tmp_path, tmp_path / "out", *names, rounding="peft", memory=need - 1)


def test_verify_recomputes_and_finds_one_bit(home, tmp_path, monkeypatch):
    merged(home, tmp_path / "out", *ALL)
    report = verify(tmp_path / "out", samples=20)
    assert report.ok and {"model.layers.0.q_proj.weight", "model.embed_tokens.weight"} <= set(
        report.recomputed
    )
    record = json.loads((tmp_path / "out" / "pykernels.json").read_text())
    assert record["plan"]["models"][0]["modules"][2] == {"linear, DoRA": 1, "embedding, DoRA": 1}
    spoil = tmp_path / "out" / "model.safetensors"
    output = next(o for o in record["plan"]["outputs"] if o["name"] == "model.embed_tokens.weight")
    raw = bytearray(spoil.read_bytes())
    raw[output["start"]] ^= 4  # four units of a bfloat16
    spoil.write_bytes(raw)
    monkeypatch.setattr("pykernels.engine.verify._check_tensors", lambda *rest: set())  # not by the checksum
    [failure] = verify(tmp_path / "out", samples=20).failures
    assert "'model.embed_tokens.weight': 1 of 6464 elements are not what the reference computes" in failure


def test_output_types(home, tmp_path):
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": f"{home / 'base'}+{home / 'a'}"}],
        "out_dtype": "float32",
    }
    merge(recipe, tmp_path / "out")
    narrow = merged(home, tmp_path / "narrow", "a")
    wide = load(tmp_path / "out")
    assert wide["model.steps"].dtype == torch.int64
    assert all(torch.equal(wide[k], v.float()) for k, v in narrow.items() if v.is_floating_point())
    assert verify(tmp_path / "out").ok
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"parameters": {"density": 0.4}},
    "ties model": {"parameters": {"density": 0.4}, "scope": "model"},
    "dare_ties": {"parameters": {"density": 0.5, "rescale": "l1"}},
}


@pytest.mark.parametrize("method", METHODS)
def test_recipes_take_models_with_adapters(home, tmp_path, method):
    """As if every model had been merged with its adapter and saved first."""
    for name in ("a", "dora"):
        merged(home, tmp_path / name, name)
    keys = {"merge_method": method.split()[0], **METHODS[method]}
    if method != "linear":
        keys["base_model"] = str(home / "base")
    first = [{"model": str(tmp_path / n), "parameters": {"weight": 0.6}} for n in ("a", "dora")]
    direct = [
        {**m, "model": f"{home / 'base'}+{home / n}"} for m, n in zip(first, ("a", "dora"), strict=True)
    ]
    merge({**keys, "models": first}, tmp_path / "first", memory="4MB")
    merge({**keys, "models": direct}, tmp_path / "direct", memory="4MB")
    assert same(load(tmp_path / "direct"), load(tmp_path / "first"))
    report = verify(tmp_path / "direct", samples=20)
    assert report.ok and len(report.recomputed) == 6, str(report)


def test_one_model_in_two_ways_is_refused(home):
    from pykernels.engine.recipe import read_recipe

    names = [f"{home / 'base'}+{home / 'a'}", f"{home / 'base'}+{home}/./a"]
    recipe = read_recipe(
        {"merge_method": "linear", "models": [{"model": n} for n in names], "parameters": {"weight": 1}}
    )
    with pytest.raises(ValueError, match="is the same directory as"):
        make_plan(recipe)


def test_copies_of_two_adapters_must_be_equal(home, tmp_path):
    for name, value in (("one", 1.0), ("two", 2.0)):
        write_adapter(tmp_path / name, {"model.norm.weight": torch.full((64,), value).bfloat16()})
    recipe = adapter_recipe(str(home / "base"), [str(tmp_path / "one"), str(tmp_path / "two")])
    with pytest.raises(ValueError, match=r"of '.*one' and tensor .* of '.*two' must be equal.*1.0 and 2.0"):
        merge(recipe, tmp_path / "out")
    same_copies = adapter_recipe(str(home / "base"), [str(tmp_path / "one"), str(tmp_path / "one")])
    merge(same_copies, tmp_path / "out")
    assert (load(tmp_path / "out")["model.norm.weight"] == 1).all()


def cli(*arguments: object) -> str:
    """What a command prints; it must not fail."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands(home, tmp_path):
    base, out = home / "base", tmp_path / "out"
    assert "nothing was written" in cli("lora", "merge", base, home / "a", out, "--dry-run")
    text = cli(
        "lora", "merge", base, home / "a", home / "b", out, "--weight", 0.5, "--weight", 2, "--threads", 1
    )
    assert f"adapter {home / 'a'}: " in text and "2 linear" in text and "1 embedding" in text
    assert "verified" in cli("verify", out)
    card = (out / "README.md").read_text()
    assert "with 2 adapter(s) merged" in card and "base_model:" not in card
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: '{base}+{home / 'a'}+{home / 'b'}'}}]\n")
    assert "+ r 4 + r 4" in cli("plan", recipe)
    refused = CliRunner().invoke(main, ["lora", "merge", str(base), str(tmp_path), str(tmp_path / "new")])
    assert refused.exit_code == 2 and "not a PEFT adapter" in refused.stderr


def test_backends_agree(home, tmp_path):
    """The compiled kernel rounds as the reference does, but for near ties that float32 cannot see."""
    fast = merged(home, tmp_path / "fast", *ALL)
    with pykernels.use_backend("ref"):
        exact = merged(home, tmp_path / "exact", *ALL)
    for name, tensor in exact.items():
        assert (tensor != fast[name]).sum() <= tensor.numel() // 1000


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_experts_factors_are_read_once_where_there_is_room(home, tmp_path, room):
    """Of a base with a matrix per expert: every output reads the same A and B."""
    base = load(home / "base")["model.layers.1.experts.up_proj"]
    state = {f"m.experts.{e}.down_proj.weight": base[e].t().contiguous() for e in range(3)}
    write_model(tmp_path / "base", state)
    adapter = write_adapter(
        tmp_path / "a", factors("m.experts", 40, 50, rank=12), target_parameters=["experts.down_proj"]
    )
    plan = make_plan(adapter_recipe(str(tmp_path / "base"), [str(adapter)]))
    inputs = Inputs({path: i for model in plan.models for path, i in model.identities.items()})
    reader, read = inputs.adapted.factors, []
    stored = reader._read
    reader._read = lambda info, *rest: (read.append(info.name), stored(info, *rest))[1]
    reader.room = room
    held = load(adapter)
    A, B = (held[f"{PREFIX}m.experts.lora_{f}.weight"] for f in "AB")
    for e, out in enumerate(sorted(plan.outputs, key=lambda o: o.name)):
        for first, count in ((0, 700), (700, 1300)):  # in the middle of a row
            got = inputs.elements(out.sources[0], first, count)
            lora = LoRA(A.view(3, 4, 50)[e], B.view(40, 4, 3)[..., e].contiguous(), 6 / 4)
            wanted = pykernels.merge_lora(state[out.name], [lora]).view(-1)[first : first + count]
            assert torch.equal(got, wanted)
    assert (len(read) == 2) == bool(room)
    inputs.close()


def test_factors_leave_when_they_were_not_used_for_long(tmp_path):
    """What comes in turns stays, and the rest is read as it is needed, never the whole for a part."""
    modules = [f"m{i}" for i in range(4)]
    tensors = {k: v.half() for m in modules for k, v in factors(m, 10, 10, seed=int(m[1:])).items()}
    write_model(tmp_path / "base", {f"{m}.weight": torch.zeros(10, 10) for m in modules})
    plan = make_plan(adapter_recipe(str(tmp_path / "base"), [str(write_adapter(tmp_path / "a", tensors))]))
    changes = [out.sources[0].changes[0] for out in sorted(plan.outputs, key=lambda o: o.name)]
    inputs = Inputs({path: i for model in plan.models for path, i in model.identities.items()})
    held = inputs.adapted.factors
    held.room = 2 * 4 * 4 * 20  # of two modules in float32

    def piece(i: int) -> torch.Tensor:
        A, B = held.piece(changes[i], torch.float32, 0, 3, 4)
        assert torch.equal(A, tensors[f"m{i}.lora_A.weight"].float())
        assert torch.equal(B, tensors[f"m{i}.lora_B.weight"].float()[3:7])
        return A

    first = piece(0)
    for i in (1, 2, 3, 2, 3):
        piece(i)
    assert piece(0).data_ptr() == first.data_ptr() and len(held._held) == 2
    for _ in range(PATIENCE + 2):
        piece(0)
    kept = piece(2)  # instead of 1
    assert piece(2).data_ptr() == kept.data_ptr() and piece(0).data_ptr() == first.data_ptr()
    inputs.close()
    assert not held._held
