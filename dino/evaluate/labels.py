"""Tables of labelled images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dino.errors import DataError
from dino.evaluate.contents import find_copies
from dino.evaluate.tables import MISSING, canonical, check_columns, filled_column, first_few, read_rows, refuse_lines
from dino.files import printable

LABEL = "label"  # column of the labels, unless told otherwise
PLACE = ("slide_id", "x", "y")  # of a tile without a file
PARTITIONS = {"train": "train", "reference": "train", "val": "val", "test": "test", "query": "test"}
STATUS_TABLE = "slides_status.csv"  # of a ROOT


@dataclass(frozen=True)
class LabelTable:
    """One row per labelled image.

    Attributes:
        paths: Where the images (or ``.pt`` grids) are; all exist, unless the rows are not ``stored``.
        labels: Class names.
        partition: ``train`` (the reference set), ``val`` (chooses checkpoints) or ``test`` (the queries); "" for every
            row of a table without partitions.
        slide_ids: Slide of each row, None without that column.
        patient_ids: Patient of each row, None without that column.
        columns: The further columns that were asked for, by name.
        stored: Whether rows are files. Those of a table of tiles by place are not: their paths are the names that
            ``dino tile`` gives tile files, ``<slide>_<x>_<y>.jpg``.
    """

    paths: list[Path]
    labels: list[str]
    partition: list[str]
    slide_ids: list[str] | None = None
    patient_ids: list[str] | None = None
    columns: Mapping[str, list[str]] = field(default_factory=dict)
    stored: bool = True

    def rows(self, partition: str) -> list[int]:
        """Indices of the rows of ``train``, ``val`` or ``test``."""
        return [i for i, name in enumerate(self.partition) if name == partition]

    @property
    def classes(self) -> list[str]:
        """The class names, sorted."""
        return sorted(set(self.labels))

    @property
    def is_split(self) -> bool:
        """Whether the rows have partitions."""
        return bool(self.partition[0])

    @property
    def slides(self) -> list[str]:
        """Slide of each row: that of the column, else of the file's name, see :func:`slide_of_name`."""
        named = self.slide_ids or [""] * len(self.paths)
        return [name or slide_of_name(path.name) for name, path in zip(named, self.paths, strict=True)]

    def groups(self) -> tuple[list[str], str]:
        """What rows depend on one another by: the patient of each row, else its slide, else the row itself.

        A row without a patient, in a table that has patients, is of a patient of its slide's own.

        Returns:
            The group of each row, and ``patients``, ``slides`` or ``rows``.
        """
        slides = self.slides
        if self.patient_ids:
            patients = {slide: one for slide, one in zip(slides, self.patient_ids, strict=True) if one}
            return [patients.get(slide, f"slide {slide}") for slide in slides], "patients"
        if self.slide_ids or any(slide != path.stem for slide, path in zip(slides, self.paths, strict=True)):
            return slides, "slides"
        return [str(row) for row in range(len(slides))], "rows"


def read_labels(
    path: Path,
    required: Sequence[str] = ("train", "test"),
    partition_is_optional: bool = False,
    columns: Sequence[str] = (),
    label: str = LABEL,
) -> LabelTable:
    """Read ``image_path,label,partition[,slide_id,patient_id]``, and further columns.

    Tiles that are not stored as files have ``slide_id,x,y`` (level-0 px, as in ``tiles.csv``) instead of
    ``image_path``.

    Labels may be text, numbers (1 and 1.0 are one class) or booleans. The partition is train, val or test; reference is
    equivalent to train, and query to test. Relative paths resolve from the table's folder.

    Args:
        path: A text file of columns separated by commas, semicolons or tabs, whichever the header line contains.
        required: Partitions that must have rows.
        partition_is_optional: Whether a table without that column will do; its rows are of partition "".
        columns: Further columns, which must have a value in every row.
        label: Column of the labels. Rows where it is blank are an error, or left out if it is another one than
            ``label``, such as ``annotation`` of ``tiles.csv``.

    Returns:
        The table.

    Raises:
        DataError: If the table, a column or a labelled file is missing, a file or a copy of it is in two rows, a
            partition is unknown or has no rows, a label or a value of a further column is blank, or there is only one
            class.
    """
    rows = read_rows(path, (label,) if partition_is_optional else (label, "partition"))
    if label != LABEL:
        rows = [row for row in rows if row[label].lower() not in MISSING]
        if not rows:
            raise DataError(f"{path}: expected rows with a value in the column {label}, found none")
    stored = "image_path" in rows[0] or not {*PLACE} <= rows[0].keys()
    check_columns(path, list(rows[0]), ("image_path",) if stored else PLACE)
    further = {name: filled_column(path, rows, name) for name in columns}
    labels = canonical([row[label] for row in rows])
    refuse_lines(path, [i for i, label in enumerate(labels) if label.lower() in MISSING], "a label", "blank ones")
    split = "partition" in rows[0]
    partition = [PARTITIONS.get(row["partition"].lower(), "") if split else "" for row in rows]
    unknown = [i for i, name in enumerate(partition) if split and not name]
    refuse_lines(path, unknown, "train, val or test as partition", "others")
    paths = _files(path, rows) if stored else _places(path, rows)
    for wanted in required if split else ():
        if wanted not in partition:
            raise DataError(f"{path}: expected rows of partition {' and '.join(required)}, found none of {wanted}")
    if len(set(labels)) < 2:
        raise DataError(f"{path}: expected at least two classes, found only '{labels[0]}'")
    return LabelTable(paths, labels, partition, _column(rows, "slide_id"), _column(rows, "patient_id"), further, stored)


