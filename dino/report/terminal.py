"""The summary of a completed run for the terminal, from the files in its folder."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dino.config.schema import PretrainConfig
from dino.errors import DataError
from dino.evaluate.labels import read_labels
from dino.evaluate.verdict import FROZEN, INITIAL, TEACHER, baselines_of, in_words
from dino.files import printable
from dino.report.methods import split_of
from dino.slides.tables import REGIONS_TABLE
from dino.train.checkpoint import BEST, LAST
from dino.train.evaluator import OWN_PLACE
from dino.train.run_folder import RunReader

WARNINGS_SHOWN = 2  # status.json contains all
TITLES = {"finished": "finished", "early_stopped": "stopped early: the score has not improved"}
COLOURS = {"learning": "green", "flat": "yellow", "declined": "red", "collapsed": "red"}

Rows = list[tuple[str, str]]


def run_panel(run: RunReader, config: PretrainConfig) -> RenderableType:
    """Steps, time, losses, scores, warnings, verdict and files, for a terminal of 60 columns or more.

    Args:
        run: The run folder.
        config: The run's settings.
    """
    status, lines = run.status(), run.log_lines()
    losses = [line for line in lines if "loss" in line]
    verdict: Mapping[str, str] = status.get("verdict") or {"word": "", "text": "none"}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    parts = [
        [*_progress(status, losses), *_scores(status, lines, config), *_problems(status)],
        [("verdict", verdict["text"])],
        _files(run.path),
    ]
    for i, rows in enumerate(parts):
        if i:
            grid.add_row()
        for name, text in rows:
            shown = Text(text)
            if name == "verdict":
                shown.stylize(f"bold {COLOURS.get(verdict['word'], '')}", 0, len(verdict["word"]))
            grid.add_row(Text(name), shown)
    title = f"pretrain {run.level()}: {TITLES.get(status.get('state', ''), status.get('state', ''))}"
    return Panel(grid, title=Text(title, "bold"), title_align="left", padding=(0, 2))


def _progress(status: Mapping[str, Any], losses: Sequence[Mapping[str, float]]) -> Rows:
    """Steps, data, time and losses."""
    rows = [("steps", f"{status.get('step', 0):,} of {status.get('total_steps', 0):,}")]
    if split := split_of(status):
        rows.append(("data", str(split)))
    if not losses:
        return rows
    first, last = losses[0], losses[-1]
    rows[0] = ("steps", f"{rows[0][1]}, {last['epoch']:.4g} passes over the data")
    seconds = sum(line["seconds"] for line in losses)
    samples = sum(line["seconds"] * line["samples_per_second"] for line in losses)
    rows.append(("time", f"{timedelta(seconds=round(seconds))}, {samples / max(seconds, 1e-9):,.1f} img/s"))
    names = [name for name in last if name == "loss" or name.startswith("loss/")]
    if len(names) == 2:  # a single objective: its loss is the sum
        names = ["loss"]
    for name in names:
        if name not in first:  # an objective that was not logged at the first step
            continue
        text = f"{first[name]:.3f} -> {last[name]:.3f}"
        relative = f"{name}_relative"
        if relative in first and relative in last:
            text += f" ({first[relative]:.3f} -> {last[relative]:.3f} of ln K)"
        rows.append((name, text))
    return rows


def _scores(status: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], config: PretrainConfig) -> Rows:
    """The best and the last score, and those of the baselines."""
    k, pretrained = config.evaluate.k, bool(config.model.init)
    tracked = f"knn_{k[0]}_accuracy" if k else ""
    evaluations = [(line["step"], line["evaluation"]) for line in lines if "evaluation" in line]
    scores = [(step, found[TEACHER][tracked]) for step, found in evaluations if tracked in found.get(TEACHER, {})]
    if scores:
        found = [baselines_of(found, pretrained) for _, found in evaluations]
        first = {name: values[tracked] for one in reversed(found) for name, values in one.items() if tracked in values}
        start = [(0, first[INITIAL])] if INITIAL in first else []
        step, best = max([*start, *scores], key=lambda score: score[1])  # the first of equal ones, as for best.pt
        row = (f"{k[0]}-NN", f"best {best:.3f} at step {step:,}, last {scores[-1][1]:.3f}{_shown(first, '.3f')}")
        return [row, *_self_retrieval(status, pretrained)] if FROZEN in first else [row]
    return _self_retrieval(status, pretrained)


def _self_retrieval(status: Mapping[str, Any], pretrained: bool) -> Rows:
    """The last self-retrieval accuracy, and those of the baselines."""
    numbers = {name.removeprefix(OWN_PLACE): number for name, number in (status.get("floor") or {}).items()}
    if TEACHER not in numbers:
        return []
    baselines = _shown(baselines_of(numbers, pretrained), ".1%")
    return [("self-retrieval", f"{numbers[TEACHER]:.1%} of the samples{baselines}")]


def _shown(baselines: Mapping[str, float], style: str) -> str:
    return "".join(f", {in_words(name)} {value:{style}}" for name, value in baselines.items())


def _problems(status: Mapping[str, Any]) -> Rows:
    """Unreadable files and warnings."""
    bad, warnings = status.get("bad_files", 0), [printable(text) for text in status.get("warnings", [])]
    rows = [("bad files", f"{bad:,}, listed in quarantine.csv" if bad else "none")]
    if not warnings:
        return [*rows, ("warnings", "none")]
    more = len(warnings) - WARNINGS_SHOWN
    shown = warnings[:WARNINGS_SHOWN] + ([f"and {more} more in status.json"] if more > 0 else [])
    return [*rows, *[("warnings" if i == 0 else "", text) for i, text in enumerate(shown)]]


def next_commands(run: Path, config: PretrainConfig) -> list[str]:
    """Commands that use a completed run, quoted for the shell; each is printed on one line, so that it can be copied.

    Args:
        run: The run folder.
        config: The run's settings.
    """
    quoted = shlex.quote(printable(run))
    labels = config.evaluate.labels
    commands = [f"dino evaluate knn {quoted} labels.csv"] if labels is None else []
    if labels is not None and _has_test_rows(Path(labels)):  # which did not choose the checkpoint
        allowed = " allow_leakage=true" if config.evaluate.allow_leakage else ""
        commands = [f"dino evaluate knn {quoted} {shlex.quote(printable(labels))}{allowed}"]
    if (Path(config.data_dir) / REGIONS_TABLE).exists():
        commands.insert(0, f"dino extract {quoted} {shlex.quote(printable(config.data_dir))}")
    return commands


def _has_test_rows(labels: Path) -> bool:
    try:
        return bool(read_labels(labels).rows("test"))
    except DataError:  # also where there are none
        return False


def _files(run: Path) -> Rows:
    """Paths of checkpoint and export."""
    name = printable(run)
    best = (run / "checkpoints" / BEST).exists()
    rows = [("checkpoint", f"{name}/checkpoints/{BEST if best else LAST}")]
    if (run / "backbone" / "config.json").exists():
        rows.append(("export", f"{name}/backbone (of that checkpoint, for timm)"))
    return rows
