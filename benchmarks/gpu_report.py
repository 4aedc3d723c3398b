"""The results of ``make gpu``: a JSON file that is kept up to date, and a figure."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dino import progress
from dino.files import write_json

Event = dict[str, Any]  # what happened in a part: its state, a note, a benchmark's row, or named results

OURS, THEIRS = "#1f77b4", "#999999"


@dataclass
class Report:
    """Everything that is known so far; saved after each change.

    Attributes:
        path: The JSON file.
        content: Its content.
    """

    path: Path
    content: dict[str, Any]
    started: float = field(default_factory=time.monotonic)

    def apply(self, event: Event) -> None:
        """Record an event of a part."""
        part = self.part(event["part"])
        if event.get("state") == "running":
            part["started"] = time.monotonic()
        if "row" in event:
            self.content["rows"].append(event["row"])
            event = {key: value for key, value in event.items() if key != "row"}
        elif event.get("note"):
            part["note"] = event["note"]
        if event.get("note"):
            progress.say(f"  {event['part']}: {event['note']}")
        part["seconds"] = round(time.monotonic() - part.get("started", time.monotonic()), 1)
        for key, value in event.items():
            if key in ("tests", "processes", "training"):
                self.content[key] = value
            elif key in ("state", "traceback"):
                part[key] = value
        self.save()

    def part(self, name: str) -> dict[str, Any]:
        """The entry of a part."""
        return next(part for part in self.content["parts"] if part["name"] == name)

    def running(self) -> dict[str, Any] | None:
        """The entry of the part that is running, if any."""
        return next((part for part in self.content["parts"] if part["state"] == "running"), None)

    def waiting(self) -> list[str]:
        """Names of the parts that have not been started."""
        return [part["name"] for part in self.content["parts"] if part["state"] == "waiting"]

    def failed(self) -> list[str]:
        """Names of the parts that failed."""
        return [part["name"] for part in self.content["parts"] if part["state"] == "failed"]

    def save(self) -> None:
        """Write the JSON file atomically."""
        self.content["seconds"] = round(time.monotonic() - self.started, 1)
        write_json(self.path, self.content)


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw loss curve, environment, and ratios of the benchmarks.

    Args:
        content: Content of ``gpu.json``.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if row.get("ours") is not None]
    figure = Figure(figsize=(14, 5 + 0.28 * len(rows)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[4, 1.2 + 0.28 * len(rows)])
    _curve(figure.add_subplot(grid[0, 0]), content.get("training"))
    _facts(figure.add_subplot(grid[0, 1]), content)
    _bars(figure.add_subplot(grid[1, :]), rows)
    figure.savefig(path)


def _curve(axes: Any, training: dict[str, Any] | None) -> None:
    if not training or not training.get("curve"):
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        return
    curve = training["curve"]
    axes.plot([line["step"] for line in curve], [line["loss"] for line in curve], color=OURS)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    knn = training.get("knn", {})
    scores = "".join(f"; {name} {value:.3f}" for name, value in knn.items())
    facts = f"{training['images_per_second']:,.0f} img/s" + (f"; {training['k']}-NN accuracy{scores}" if knn else "")
    axes.set_title(f"{training['settings']['model.arch']}: {facts}\ntiles: {training['tiles']}", fontsize=9)


def _facts(axes: Any, content: dict[str, Any]) -> None:
    axes.axis("off")
    facts = content["environment"]
    names = ("device", "gpus", "memory_gb", "driver", "cuda", "cudnn", "nccl", "precision", "cores", "commit", "date")
    lines = [f"{name}: {facts[name]}" for name in names if facts.get(name) not in (None, "")]
    lines += [", ".join(f"{name} {version}" for name, version in list(facts["versions"].items())[:4]), ""]
    for part in content["parts"]:
        lines.append(f"{part['name']}: {part['state']}, {part.get('seconds', 0):.0f} s")
    axes.text(0, 1, "\n".join(lines), va="top", fontsize=8, family="monospace", transform=axes.transAxes)


def _bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.set_title("benchmarks: speed relative to the comparator (1: equal)")
    compared = [row for row in rows if row.get("ratio") is not None]
    others = [row for row in rows if row.get("ratio") is None]
    labels = []
    for index, row in enumerate(compared + others):
        ratio = row.get("ratio") or 0
        axes.barh(index, ratio, color=OURS)
        share = f", {row['ours'] / row['limit']:.0%} of {row['limited_by']}" if row.get("limit") else ""
        rate = f"{row['ours']:,.3g} {row['unit']}" if row["ours"] < 100 else f"{row['ours']:,.0f} {row['unit']}"
        beside = f"{ratio:.2f} x {row['comparator']}; " if row.get("ratio") is not None else ""
        axes.text(ratio, index, f" {beside}{rate}{share}", va="center", fontsize=8)
        labels.append(row["name"])
    axes.axvline(1, color=THEIRS, linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.8 * max([1.0, *(row["ratio"] for row in compared)]))