def _files(path: Path, rows: Sequence[Mapping[str, str]]) -> list[Path]:
    """The labelled files of a table, which exist and are different."""
    paths = [path.parent / Path(row["image_path"]).expanduser() for row in rows]
    absent = [p for p in paths if not p.is_file()]
    if absent:
        raise DataError(
            f"{path}: expected every image_path to exist, found {len(absent)} of {len(paths)} missing "
            f"({first_few(absent)}); relative paths resolve from {path.parent}"
        )
    if copies := find_copies(paths):
        first, second = copies[0]
        raise DataError(
            f"{path}: expected every image once, because copies make scores look more certain than they are, found "
            f"{len(copies)} rows with an image of an earlier row (lines {first + 2} and {second + 2}: "
            f"{printable(paths[first])}, {printable(paths[second])}); remove all but one of each"
        )
    return paths


def _places(path: Path, rows: Sequence[Mapping[str, str]]) -> list[Path]:
    """The names ``<slide>_<x>_<y>.jpg`` of the labelled tiles of a table, which are different."""
    bad = [i for i, row in enumerate(rows) if not (row["slide_id"] and row["x"].isdigit() and row["y"].isdigit())]
    refuse_lines(path, bad, "slide_id, x and y (whole level-0 px)", "others")
    names = [f"{row['slide_id']}_{int(row['x'])}_{int(row['y'])}.jpg" for row in rows]
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    again = [i for i, name in enumerate(names) if first[name] != i]
    refuse_lines(path, again, "a tile that no earlier row has", "repeated ones")
    return [Path(name) for name in names]


def join_slides(table: LabelTable, slides: Path, name: str) -> LabelTable:
    """Add a column of a table of slides to labels, by the slide of each row.

    Args:
        table: The labels.
        slides: A ``slides.csv``, or a ROOT, of which ``slides_status.csv`` is read.
        name: The column.

    Raises:
        DataError: If there is no such table or column, or a slide of the labels has no value in it.
    """
    path = slides / STATUS_TABLE if slides.is_dir() else slides
    if not path.is_file():
        raise DataError(f"expected a slides.csv, or a ROOT with {STATUS_TABLE}, at {slides}, found none")
    rows = read_rows(path, (name,))
    key = "sample_id" if "sample_id" in rows[0] else "slide_id"
    check_columns(path, list(rows[0]), (key,))
    of_slide = {row[key]: row[name] for row in rows if row[name].lower() not in MISSING}
    lacking = sorted({slide for slide in table.slides if slide not in of_slide})
    if lacking:
        raise DataError(
            f"{path}: expected a {name} of every labelled slide, found none of {len(lacking)} of "
            f"{len(set(table.slides))} ({first_few(lacking)}); add them, or remove their rows from the labels"
        )
    return replace(table, columns={**table.columns, name: [of_slide[slide] for slide in table.slides]})


def slide_of_name(name: str) -> str:
    """Slide of a file named ``<slide>_<x>_<y>.<ext>``, parsed from the right; the whole stem of any other name."""
    stem = Path(name).stem
    parts = stem.rsplit("_", 2)
    return parts[0] if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit() else stem


def _column(rows: Sequence[Mapping[str, str]], name: str) -> list[str] | None:
    values = [row.get(name) or "" for row in rows]
    return values if any(values) else None
