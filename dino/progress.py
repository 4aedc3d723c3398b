"""Progress and messages, printed by the main process only: bars in a terminal, plain lines otherwise."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dino.files import printable

MAX_WIDTH = 100  # columns: longer lines are hard to read
LINE_SECONDS = 30.0  # minimum time between two lines of one bar if the output is not a terminal
console = Console(highlight=False, soft_wrap=True)


class Bar(Protocol):
    """A running progress bar."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Advance by ``count`` steps; a non-empty ``note`` replaces the text after the bar."""


class _RichBar:
    """Progress bar of ``rich``."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task, self._note = progress, task, ""

    def advance(self, count: int = 1, note: str = "") -> None:
        self._note = note or self._note
        self._progress.update(self._task, advance=count, note=self._note)  # type: ignore[arg-type]


class LineBar:
    """Progress as plain lines: time of day, title, done/total, remaining time and note.

    The first line is printed at the start, the second with the first note after a step, the last one at the end, and
    the others at least :data:`LINE_SECONDS` apart. If the caller passes notes (training does, every
    ``logging.every_steps``), lines are printed only together with a new note; otherwise at any step.

    Args:
        title: Name of the task.
        total: Number of steps.
        done: Number of steps completed before (a resumed run).
        write: Prints one line.
        clock: Monotonic time in seconds.
        now: Time of day.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        *,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.title, self.total, self.done = title, total, done
        self._write, self._clock, self._now = write, clock, now
        self._start, self._done_before, self._note = clock(), done, ""
        self._printed: tuple[int, str] | None = None
        self._print()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Advance by ``count`` steps, and print a line if one is due."""
        is_first_note = bool(note) and not self._note
        self.done, self._note = self.done + count, note or self._note
        is_new = note or not self._note
        if (is_first_note and self.done > self._done_before) or (is_new and self._clock() - self._last >= LINE_SECONDS):
            self._print()

    def close(self) -> None:
        """Print the last line, unless it has been printed already."""
        if self._printed != (self.done, self._note):
            self._print()

    def _print(self) -> None:
        self._last, self._printed = self._clock(), (self.done, self._note)
        parts = [f"{self._now():%H:%M:%S}", self.title, f"{self.done}/{self.total}", self._eta(), self._note]
        self._write(printable("  ".join(part for part in parts if part)))

    def _eta(self) -> str:
        """Remaining time at the mean speed so far; empty before the first step."""
        advanced = self.done - self._done_before
        if advanced <= 0:
            return ""
        seconds = (self._last - self._start) / advanced * max(0, self.total - self.done)
        return f"eta {timedelta(seconds=round(seconds))}"


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show the progress of the block: a bar in a terminal, lines (:class:`LineBar`) otherwise.

    Args:
        title: Name of the task.
        total: Number of steps.
        done: Number of steps completed before (a resumed run).
    """
    if not (console.file.isatty() or console.is_jupyter):
        lines = LineBar(title, total, done, write=say)
        try:
            yield lines
        finally:
            lines.close()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not _is_main()) as progress:
        yield _RichBar(progress, progress.add_task(title, total=total, completed=done, note=""))


def say(message: str) -> None:
    """Print one line on the main process."""
    if _is_main():
        console.print(message, markup=False)


def warn(message: str) -> None:
    """Print one warning line on the main process."""
    if _is_main():
        console.print(f"warning: {message}", style="yellow", markup=False)


def tables(rows: Sequence[Sequence[str]], header: Sequence[str], names: int = 1) -> None:
    """:func:`table`, in several one below the other where not all columns of numbers fit side by side.

    Args:
        rows: Names in the first columns, which are repeated.
        header: Of each column; its words may be wrapped.
        names: Number of columns of names.
    """
    parts: list[list[int]] = []
    columns = [[*header[i].split(), *(row[i] for row in rows)] for i in range(len(header))]
    widths = [2 + max(map(len, column), default=0) for column in columns]
    for i in range(names, len(header)):
        if not parts or sum(widths[j] for j in (*parts[-1], i)) > Console().width + 2:
            parts.append([*range(names)])
        parts[-1].append(i)
    for number, part in enumerate(parts):
        if number:
            say("")
        table([[row[i] for i in part] for row in rows], [header[i] for i in part])


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
    """Print rows in aligned columns on the main process; the first column is never wrapped."""
    if not _is_main():
        return
    aligned = Table(box=None, show_header=bool(header), header_style="bold", pad_edge=False)
    for row in rows:
        while len(aligned.columns) < max(len(row), len(header)):
            i = len(aligned.columns)
            aligned.add_column(header[i] if header else "", no_wrap=i == 0, overflow="fold")
        aligned.add_row(*row)
    Console(highlight=False).print(aligned, markup=False)


def show(renderable: RenderableType) -> None:
    """Print a renderable at the terminal's width (80 columns without a terminal), at most 100 columns."""
    if _is_main():
        console.print(renderable, soft_wrap=False, width=min(console.width, MAX_WIDTH))


def _is_main() -> bool:
    if "RANK" not in os.environ:  # the only process: torch, whose import takes seconds, is not needed to know that
        return True
    from dino import distributed

    return distributed.is_main()
