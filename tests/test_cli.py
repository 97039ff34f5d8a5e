"""The command line: what each command prints, refuses and leaves on the disk."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pykernels.backends import BACKENDS, TABLE, missing
from pykernels.cli import FAILED, REFUSED, main
from pykernels.terminal import gigabytes, printable, progress_bar

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.mlp.weight": (8, 8),
    "model.layers.1.mlp.weight": (8, 8),
    "lm_head.weight": (16, 8),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with base, a, b and the recipe that merges them; commands run inside it."""
    random = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        tensors = {k: torch.randn(shape, generator=random).bfloat16() for k, shape in SHAPES.items()}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder, **changes):
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 0.5, "density": 0.5},
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump({**recipe, **changes}))


def run(*arguments):
    """Run the command; an unexpected exception is a failure and never an exit code."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in ("merge", "plan", "verify", "backends", "bench"))


def test_help_imports_neither_torch_nor_rich():
    code = "import sys, pykernels.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert {"torch", "numpy", "rich", "yaml"}.isdisjoint(done.stdout.split())


def test_version():
    assert "0.1.0" in run("--version").output


def test_merge_writes_a_checkpoint_and_says_how_fast(home):
    result = run("merge", "recipe.yml", "out")
    assert result.exit_code == 0, result.output
    assert "merged into out: 4 tensors" in result.stdout
    assert "engine time" in result.stdout and "GB/s" in result.stdout
    assert "note: " in result.stderr
    merged = load_file(home / "out" / "model.safetensors")
    assert {k: tuple(v.shape) for k, v in merged.items()} == SHAPES
    assert (home / "out" / "pykernels.json").is_file()


def test_quiet_prints_nothing_where_nothing_is_wrong(home):
    assert run("merge", "recipe.yml", "out", "--quiet").output == ""


def test_dry_run_writes_nothing(home):
    before = sorted(home.rglob("*"))
    result = run("merge", "recipe.yml", "out", "--dry-run")
    assert result.exit_code == 0
    assert "nothing was written" in result.stdout
    assert sorted(home.rglob("*")) == before


def test_an_earlier_merge_is_replaced_only_on_demand(home):
    assert run("merge", "recipe.yml", "out").exit_code == 0
    refused = run("merge", "recipe.yml", "out")
    assert refused.exit_code == REFUSED and "out" in refused.stderr
    assert run("merge", "recipe.yml", "out", "--overwrite").exit_code == 0


def test_options_reach_the_engine(home):
    options = {"threads": 1, "memory": "64MB", "shard-size": "500", "seed": 3}
    flags = [text for key, value in options.items() for text in (f"--{key}", value)]
    result = run("merge", "recipe.yml", "out", *flags, "--durable")
    assert result.exit_code == 0, result.output
    assert (home / "out" / "model.safetensors.index.json").is_file()
    assert json.loads((home / "out" / "pykernels.json").read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("merge", "missing.yml", "out"), "missing.yml"),
        (("merge", "recipe.yml", "out", "--memory", "much"), 'memory must be a size such as "2GB"'),
        (("merge", "recipe.yml", "out", "--shard-size", "0"), "shard_size must be at least 1 byte"),
        (("plan", "recipe.yml", "--shard-size", "big"), "shard_size must be a size"),
        (("plan", "missing.yml"), "missing.yml"),
        (("verify", "missing"), "missing"),
    ],
)
def test_refusals_are_one_line(home, arguments, text):
    result = run(*arguments)
    assert result.exit_code == REFUSED
    assert result.stdout == ""
    assert result.stderr.startswith("pykernels: ") and text in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (home / "out").exists()


def test_an_unknown_method_is_named_with_what_is_known(home):
    write_recipe(home, merge_method="tied")
    result = run("plan", "recipe.yml")
    assert result.exit_code == REFUSED
    assert "tied" in result.stderr and "dare_ties" in result.stderr


def test_threads_must_be_positive(home):
    assert run("merge", "recipe.yml", "out", "--threads", 0).exit_code == 2


@pytest.mark.parametrize("how", ["--debug", "PYKERNELS_DEBUG"])
def test_debug_shows_where_an_error_comes_from(home, monkeypatch, how):
    arguments = ["plan", "missing.yml"]
    if how == "--debug":
        arguments.insert(0, how)
    else:
        monkeypatch.setenv(how, "1")
    with pytest.raises((ValueError, OSError), match="missing"):
        run(*arguments)


def test_plan_prints_a_table(home):
    result = run("plan", "recipe.yml", "--seed", 5)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split()[:2] == ["tensor", "shape"]
    assert all(any(line.startswith(name) for line in lines) for name in SHAPES)
    assert "seed 5: 4 tensors in 1 file(s)" in lines[-1]


def test_plan_prints_json(home):
    from pykernels.engine.plan import Plan

    result = run("plan", "recipe.yml", "--json", "--shard-size", "500")
    plan = Plan.from_json(result.stdout)
    assert {o.name for o in plan.outputs} == set(SHAPES)
    assert len(plan.shards) > 1


def test_verify_accepts_a_merge_and_finds_a_flipped_bit(home):
    run("merge", "recipe.yml", "out")
    good = run("verify", "out")
    assert good.exit_code == 0, good.output
    assert run("verify", "out", "--quiet").output == ""
    path = home / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    bad = run("verify", "out")
    assert bad.exit_code == FAILED
    assert "failed: " in bad.stderr and any(name in bad.stderr for name in SHAPES)


def test_backends_prints_the_grid():
    lines = run("backends").output.splitlines()
    assert lines[0].split() == ["op", "cpu", "cuda", "triton", "torch", "ref"]
    assert [line.split()[0] for line in lines[1 : len(TABLE) + 1]] == list(TABLE)
    assert all("yes" in line for line in lines[1 : len(TABLE) + 1])
    for name in BACKENDS:
        assert (missing(name) is None) != any(line.startswith(f"{name} cannot run here: ") for line in lines)
    assert (
        lines[-1].startswith("instruction set: ") and "available: " in lines[-1] and "baseline" in lines[-1]
    )


def test_backends_refuses_an_unknown_instruction_set():
    done = subprocess.run(
        [sys.executable, "-m", "pykernels.cli", "backends"], capture_output=True, text=True,
        env={**os.environ, "PYKERNELS_ISA": "wrong"},
    )  # fmt: skip
    assert done.returncode == REFUSED and "wrong" in done.stderr and "baseline" in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_measures_a_row_and_saves_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("bench", "--only", "linear_merge call", "--no-peers", "--out", "figures")
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "figures" / "results.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["linear_merge call 64 elements"]
    assert saved["rows"][0]["value"] > 0
    assert result.output.count("control: ideal") == 2
    assert (tmp_path / "figures" / "roofline.png").stat().st_size > 0
    assert "linear_merge call 64 elements" in (tmp_path / "figures" / "roofline.html").read_text()


def test_bench_says_what_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "pykernels.bench.command", None)
    result = run("bench")
    assert result.exit_code == REFUSED
    assert "pykernels[bench]" in result.stderr


def test_bench_needs_the_extension(monkeypatch):
    from pykernels import backends

    monkeypatch.setattr(backends, "missing", lambda name: "pykernels._C is not built")
    result = run("bench")
    assert result.exit_code == REFUSED and "pykernels._C is not built" in result.stderr


def test_saved_figures_need_a_checkout(monkeypatch, tmp_path, capsys):
    from pykernels.bench import report

    monkeypatch.setattr(report, "__file__", str(tmp_path / "bench" / "report.py"))
    result = run("bench", "--save")
    assert result.exit_code == REFUSED and "source checkout" in result.stderr
    assert report.main(["README"]) == 2 and "source checkout" in capsys.readouterr().err


def test_notes_come_before_the_merge(home, monkeypatch):
    from pykernels.engine import run as engine

    def stop(*arguments):
        raise OSError("stopped before the first byte")

    write_recipe(home, tokenizer_source="base")
    monkeypatch.setattr(engine, "_write", stop)
    lines = run("merge", "recipe.yml", "out").stderr.splitlines()
    assert lines[-1] == "pykernels: stopped before the first byte"
    assert any(line.startswith("note: tokenizer_source base: ") and "'base'" in line for line in lines)


def test_verify_tells_of_nonfinite_elements_when_quiet(home):
    for name in ("base", "a", "b"):
        path = home / name / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight"][0, 0] = float("inf") if name == "a" else 0
        save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    run("merge", "recipe.yml", "out")
    result = run("verify", "out", "--quiet")
    assert result.exit_code == 0 and result.stdout == ""
    assert "1 NaN or infinite elements in 'lm_head.weight'" in result.stderr


def test_names_from_files_cannot_command_the_terminal():
    assert printable("a\x1b[31mb\nc\x00") == "a\\x1b[31mb\nc\\x00"


def test_sizes():
    assert gigabytes(5_710_000_000) == "5.71 GB"
    assert gigabytes(279_336) == "0.279 MB"


class Terminal(io.StringIO):
    """What a terminal would show."""

    def isatty(self):
        return True


@pytest.mark.parametrize("show", [True, False])
def test_the_bar_shows_bytes_on_a_terminal_unless_quiet(monkeypatch, show):
    from pykernels.engine.run import Progress

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar(show) as moved:
        moved(Progress(5, 10, "x"))
    assert ("5/10 bytes" in terminal.getvalue()) == show
