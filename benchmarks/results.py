"""One format for all results: a JSON line for each row, and a table for people."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measure import Row

COLUMNS = ("what", "ours", "beside", "theirs", "ratio", "wanted", "of the limit", "note")
FIELDS = {field.name for field in fields(Row)}


def record(row: Row, benchmark: str, limits: dict[str, float], facts: dict[str, Any], path: Path | None) -> Row:
    """Complete a row with the limit of its hardware, and append it to the results.

    Args:
        row: What was measured.
        benchmark: The benchmark's name.
        limits: What the machine gave at best in the same run.
        facts: Date, commit, hardware, versions and load.
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
    """What the hardware allows: by matrix products where the row counts its operations, by copies where its bytes."""
    if row.limit is not None or row.skipped:
        return row
    work, data = row.details.get("gflop_per_item"), row.details.get("bytes_per_item")
    if work:
        precision = row.details.get("precision", "bf16")
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
        table.add_column(title, justify="left" if title in ("what", "beside", "note") else "right")
    for row in rows:
        table.add_row(*cells(row))
    return table


def markdown(path: Path) -> str:
    """The rows of a results file as a Markdown table; of a row that was measured several times the last one."""
    rows: dict[tuple[str, str], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        values = {name: value for name, value in json.loads(line).items() if name in FIELDS}
        rows[values["name"], values.get("comparator", "")] = Row(**values)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows.values()]) + "\n"


def cells(row: Row) -> list[str]:
    """A row's cells."""
    if row.skipped:
        return [row.name, "skipped", "", "", "", "", "", row.skipped]
    wanted = "" if row.target is None else f"{row.target:g}" + ("" if row.met else " (not met)")
    return [
        row.name,
        f"{_number(row.ours)} {row.unit}",
        row.comparator,
        "" if row.theirs is None else _number(row.theirs),
        ratio(row),
        wanted,
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
    name, ours, beside, theirs, times, wanted, _, note = cells(row)
    parts = [
        f"{name}: {ours}",
        f"{beside} {theirs}: ratio {times}" if beside else "",
        f"wanted {wanted}" if wanted else "",
    ]
    return "; ".join(part for part in [*parts, note] if part)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
