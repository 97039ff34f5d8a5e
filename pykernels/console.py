"""What commands that merge have in common: their options, what they say meanwhile, what they report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pykernels.engine.collector import no_collection
from pykernels.terminal import gigabytes, printable, progress_bar

if TYPE_CHECKING:
    from pykernels.engine.plan import Plan
    from pykernels.engine.recipe import Recipe
    from pykernels.engine.run import Report

Command = TypeVar("Command", bound=Callable[..., Any])


DOWNLOAD = click.option(
    "--allow-download", is_flag=True, help="Fetch models the Hugging Face cache does not hold."
)


def planning(command: Command) -> Command:
    """The options of everything that makes a plan."""
    for option in (
        DOWNLOAD,
        click.option("--shard-size", default="5GB", show_default=True, help="Largest output file."),
    ):
        command = option(command)
    return command


def device(command: Command) -> Command:
    """Where tensors are merged."""
    for option in (
        click.option(
            "--device-memory", help="Bound on the memory of every device (default: half of what is free)."
        ),
        click.option(
            "--device", default="cpu", show_default=True,
            help="Where to merge: cpu, cuda, cuda:1 or cuda:0,cuda:1.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


SEED = click.option("--seed", type=int, help="Overrides the recipe's seed (default 0).")
THREADS = click.option("--threads", type=click.IntRange(1), help="Compute threads (default: torch's number).")


def writing(command: Command) -> Command:
    """The options of everything that writes a checkpoint."""
    for option in (
        click.option("--quiet", is_flag=True, help="Print warnings and errors only."),
        click.option("--durable", is_flag=True, help="Return only when everything is on the disk."),
        click.option("--overwrite", is_flag=True, help="Replace the checkpoint that OUT holds."),
        click.option("--dry-run", is_flag=True, help="Plan and check everything, write nothing."),
        click.option("--memory", default="2GB", show_default=True, help="Bound on working memory."),
        THREADS,
    ):
        command = option(command)
    return command


def run_merge(recipe: Path | Callable[[], Recipe], out: Path, *, quiet: bool, **options: Any) -> None:
    """Merge, with progress and warnings on stderr and a report on stdout."""
    with no_collection():  # torch's import makes much that is no garbage
        from pykernels.engine.run import merge as run

    said: list[str] = []

    def planned(plan: Plan, told: Sequence[str]) -> None:
        said.extend(told)
        for text in dict.fromkeys(told):
            if text not in plan.notes or not quiet:
                click.echo(f"{'note' if text in plan.notes else 'warning'}: {printable(text)}", err=True)

    source = recipe() if callable(recipe) else recipe
    with progress_bar(not quiet) as moved, warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("default")
        report = run(source, out, progress=moved, planned=planned, **options)
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
    _print_adapters(report)
    _print_devices(report)


def _print_adapters(report: Report) -> None:
    """How many modules of which kind each adapter changed."""
    for model in report.plan.models:
        for path, modules in zip(model.adapters, model.modules, strict=True):
            told = ", ".join(f"{count} {kind}" for kind, count in modules.items())
            click.echo(f"adapter {printable(path)}: {told}")


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
