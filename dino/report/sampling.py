"""Section of the report on which tiles a run was trained on: shares of groups, and what its filter left out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dino.report.page import Section, Table

if TYPE_CHECKING:
    from dino.report.data import RunData


def sampling_sections(runs: Sequence["RunData"]) -> list[Section]:
    """One section, if a run balanced its draws."""
    tables = [_shares(run.name, run.status["sampling"]) for run in runs if run.status.get("sampling")]
    if not tables:
        return []
    introduction = "Shares of the groups that draws were balanced over: as set, and of the samples trained on so far."
    return [Section("Sampling", introduction, tables)]


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
