"""The command line. torch and the engine are imported only by commands that need them: --help is instant."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pykernels.engine.collector import no_collection
from pykernels.terminal import gigabytes, print_table, printable, progress_bar

if TYPE_CHECKING:
    from pykernels.engine.plan import Plan
    from pykernels.engine.run import Report

FAILED, REFUSED = 1, 2
"""Exit codes: a check that failed; an input that is not accepted."""

Command = TypeVar("Command", bound=Callable[..., Any])


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


def _planning(command: Command) -> Command:
    """The options of everything that makes a plan."""
    for option in (
        click.option(
            "--allow-download", is_flag=True, help="Fetch models the Hugging Face cache does not hold."
        ),
        click.option("--seed", type=int, help="Overrides the recipe's seed (default 0)."),
        click.option("--shard-size", default="5GB", show_default=True, help="Largest output file."),
    ):
        command = option(command)
    return command


_THREADS = click.option(
    "--threads", type=click.IntRange(1), help="Compute threads (default: torch's number)."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pykernels")
@click.option("--debug", is_flag=True, help="Show the traceback of an error (also: PYKERNELS_DEBUG=1).")
def main(debug: bool) -> None:
    """Merge safetensors checkpoints with fused kernels, at the speed of the disk."""


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@_THREADS
@click.option("--memory", default="2GB", show_default=True, help="Bound on working memory.")
@click.option(
    "--device", default="cpu", show_default=True, help="Where to merge: cpu, cuda, cuda:1 or cuda:0,cuda:1."
)
@click.option("--device-memory", help="Bound on the memory of every device (default: half of what is free).")
@_planning
@click.option("--dry-run", is_flag=True, help="Plan and check everything, write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that OUT holds.")
@click.option("--durable", is_flag=True, help="Return only when everything is on the disk.")
@click.option("--quiet", is_flag=True, help="Print warnings and errors only.")
def merge(recipe: Path, out: Path, quiet: bool, **options: Any) -> None:
    """Merge the models of RECIPE (mergekit's YAML) into the directory OUT."""
    with no_collection():  # torch's import makes much that is no garbage
        from pykernels.engine.run import merge as run

    said: list[str] = []

    def planned(plan: Plan, told: Sequence[str]) -> None:
        said.extend(told)
        for text in dict.fromkeys(told):
            if text not in plan.notes or not quiet:
                click.echo(f"{'note' if text in plan.notes else 'warning'}: {printable(text)}", err=True)

    with progress_bar(not quiet) as moved, warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("default")
        report = run(recipe, out, progress=moved, planned=planned, **options)
    for text in dict.fromkeys([*(str(w.message) for w in raised), *report.warnings]):
        if text not in said:
            click.echo(f"warning: {printable(text)}", err=True)
    if not quiet:
        _print_report(report)


def _print_report(report: Report) -> None:
    size = f"{report.tensors} tensors, {gigabytes(report.written)} in {report.shards} file(s)"
    if report.dry_run:
        click.echo(f"dry run: {size}; nothing was written")
        _print_devices(report)
        return
    click.echo(f"merged into {printable(str(report.out))}: {size}")
    click.echo(
        f"engine time {report.seconds:.3f} s, {report.gb_per_second:.2f} GB/s "
        f"({gigabytes(report.read)} read, {gigabytes(report.written)} written)"
    )
    _print_devices(report)


def _print_devices(report: Report) -> None:
    """What a merge on devices took of them, and which part of it took longest."""
    for use in report.devices:
        whose = "--device-memory" if use.stated else "half of what was free"
        click.echo(
            f"{use.name} ({printable(use.model)}): merges with backend {use.backend}, "
            f"{gigabytes(use.held)} held of at most {gigabytes(use.allowed)} ({whose})"
        )
    if report.busy is not None:
        seconds = ", ".join(f"{part} {value:.3f} s" for part, value in report.busy.parts().items())
        click.echo(f"busy: {seconds}; limited by {report.busy.limit()}")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON, as an executor reads it.")
@_planning
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
@_THREADS
@click.option("--no-peers", is_flag=True, help="Skip torch, mergekit and PEFT, which take most of the time.")
@click.option("--engine", is_flag=True, help="Merge whole checkpoints too (needs 4 GB of disk).")
@click.option(
    "--save", is_flag=True, help="Also write bench/results/<machine>.json, which the README quotes."
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
