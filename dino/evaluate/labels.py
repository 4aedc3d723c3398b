"""The table of labels that judges a model, and whether the model has seen its test slides."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino.errors import DataError

COLUMNS = ("image_path", "label", "partition")
PARTITIONS = {"train": "train", "reference": "train", "test": "test", "query": "test"}
MISSING = {"", "nan", "<na>"}
NAMED = 3  # how many offenders an error names


@dataclass(frozen=True)
class LabelTable:
    """One row per labelled image.

    Attributes:
        paths: Where the images (or ``.pt`` grids) are; all exist.
        labels: Class names.
        partition: ``train`` (the reference set) or ``test`` (the queries).
        slide_ids: Slide of each row, None without that column.
        patient_ids: Patient of each row, None without that column.
    """

    paths: list[Path]
    labels: list[str]
    partition: list[str]
    slide_ids: list[str] | None = None
    patient_ids: list[str] | None = None

    def rows(self, partition: str) -> list[int]:
        """Indices of the rows of ``train`` or of ``test``."""
        return [i for i, name in enumerate(self.partition) if name == partition]

    @property
    def classes(self) -> list[str]:
        """The class names, sorted."""
        return sorted(set(self.labels))


def read_labels(path: Path) -> LabelTable:
    """Read ``image_path,label,partition[,slide_id,patient_id]``.

    Labels are of any kind: text, whole numbers (1 and 1.0 are one class), booleans. The partition is train or test
    (also spelt reference or query). Relative paths are taken from the table's own folder.

    Args:
        path: A CSV file.

    Returns:
        The table.

    Raises:
        DataError: For a missing file or column, an unknown partition, a blank label, labels that name missing files,
            a partition without rows, or a single class.
    """
    rows = _read_csv(path)
    labels = _canonical([row["label"] for row in rows])
    _refuse(path, [i for i, label in enumerate(labels) if label.lower() in MISSING], "a label", "blank ones")
    partition = [PARTITIONS.get(row["partition"].lower(), "") for row in rows]
    _refuse(path, [i for i, name in enumerate(partition) if not name], "train or test as partition", "others")
    paths = [path.parent / Path(row["image_path"]).expanduser() for row in rows]
    absent = [p for p in paths if not p.is_file()]
    if absent:
        raise DataError(
            f"{path}: expected every image_path to exist, found {len(absent)} of {len(paths)} missing "
            f"({_first(absent)}); relative paths are taken from {path.parent}"
        )
    for wanted in ("train", "test"):
        if wanted not in partition:
            raise DataError(f"{path}: expected rows of partition train and test, found none of {wanted}")
    if len(set(labels)) < 2:
        raise DataError(f"{path}: expected at least two classes, found only '{labels[0]}'")
    return LabelTable(paths, labels, partition, _column(rows, "slide_id"), _column(rows, "patient_id"))


def check_leakage(table: LabelTable, training_slides: Mapping[str, Any] | None, allow: bool) -> dict[str, Any]:
    """Refuse to judge a model on slides or patients that it was pretrained on.

    Without a ``slide_id`` column the slide is read from the file names (``<slide>_<x>_<y>``, from the right); a name
    that is not of this form is compared as a whole.

    Args:
        table: The labels.
        training_slides: ``slide_ids`` and ``patient_ids`` that the checkpoint carries; None or empty if it has none.
        allow: Go on with the seen ones, which are then part of what is returned.

    Returns:
        Facts for the report: ``compared`` (in words), ``seen_slides``, ``seen_patients`` and ``allowed``.

    Raises:
        DataError: If test rows are from slides or patients of the pretraining, and ``allow`` is off.
    """
    trained = {key: {str(i) for i in (training_slides or {}).get(key) or []} for key in ("slide_ids", "patient_ids")}
    test = table.rows("test")
    named = table.slide_ids or [""] * len(table.paths)
    slides = {named[i] or slide_of_name(table.paths[i].name) for i in test}
    seen_slides = sorted(slides & trained["slide_ids"])
    patients = {table.patient_ids[i] for i in test} if table.patient_ids else set()
    seen_patients = sorted((patients - {""}) & trained["patient_ids"])
    facts = {
        "compared": _compared(table, trained),
        "seen_slides": seen_slides,
        "seen_patients": seen_patients,
        "allowed": bool(allow and (seen_slides or seen_patients)),
    }
    if (seen_slides or seen_patients) and not allow:
        kind, seen = ("slides", seen_slides) if seen_slides else ("patients", seen_patients)
        raise DataError(
            f"expected test {kind} that the model has not been pretrained on, found {len(seen)} that it has "
            f"({_first(seen)}); take them out, or accept an optimistic score with allow_leakage=true"
        )
    return facts


def slide_of_name(name: str) -> str:
    """Slide of a file named ``<slide>_<x>_<y>.<ext>``, parsed from the right; the whole stem of any other name."""
    stem = Path(name).stem
    parts = stem.rsplit("_", 2)
    return parts[0] if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit() else stem


def _compared(table: LabelTable, trained: Mapping[str, set[str]]) -> str:
    if not trained["slide_ids"] and not trained["patient_ids"]:
        return "nothing: the model does not say which slides it was pretrained on"
    what = []
    if trained["slide_ids"]:
        what.append("slides by slide_id" if table.slide_ids else "slides by file name")
    if trained["patient_ids"] and table.patient_ids:
        what.append("patients by patient_id")
    return " and ".join(what) or "nothing: the labels have no patient_id"


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{k: (v or "").strip() for k, v in row.items() if isinstance(k, str)} for row in reader]
            columns = reader.fieldnames or []
    except FileNotFoundError:
        raise DataError(f"expected a table of labels at {path}, found none") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"expected a CSV of labels at {path}, could not read it: {error}") from None
    lacking = [name for name in COLUMNS if name not in columns]
    if lacking:
        raise DataError(f"{path}: expected columns {', '.join(COLUMNS)}; missing {', '.join(lacking)}")
    if not rows:
        raise DataError(f"{path}: expected labelled images, found no row")
    return rows


def _canonical(labels: Sequence[str]) -> list[str]:
    """One spelling per class: 1 and 1.0, True and true, as tables written by different programs mix them."""
    if {label.lower() for label in labels} <= {"true", "false"}:
        return [label.lower() for label in labels]
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return list(labels)
    return [f"{number:.12g}" for number in numbers]


def _column(rows: Sequence[Mapping[str, str]], name: str) -> list[str] | None:
    values = [row.get(name) or "" for row in rows]
    return values if any(values) else None


def _refuse(path: Path, rows: Sequence[int], expected: str, found: str) -> None:
    if rows:  # line 1 is the header
        lines = _first([i + 2 for i in rows])
        raise DataError(f"{path}: expected {expected} in every row, found {len(rows)} {found} (line {lines})")


def _first(items: Iterable[object]) -> str:
    items = list(items)
    return ", ".join(str(i) for i in items[:NAMED]) + (", ..." if len(items) > NAMED else "")
