"""The command line. torch and the engine are imported only by commands that need them: --help is instant."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pykernels.console import SEED, THREADS, device, planning, run_merge, writing
from pykernels.engine.collector import no_collection
from pykernels.lora_commands import lora
from pykernels.terminal import gigabytes, print_table, printable

if TYPE_CHECKING:
    from pykernels.engine.plan import Plan

FAILED, REFUSED = 1, 2
"""Exit codes: a check that failed; an input that is not accepted."""


class Commands(click.Group):
    """Refusals (ValueError, OSError) become one line on stderr and exit code 2, unless --debug is given."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if ctx.params.get("debug") or os.environ.get("PYKERNELS_DEBUG"):
                raise
            click.echo(f"pykernels: {printable(_said(error))}", err=True)
            ctx.exit(REFUSED)


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pykernels")
@click.option("--debug", is_flag=True, help="Show the traceback of an error (also: PYKERNELS_DEBUG=1).")
def main(debug: bool) -> None:
    """Merge safetensors checkpoints with fused kernels, at the speed of the disk."""


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@device
@SEED
@writing
@planning
def merge(recipe: Path, out: Path, quiet: bool, **options: Any) -> None:
    """Merge the models of RECIPE (mergekit's YAML) into the directory OUT."""
    run_merge(recipe, out, quiet=quiet, **options)


main.add_command(lora)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, as an executor reads it.")
@SEED
@planning
def plan(recipe: Path, as_json: bool, shard_size: str, seed: int | None, allow_download: bool) -> None:
    """Print what a merge of RECIPE would read, compute and write; only headers are read."""
    from pykernels.engine.plan import make_plan
    from pykernels.engine.recipe import read_recipe
    from pykernels.engine.sizes import parse_size

    size = parse_size(shard_size, "shard_size")
    made = make_plan(read_recipe(recipe), shard_size=size, seed=seed, allow_download=allow_download)
    if as_json:
        click.echo(made.to_json(indent=1))
    else:
        _print_plan(made)


def _print_plan(made: Plan) -> None:
    from pykernels.engine.plan import ROW_HEAD

    print_table(ROW_HEAD, made.rows())
    for name in made.dropped:
        click.echo(f"dropped: {printable(name)}")
    for note in made.notes:
        click.echo(f"note: {printable(note)}")
    click.echo(
        f"{made.method}, scope {made.scope}, seed {made.seed}: {len(made.outputs)} tensors in "
        f"{len(made.shards)} file(s), {gigabytes(made.total_read)} to read, "
        f"{gigabytes(made.total_write)} to write"
    )


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="Print failures and NaN or infinite elements only.")
def verify(out: Path, quiet: bool) -> None:
    """Re-read a merge: headers, cover, checksums, finite values, samples against the reference."""
    with no_collection():
        from pykernels.engine.verify import verify as check

    report = check(out)
    for failure in report.failures:
        click.echo(f"failed: {printable(failure)}", err=True)
    for warning in report.warnings:
        click.echo(f"warning: {printable(warning)}", err=True)
    if report.failures:
        click.get_current_context().exit(FAILED)
    if not quiet:
        click.echo(printable(report.summary))


@main.command()
def backends() -> None:
    """Print which backend can run which op here, and why not; then the instruction set of the kernels."""
    from pykernels.backends import BACKENDS, grid, missing

    isa = "none" if missing("cpu") else _instruction_sets()  # before the table: it may refuse PYKERNELS_ISA
    print_table(("op", *BACKENDS), [(op, *(row[b] for b in BACKENDS)) for op, row in grid()])
    for name in BACKENDS:
        if why := missing(name):
            click.echo(f"{name} cannot run here: {why}")
    click.echo(f"instruction set: {isa}")


def _instruction_sets() -> str:
    from pykernels import _C, native

    return f"{_C.isa()} (available: {', '.join(native.isas())})"


@main.command()
@click.option("--only", multiple=True, metavar="TEXT", help="Rows whose name holds TEXT; may be given again.")
@THREADS
@click.option("--no-peers", is_flag=True, help="Skip torch, mergekit and PEFT, which take most of the time.")
@click.option("--engine", is_flag=True, help="Merge whole checkpoints too (needs 4 GB of disk).")
@click.option(
    "--save",
    is_flag=True,
    help="Put these rows into bench/results/<machine>.json too, which the README quotes.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True)
def bench(no_peers: bool, engine: bool, save: bool, **options: Any) -> None:
    """Measure every op against this machine's memory bandwidth; draws a roofline chart (PNG and HTML)."""
    from pykernels.backends import missing

    if why := missing("cpu"):
        raise OSError(f"the benchmarks measure the compiled kernels: {why}")
    try:
        command = importlib.import_module("pykernels.bench.command")
    except ImportError as error:
        raise OSError(f"the benchmarks cannot run: {error}; try: pip install 'pykernels[bench]'") from None
    command.run(**options, with_peers=not no_peers, with_engine=engine, keep=save, say=click.echo)


if __name__ == "__main__":
    main()
