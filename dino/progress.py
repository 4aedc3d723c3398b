"""Progress bars with remaining time, and lines for the person at the terminal; silent on all but the main process."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dino import distributed

WIDEST = 100  # columns: longer lines are hard to read
console = Console(highlight=False, soft_wrap=True)


class Bar(Protocol):
    """Handle of a running bar."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Move on by ``count``; ``note`` replaces the text behind the bar when given."""


class _RichBar:
    def __init__(self, progress: Progress, task: int, note: str) -> None:
        self._progress, self._task, self._note = progress, task, note

    def advance(self, count: int = 1, note: str = "") -> None:
        self._note = note or self._note
        self._progress.update(self._task, advance=count, note=self._note)  # type: ignore[arg-type]


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a bar with counts, elapsed and remaining time for the length of the block.

    Args:
        title: What is being done.
        total: How many steps there are.
        done: How many of them were done before (a resumed run).
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not distributed.is_main()) as progress:
        yield _RichBar(progress, progress.add_task(title, total=total, completed=done, note=""), "")


def say(message: str) -> None:
    """Print one line on the main process."""
    if distributed.is_main():
        console.print(message, markup=False)


def warn(message: str) -> None:
    """Print one warning line on the main process."""
    if distributed.is_main():
        console.print(f"warning: {message}", style="yellow", markup=False)


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows in columns on the main process, the first column unbroken."""
    if not distributed.is_main():
        return
    shown = Table(box=None, show_header=bool(header), header_style="bold", pad_edge=False)
    for row in rows:
        while len(shown.columns) < max(len(row), len(header)):
            i = len(shown.columns)
            shown.add_column(header[i] if header else "", no_wrap=i == 0, overflow="fold")
        shown.add_row(*row)
    Console(highlight=False).print(shown, markup=False)


def show(screen: RenderableType) -> None:
    """Print something that fits itself to the width of the terminal (80 columns where there is none), up to 100."""
    if distributed.is_main():
        console.print(screen, soft_wrap=False, width=min(console.width, WIDEST))
