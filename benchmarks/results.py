"""The results: environment of a measurement, one JSON line per row, and a table."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.cuda import nccl

from benchmarks.measure import Row
from dino.precision import casts_to_bf16

COLUMNS = ("benchmark", "ours", "comparator", "theirs", "ratio", "target", "of the limit", "note")
FIELDS = {field.name for field in fields(Row)}
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg")
MEASURED = ("dino", "benchmarks", ":!benchmarks/results")  # earlier results do not affect a measurement
ROOT = Path(__file__).resolve().parents[1]


def environment(device: torch.device) -> dict[str, Any]:
    """Date, commit, hardware, versions and current load."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED)),
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Driver, libraries and number formats of a GPU; of a CPU only the number formats."""
    forward = "bf16 autocast" if casts_to_bf16("bf16", device) else "fp32 for bf16"
    facts: dict[str, Any] = {"precision": f"{forward}, weights and averages fp32, logits fp32"}
    facts["tf32_matmul"], facts["tf32_convolution"] = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    if device.type != "cuda":
        return facts
    memory = torch.cuda.get_device_properties(device).total_memory
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        **facts,
        "gpus": torch.cuda.device_count(),
        "memory_gb": round(memory / 1e9, 1),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": (_output(query).splitlines() or [""])[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl.version())),
        "triton": _version("triton"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _git(*words: str) -> str:
    return _output(["git", *words])


def _output(command: list[str]) -> str:
    """Output of a command; empty if it is not installed."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip()


def record(row: Row, benchmark: str, limits: dict[str, float], facts: dict[str, Any], path: Path | None) -> Row:
    """Add the limit of the hardware to a row, and append it to the results.

    Args:
        row: The measured row.
        benchmark: The benchmark's name.
        limits: Limits of the machine, measured in the same run.
        facts: The :func:`environment`.
        path: Results file; None to record nothing.

    Returns:
        The completed row.
    """
    row = with_limit(row, limits)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"benchmark": benchmark, **row.to_dict(), "limits": limits, **facts})
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return row


def with_limit(row: Row, limits: dict[str, float]) -> Row:
    """Add the limit of the hardware: matrix products if the row counts operations, copies if it counts bytes."""
    if row.limit is not None or row.skipped:
        return row
    work, data = row.details.get("gflop_per_item"), row.details.get("bytes_per_item")
    if work:
        precision = row.details.get("precision", "bf16")
        precision = precision if f"matmul_{precision}_gflops" in limits else "fp32"  # on a CPU without bf16
        return replace(
            row, limit=limits[f"matmul_{precision}_gflops"] / work, limited_by=f"{precision} matrix products"
        )
    if data:
        return replace(row, limit=limits["copy_gb_s"] * 1e9 / data, limited_by="copy bandwidth")
    return row


def table_of(rows: Sequence[Row]) -> Table:
    """The table at the end of a run."""
    table = Table(title="more is better; ratio: median (least to greatest) of rounds in turn")
    for title in COLUMNS:
        table.add_column(title, justify="left" if title in ("benchmark", "comparator", "note") else "right")
    for row in rows:
        table.add_row(*cells(row))
    return table


def markdown(path: Path) -> str:
    """The rows of a results file, or of ``gpu.json``, as a Markdown table; of repeated rows the last one."""
    rows: dict[tuple[str, str], Row] = {}
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)["rows"] if path.suffix == ".json" else map(json.loads, text.splitlines())
    for line in found:
        values = {name: value for name, value in line.items() if name in FIELDS}
        rows[values["name"], values.get("comparator", "")] = Row(**values)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows.values()]) + "\n"


def cells(row: Row) -> list[str]:
    """Cells of a row."""
    if row.skipped:
        return [row.name, "skipped", "", "", "", "", "", row.skipped]
    target = "" if row.target is None else f"{row.target:g}" + ("" if row.met else " (not met)")
    return [
        row.name,
        f"{_number(row.ours)} {row.unit}",
        row.comparator,
        "" if row.theirs is None else _number(row.theirs),
        ratio(row),
        target,
        "" if row.limit is None or row.ours is None else f"{row.ours / row.limit:.0%} of {row.limited_by}",
        row.note,
    ]


def ratio(row: Row) -> str:
    """The ratio with its spread."""
    if row.ratio is None or row.spread is None:
        return ""
    return f"{row.ratio:.2f}" + (f" ({row.spread[0]:.2f} to {row.spread[1]:.2f})" if row.rounds > 1 else "")


def summary(row: Row) -> str:
    """A row as one line."""
    if row.skipped:
        return f"{row.name}: skipped, {row.skipped}"
    name, ours, comparator, theirs, times, target, _, note = cells(row)
    parts = [
        f"{name}: {ours}",
        f"{comparator} {theirs}: ratio {times}" if comparator else "",
        f"target {target}" if target else "",
    ]
    return "; ".join(part for part in [*parts, note] if part)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
