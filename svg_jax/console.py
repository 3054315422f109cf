"""What the command line shows on the terminal: tables, and bars of steps and of bytes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)


def print_parts(*parts: Any) -> None:
    """Prints tables and lines."""
    # As wide as a table needs to be where no terminal would break the lines.
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    for part in parts:
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


@contextmanager
def _bar(*columns: Any) -> Iterator[Progress]:
    """A progress bar on the terminal; nothing where there is none."""
    console = Console(stderr=True)
    text, bar, time = TextColumn("{task.description:10}"), BarColumn(), TimeElapsedColumn()
    with Progress(text, bar, *columns, time, console=console, disable=not console.is_terminal) as p:
        yield p


@contextmanager
def steps_bar(total: int) -> Iterator[Any]:
    """A bar of denoising steps; gives what is called after each, with what it was."""
    with _bar(MofNCompleteColumn()) as progress:
        task = progress.add_task("compiling", total=total)
        yield lambda what: progress.update(task, advance=1, description=what)


@contextmanager
def bytes_bar(*, visible: bool = True) -> Iterator[Any]:
    """A bar of bytes; if it is not visible, it comes with the first of them."""
    with _bar(DownloadColumn(), TransferSpeedColumn()) as progress:
        task = progress.add_task("checking", total=None, visible=visible)
        yield lambda done, total, what: progress.update(
            task, completed=done, total=total, description=what, visible=True
        )
