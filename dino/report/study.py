"""The section for whoever answers for a study: which slides were used, and what the training took."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dino.files import printable
from dino.report.data import RootData, RunData
from dino.report.page import Section, Table
from dino.slides.partitions import PRETRAIN
from dino.slides.tables import OK, SlideStatus

LISTED = 100  # rows of a table
WORDS = {"failed": "failed", "no_tissue": "no tissue", "excluded": "excluded"}
NOT_RECORDED = "not recorded"


def study_section(root: RootData | None, runs: Sequence[RunData]) -> Section | None:
    """Slides, patients, centres, spacings, hours and energy; None if nothing of it is known.

    Args:
        root: Tables of the data folder, if there are any.
        runs: The runs.
    """
    items = [*(_of_slides(root) if root else ()), *([_cost(runs)] if runs else [])]
    introduction = "For the principal investigator: what the results rest on, and what they took."
    return Section("Study", introduction, items) if items else None


def _of_slides(root: RootData) -> list[Table]:
    rows = list(root.status.values())
    used = [row for row in root.tiled if row.partition in PRETRAIN]
    held = [row for row in root.tiled if row.partition not in PRETRAIN]
    groups = {"used for pretraining": used, **{f"held out ({word})": found for word, found in _by_partition(held)}}
    groups |= {WORDS[word]: [row for row in rows if row.status == word] for word in WORDS}
    counts = [
        [
            name,
            f"{len(found):,}",
            _patients(found),
            *(f"{sum(numbers.get(row.slide_id, 0) for row in found):,}" for numbers in (root.tiles, root.regions)),
        ]
        for name, found in groups.items()
        if found or name == "used for pretraining"
    ]
    head = ["Slides", "number", "patients", "tiles", "regions"]
    tables = [Table(head, counts, "Slides in the data folder. Patients are those of the slide list, where it has any.")]
    origins = [
        [f"{title}: {value or NOT_RECORDED}", *(f"{_matches(found, column, value):,}" for found in (used, held))]
        for column, title in (("centre", "centre"), ("scanner", "scanner"), ("stain", "stain"))
        for value, _ in Counter(getattr(row, column) for row in root.tiled).most_common(LISTED)
        if any(getattr(row, column) for row in root.tiled)
    ]
    origins += [
        [f"spacing: {value}", *(f"{_matches(found, 'spacing_um', value):,}" for found in (used, held))]
        for value in dict.fromkeys(_spacing(row) for row in root.tiled)
    ][:LISTED]
    if origins:
        tables.append(Table(["Origin of slides", "used", "held out"], origins, _resampled(root)))
    left = [
        [printable(row.slide_id), WORDS[row.status], printable(row.reason) or NOT_RECORDED]
        for row in rows
        if row.status != OK
    ]
    if left:
        tables.append(_long(["Slide", "status", "reason"], left, "Slides that are not used, and why"))
    return tables


def _by_partition(rows: Sequence[SlideStatus]) -> Iterable[tuple[str, list[SlideStatus]]]:
    for word in sorted({row.partition for row in rows}):
        yield printable(word), [row for row in rows if row.partition == word]


def _patients(rows: Sequence[SlideStatus]) -> str:
    known, unknown = {row.patient_id for row in rows if row.patient_id}, sum(not row.patient_id for row in rows)
    if not known:
        return NOT_RECORDED if rows else "0"
    return f"{len(known):,}" + (f", not recorded of {unknown:,} slides" if unknown else "")


def _spacing(row: SlideStatus) -> str:
    return f"{row.spacing_um:.3g} µm/px" if row.spacing_um else NOT_RECORDED


def _matches(rows: Sequence[SlideStatus], column: str, value: Any) -> int:
    return sum((_spacing(row) if column == "spacing_um" else getattr(row, column)) == value for row in rows)


def _resampled(root: RootData) -> str:
    spacing = root.settings.get("spacing_um")
    read = f" Tiles are read at {spacing:g} µm/px." if isinstance(spacing, int | float) else ""
    sources = Counter(row.spacing_source for row in root.tiled if row.spacing_source)
    origin = ", ".join(f"{printable(name)} ({count:,})" for name, count in sources.most_common())
    known = f" Where the spacing is known from, and of how many slides: {origin}." if origin else ""
    return f"Spacing is that of the full-resolution image.{read}{known}"


def _long(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    """A table of the first :data:`LISTED` rows, whose caption says how many there are."""
    more = f"; the first {LISTED} of {len(rows):,}" if len(rows) > LISTED else ""
    return Table(head, rows[:LISTED], f"{caption}{more}.", text=True)


def _cost(runs: Sequence[RunData]) -> Table:
    rows = [
        [
            run.name,
            str(run.status.get("state", "unknown")).replace("_", " "),
            f"{run.status.get('step', 0):,} of {run.status.get('total_steps', 0):,}",
            f"{images:,.0f}" if (images := samples(run.lines)) else NOT_RECORDED,
            f"{hours(run.lines):.3g}" if run.lines else NOT_RECORDED,
            f"{energy:.3g}" if (energy := energy_kwh(run)) is not None else NOT_RECORDED,
        ]
        for run in runs
    ]
    head = ["Training", "state", "steps", "samples seen", "hours", "energy of the GPUs, kWh"]
    return Table(
        head,
        rows,
        "Hours are those of training steps, of all processes at the same time, without start, evaluation and saving. "
        "The energy is an estimate: the power that the first GPU reported at each line of the log, times the number of "
        "processes; the rest of the machine and its cooling are not part of it.",
    )


def hours(lines: Sequence[Mapping[str, Any]]) -> float:
    """Hours of the steps of a run, from its log."""
    return sum(line.get("seconds", 0.0) for line in lines) / 3600


def samples(lines: Sequence[Mapping[str, Any]]) -> float:
    """Samples that a run has seen, from its log."""
    return sum(line.get("seconds", 0.0) * line.get("samples_per_second", 0.0) for line in lines)


def energy_kwh(run: RunData) -> float | None:
    """Energy of the GPUs of a run; None where their power was not logged."""
    measured = [line for line in run.lines if "gpu_watts" in line]
    if not measured:
        return None
    joules = sum(line["seconds"] * line["gpu_watts"] for line in measured)
    return joules * run.status.get("processes", 1) / 3.6e6


def quarantine_table(run: RunData) -> Table:
    """The samples of a run that could not be read."""
    rows = [[printable(name), printable(reason)] for name, reason in run.quarantine]
    caption = f"{run.name}: samples that could not be read, and were replaced ({len(rows):,})"
    return _long(["Sample", "reason"], rows, caption)
