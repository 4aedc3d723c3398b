"""Progress if the output is a file or a pipe: plain lines at intervals."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from dino import progress
from dino.progress import LINE_SECONDS, LineBar

PROGRAM = """
import time
from dino import progress
with progress.bar("pretrain patch", 100) as bar:
    for step in range(100):
        bar.advance()
        if step % 10 == 9:
            bar.advance(0, f"loss {1 / step:.3f}")
    progress.warn("a warning between the lines")
    print("still in the block", flush=True)
    time.sleep(60)
"""


class Clock:
    """A clock that is advanced explicitly."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return datetime(2024, 1, 31, 23, 59, 0) + timedelta(seconds=self.seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def line_bar(clock: Clock, title: str, total: int, done: int = 0) -> tuple[LineBar, list[str]]:
    lines: list[str] = []
    return LineBar(title, total, done, write=lines.append, clock=clock, now=clock.now), lines


def test_training_prints_the_first_note_then_at_most_one_line_every_30_seconds(clock: Clock) -> None:
    bar, lines = line_bar(clock, "pretrain patch", 1000, done=100)
    for step in range(101, 201):  # 1 s per step, a note every 7 steps
        clock.seconds += 1
        bar.advance()
        if step % 7 == 0:
            bar.advance(0, f"loss {step}")
    bar.close()
    assert lines == [
        "23:59:00  pretrain patch  100/1000",
        "23:59:05  pretrain patch  105/1000  eta 0:14:55  loss 105",
        "23:59:40  pretrain patch  140/1000  eta 0:14:20  loss 140",  # the first note at least 30 s later
        "00:00:15  pretrain patch  175/1000  eta 0:13:45  loss 175",
        "00:00:40  pretrain patch  200/1000  eta 0:13:20  loss 196",
    ]


def test_a_caller_with_longer_intervals_decides_when_lines_are_printed(clock: Clock) -> None:
    bar, lines = line_bar(clock, "pretrain patch", 1000)
    for step in range(1, 121):  # a note every 50 s
        clock.seconds += 1
        bar.advance()
        if step % 50 == 0:
            bar.advance(0, f"loss {step}")
    assert [line.split("  ")[2] for line in lines] == ["0/1000", "30/1000", "50/1000", "100/1000"]


def test_without_notes_lines_are_printed_every_30_seconds(clock: Clock) -> None:
    bar, lines = line_bar(clock, "embed tiles", 200)
    for _ in range(20):
        clock.seconds += LINE_SECONDS / 2
        bar.advance(10)
    bar.close()
    assert [line.split("  ")[2] for line in lines] == [f"{done}/200" for done in range(0, 201, 20)]
    assert lines[5] == "00:01:30  embed tiles  100/200  eta 0:02:30"
    assert len(lines) == 11  # the last line is not repeated at the end


def test_a_note_before_the_first_step_does_not_repeat_the_first_line(clock: Clock) -> None:
    bar, lines = line_bar(clock, "embed tiles", 2)
    bar.advance(0, "slide a")
    bar.advance(2)
    bar.close()
    assert lines == ["23:59:00  embed tiles  0/2", "23:59:00  embed tiles  2/2  eta 0:00:00  slide a"]


def test_a_short_task_prints_its_start_and_its_end(clock: Clock) -> None:
    bar, lines = line_bar(clock, "check grids", 3)
    for _ in range(3):
        bar.advance()
    bar.close()
    assert lines == ["23:59:00  check grids  0/3", "23:59:00  check grids  3/3  eta 0:00:00"]


def test_notes_stay_on_one_line(clock: Clock) -> None:
    bar, lines = line_bar(clock, "tiling slides", 1)
    bar.advance(note="slide\n\x1b[31m[bold]")
    assert lines[-1].endswith(r"slide\n\x1b[31m[bold]")


def test_a_string_buffer_gets_lines_also_when_the_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.StringIO()
    monkeypatch.setattr(sys, "stdout", buffer)
    with pytest.raises(ZeroDivisionError), progress.bar("[1/2] tiling slides", 5, 2) as bar:
        bar.advance(note="[slide]")
        raise ZeroDivisionError
    first, second = buffer.getvalue().splitlines()
    assert first.endswith("[1/2] tiling slides  2/5")
    assert "3/5  eta 0:00:00  [slide]" in second


def test_other_processes_of_a_job_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress.bar("tiling slides", 5) as bar:
        bar.advance(5)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("colour", ["", "1"])
def test_a_file_gets_lines_without_control_characters_while_the_process_works(tmp_path: Path, colour: str) -> None:
    environment = {**os.environ, "TERM": "xterm-256color", **({"FORCE_COLOR": colour} if colour else {})}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=log, env=environment)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(_until(lambda: b"still in the block" in (tmp_path / "log").read_bytes()))
        content = (tmp_path / "log").read_bytes()
    finally:
        process.kill()
        process.wait()
    lines = content.decode().splitlines()
    assert lines[0].endswith("pretrain patch  0/100")
    assert "10/100  eta" in lines[1] and lines[1].endswith("loss 0.111")
    assert "\x1b" not in lines[0] + lines[1] and "\r" not in content.decode()
    if not colour:  # with FORCE_COLOR, warnings are coloured
        assert "\x1b" not in content.decode()


def _until(condition: Callable[[], bool]) -> float:
    """Wait until the condition holds; returns a timeout for waiting for the process."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return 0.01


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_wide_tables_are_split_so_that_no_number_is_broken(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    header = ["model", *(f"knn {k} balanced accuracy" for k in (10, 20, 100, 200))]
    rows = [
        [name, *(f"0.{row}{k:03} [0.1, 0.9]" for k in (10, 20, 100, 200))] for row, name in enumerate(("one", "other"))
    ]
    progress.tables(rows, header)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines)
    for row in rows:
        shown = [line for line in lines if line.split()[:1] == row[:1]]
        assert len(shown) == {30: 4, 60: 2, 80: 2, 200: 1}[width]
        assert [cell for cell in row[1:] if any(cell in line for line in shown)] == row[1:]


def test_all_columns_of_names_are_repeated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [["linear", f"model {i}", f"score {i} [0.1, 0.9]", f"change {i} [0.1, 0.9]"] for i in range(2)]
    progress.tables(rows, ["evaluation", "model", "score", "difference"], names=2)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    for i in range(2):
        named = [line for line in lines if line.startswith(f"linear      model {i}")]
        assert [line.split("  ")[-1] for line in named] == rows[i][2:]
