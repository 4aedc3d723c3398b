"""What a run came to, on one screen: read from the run's own files, so that it can be shown again at any time."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dino.config.schema import PretrainConfig, RegionConfig
from dino.files import printable
from dino.slides.tables import REGIONS_TABLE
from dino.train.checkpoint import BEST, LAST
from dino.train.run_folder import RunFolder

WARNINGS = 2  # shown; status.json has all
TITLES = {"finished": "finished", "early_stopped": "stopped early: no better score for a while"}
COLOURS = {"learning": "green", "flat": "yellow", "collapsed": "red"}

Rows = list[tuple[str, str]]


def closing_screen(folder: RunFolder, config: PretrainConfig) -> RenderableType:
    """The summary of a run that is over, for a terminal of any width from 60 columns.

    Args:
        folder: The run folder.
        config: The run's settings.
    """
    status, lines = folder.status(), folder.log_lines()
    losses = [line for line in lines if "loss" in line]
    verdict: Mapping[str, str] = status.get("verdict") or {"word": "", "text": "none"}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    parts = [
        [*_course(status, losses), *_scores(status, lines, config.evaluate.k), *_trouble(status)],
        [("verdict", verdict["text"])],
        _results(folder.path, status, config),
    ]
    for i, rows in enumerate(parts):
        if i:
            grid.add_row()
        for name, text in rows:
            shown = Text(text)
            if name == "verdict":
                shown.stylize(f"bold {COLOURS.get(verdict['word'], '')}", 0, len(verdict["word"]))
            grid.add_row(Text(name), shown)
    level = "region" if isinstance(config, RegionConfig) else "patch"
    title = f"pretrain {level}: {TITLES.get(status.get('state', ''), status.get('state', ''))}"
    return Panel(grid, title=Text(title, "bold"), title_align="left", padding=(0, 2))


def _course(status: Mapping[str, Any], losses: Sequence[Mapping[str, float]]) -> Rows:
    """Steps, time and loss."""
    rows = [("steps", f"{status.get('step', 0):,} of {status.get('total_steps', 0):,}")]
    if not losses:
        return rows
    first, last = losses[0], losses[-1]
    rows[0] = ("steps", f"{rows[0][1]}, {last['epoch']:.4g} passes over the data")
    seconds = sum(line["seconds"] for line in losses)
    samples = sum(line["seconds"] * line["samples_per_second"] for line in losses)
    rows.append(("time", f"{timedelta(seconds=round(seconds))}, {samples / max(seconds, 1e-9):,.1f} img/s"))
    shares = f"{first['loss_relative']:.3f} -> {last['loss_relative']:.3f} of ln K"
    return [*rows, ("loss", f"{first['loss']:.3f} -> {last['loss']:.3f} ({shares})")]


def _scores(status: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], k: Sequence[int]) -> Rows:
    """The best and the last score beside the floor."""
    tracked = f"knn_{k[0]}_accuracy" if k else ""
    judged = [(line["step"], line["evaluation"]) for line in lines if "evaluation" in line]
    scores = [(step, found["teacher"][tracked]) for step, found in judged if tracked in found.get("teacher", {})]
    if scores:
        step, best = max(scores, key=lambda score: score[1])  # the first of equals, as the judge counts
        floor = next((f["untrained"][tracked] for _, f in judged if tracked in f.get("untrained", {})), None)
        beside = "" if floor is None else f", untrained {floor:.3f}"
        return [(f"{k[0]}-NN", f"best {best:.3f} at step {step:,}, last {scores[-1][1]:.3f}{beside}")]
    floor = status.get("floor")
    if not floor:
        return []
    found, untrained = floor["own_place_teacher"], floor["own_place_untrained"]
    return [("second view", f"found for {found:.1%} of the samples, untrained {untrained:.1%}")]


def _trouble(status: Mapping[str, Any]) -> Rows:
    """Bad files and warnings."""
    bad, warnings = status.get("bad_files", 0), [printable(text) for text in status.get("warnings", [])]
    rows = [("bad files", f"{bad:,}, listed in quarantine.csv" if bad else "none")]
    if not warnings:
        return [*rows, ("warnings", "none")]
    more = len(warnings) - WARNINGS
    shown = warnings[:WARNINGS] + ([f"and {more} more in status.json"] if more > 0 else [])
    return [*rows, *[("warnings" if i == 0 else "", text) for i, text in enumerate(shown)]]


def _results(run: Path, status: Mapping[str, Any], config: PretrainConfig) -> Rows:
    """Where the network is, and what to do with it."""
    name, root = printable(run), printable(config.data_dir)
    best = (run / "checkpoints" / BEST).exists()
    rows = [("checkpoint", f"{name}/checkpoints/{BEST if best else LAST}")]
    if (run / "backbone" / "config.json").exists():
        rows.append(("export", f"{name}/backbone (of that checkpoint, for timm)"))
    steps = [f"dino evaluate knn {name} labels.csv"]
    if (Path(config.data_dir) / REGIONS_TABLE).exists():
        steps.insert(0, f"dino extract {name} {root}")
    return [*rows, *[("next" if i == 0 else "", text) for i, text in enumerate(steps)]]
