"""Section of the report on which tiles a run was trained on: shares of groups, and what its filter left out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dino.report.page import Section, Table

if TYPE_CHECKING:
    from dino.report.data import RunData


def sampling_sections(runs: Sequence["RunData"]) -> list[Section]:
    """One section, if a run filtered its tiles or balanced its draws."""
    filters = {run.name: (run.status.get("data") or {}).get("filter") for run in runs}
    tables = [_left_out(name, found) for name, found in filters.items() if found]
    tables += [_shares(run.name, run.status["sampling"]) for run in runs if run.status.get("sampling")]
    if not tables:
        return []
    introduction = (
        "Tiles that a filter left out, and shares of the groups that draws were balanced over: as set, and of the "
        "samples trained on so far."
    )
    return [Section("Sampling", introduction, tables)]


def _left_out(name: str, found: dict[str, Any]) -> Table:
    rows = [
        (condition, f"{count:,}", f"{count / found['tiles']:.2%}") for condition, count in found["left_out"].items()
    ]
    caption = (
        f"{name}: tiles of {found['tiles']:,} that were left out, each for the first condition that it did not meet."
    )
    return Table(["condition", "left out", "share"], rows, caption)


def _shares(name: str, found: dict[str, Any]) -> Table:
    rows = [
        (one["group"], f"{one['tiles']:,}", f"{one['expected']:.2%}", f"{one['realised']:.2%}")
        for one in found["shares"]
    ]
    number = f"{found['groups']:,} groups"
    if len(rows) < found["groups"]:
        least, most = found["expected"]
        number += f", of which the {len(rows)} that deviate most are shown; shares are from {least:.2%} to {most:.2%}"
    by = ", ".join(found["columns"]) or "none"
    caption = f"{name}: {found['draws']:,} draws of {found['tiles']:,} tiles, by {by}: {number}."
    return Table(
        ["group", "tiles", "expected", "realised"],
        rows,
        f"{caption} Largest deviation {found['largest_deviation']:.2%}.",
    )
