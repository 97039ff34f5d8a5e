"""What commands print: tables, a progress bar in bytes, text that no terminal obeys."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pykernels.engine.run import Progress

_PIPE_WIDTH = 400
"""Columns where the output is a file or a pipe: wide enough that no name is broken."""


def printable(text: str) -> str:
    """``text`` with control characters escaped: names come from files, and terminals obey them."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under their titles."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_WIDTH)
    table = Table(*head, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
    console.print(table)


def gigabytes(nbytes: int) -> str:
    """``5.71 GB``; sizes under 10 MB keep their digits."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**7 else f"{nbytes / 1e6:.3f} MB"


@contextmanager
def progress_bar(show: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar in bytes with rate and time left, on a terminal only; gives the function that moves it."""
    if not show or not sys.stderr.isatty():
        yield lambda state: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("merge", total=None)

    def moved(state: Progress) -> None:
        bar.start()  # at the first move only: what is said before the merge starts stands above the bar
        bar.update(task, completed=state.done, total=state.total)

    try:
        yield moved
    finally:
        if bar.live.is_started:
            bar.stop()
