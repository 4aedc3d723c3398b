"""The list of slides: from files, folders and patterns, or from a CSV with patients, partitions and spacings."""

import csv
import difflib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dino.errors import DataError
from dino.slides.partitions import unknown_values
from dino.slides.remote import (
    Location,
    RemoteFile,
    find_remote,
    parse_location,
    try_look_up,
)
from dino.slides.tables import ANNOTATION_COLUMNS, STATUS_COLUMNS, TILE_COLUMNS

SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi"}
REQUIRED = ("sample_id", "image_path")
DESCRIPTION = ("patient_id", "centre", "scanner", "stain", "partition", "exclude_reason")
COLUMNS = (*REQUIRED, "mask_path", "annotation_path", "spacing_at_level_0", *DESCRIPTION)
TABLE_COLUMNS = {*STATUS_COLUMNS, *TILE_COLUMNS, *ANNOTATION_COLUMNS} - {
    *COLUMNS
}  # of the tables that `dino tile` writes
DELIMITERS = ",;\t"  # spreadsheets write semicolons where the comma is the decimal separator
MAX_ID_LENGTH = 150


@dataclass(frozen=True)
class SlideRecord:
    """One slide of the list.

    Attributes:
        slide_id: Unique name; also the name of its folder of tiles.
        image_path: The slide's file, absolute, or where it is stored.
        mask_path: Binary tissue mask, likewise, if there is one.
        spacing_at_level_0: µm per px that overrides the slide's metadata.
        patient_id: The patient.
        centre: The centre that scanned the slide.
        scanner: The scanner.
        stain: The stain.
        partition: ``pretrain`` or blank for pretraining; any other value holds it out, see :mod:`.partitions`.
        exclude_reason: Reason for excluding the slide; blank if it is not excluded.
        annotation_path: Annotations, see :mod:`.annotations`, likewise, if there are any.
        further: Cells of all other columns, where they are not blank: groups of sampling, and conditions of filters.
    """

    slide_id: str
    image_path: Location
    mask_path: Location | None = None
    spacing_at_level_0: float | None = None
    patient_id: str = ""
    centre: str = ""
    scanner: str = ""
    stain: str = ""
    partition: str = ""
    exclude_reason: str = ""
    annotation_path: Location | None = None
    further: Mapping[str, str] = field(default_factory=dict, hash=False)


def read_slide_list(inputs: Sequence[str | Path], note: Callable[[str], None] = lambda line: None) -> list[SlideRecord]:
    """Slides given as any mix of slide files, folders (searched recursively), patterns and CSV lists.

    Args:
        inputs: Paths and patterns, also of object stores (``s3://bucket/folder/`` with the final ``/``, or a pattern
            such as ``s3://bucket/*.svs``). A ``.csv`` is a slide list; its relative paths are relative to its folder.
        note: Called with a one-line warning for a column that is ignored or misspelt, and an unknown partition.

    Returns:
        The slides, in the order given; those of a folder or pattern sorted by path.

    Raises:
        DataError: If nothing is found, a list is malformed, a file is missing, or two slides share an id.
    """
    records: list[SlideRecord] = []
    for given in inputs:
        location = parse_location(given)
        if isinstance(location, RemoteFile):
            found = find_remote(str(given), SUFFIXES)
            records += [SlideRecord(_safe_id(one.stem, str(one)), one) for one in found]
            continue
        path = location.expanduser().absolute()
        if path.suffix.lower() == ".csv" and path.is_file():
            records += _read_csv(path, note)
        else:
            records += [SlideRecord(_safe_id(found.stem, str(found)), found) for found in _find(path)]
    if not records:
        raise DataError("expected at least one slide, folder of slides or slides.csv, found none")
    _check_unique_ids(records)
    return records


def inputs_of(record: SlideRecord) -> dict[str, Any]:
    """Properties of the input files that a slide's tiles depend on; moving the files does not change them.

    A size is None where there is no file, or its store does not tell.
    """
    inputs = {
        "image_bytes": _size(record.image_path),
        "mask_bytes": _size(record.mask_path) if record.mask_path else None,
        "spacing_at_level_0": record.spacing_at_level_0,
    }
    # Annotations are small, and editing them may not change their size.
    annotation = record.annotation_path
    if isinstance(annotation, RemoteFile):
        return inputs | {"annotation_version": _version(annotation)}
    return inputs | ({"annotation_sha256": _sha256(annotation)} if annotation else {})


def is_unchanged(before: Mapping[str, Any], record: SlideRecord) -> bool:
    """Whether the input files are those that a slide was tiled from, as far as that can be found out.

    Args:
        before: :func:`inputs_of` it then.
        record: The slide now.
    """
    now = inputs_of(record)
    files = {
        "image_bytes": record.image_path,
        "mask_bytes": record.mask_path,
        "annotation_version": record.annotation_path,
    }
    for name, file in files.items():
        if now.get(name) is None and isinstance(file, RemoteFile):
            now[name] = before.get(name)  # a store that does not answer is no reason to tile again
    return before == now


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        # A broken link is listed too, so that its slide is not silently skipped.
        found = sorted(
            p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and (p.is_file() or _is_broken_link(p))
        )
        if not found:
            raise DataError(f"expected slides ({', '.join(sorted(SUFFIXES))}) in folder {path}, found none")
        return found
    found = sorted(p for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file())
    if not found:
        raise DataError(f"expected a slide, a folder of slides, a pattern or a slides.csv at {path}, found nothing")
    return found


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _check_unique_ids(records: Sequence[SlideRecord]) -> None:
    seen: dict[str, SlideRecord] = {}
    for record in records:
        first = seen.setdefault(record.slide_id, record)
        if first is not record:
            raise DataError(
                f"expected unique slide ids, found '{record.slide_id}' for both {first.image_path} and "
                f"{record.image_path}; give each its own id in the sample_id column of a slides.csv"
            )


def _safe_id(slide_id: str, where: str) -> str:
    """Check that the id can be the name of a folder and a prefix of file names, and return it."""
    bad = not slide_id or slide_id.startswith(".") or len(slide_id) > MAX_ID_LENGTH
    if bad or any(c in "/\\" or not c.isprintable() for c in slide_id):
        raise DataError(
            f"{where}: expected a slide id that can name a folder (1 to {MAX_ID_LENGTH} characters, no / or \\, "
            f"no leading dot), found '{slide_id}'"
        )
    return slide_id


def _read_csv(path: Path, note: Callable[[str], None]) -> list[SlideRecord]:
    records = [_record(row, path.parent, where) for where, row in _rows(path, note)]
    if not records:
        raise DataError(f"expected at least one slide in {path}, found only its header")
    for warning in unknown_values(record.partition for record in records if not record.exclude_reason):
        note(f"{path.name}: {warning}")
    return records


def _rows(path: Path, note: Callable[[str], None]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row as stripped cells by column, with its file and line for error messages."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            lines = csv.reader(file, strict=True, delimiter=max(DELIMITERS, key=first.count))
            header = [name.strip() for name in next(lines, [])]
            _check_header(header, path, note)
            for cells in lines:
                where = f"{path}, line {lines.line_num}"
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) > len(header):
                    raise DataError(f"{where}: expected {len(header)} cells as in the header, found {len(cells)}")
                if any("\0" in cell for cell in cells):
                    raise DataError(f"{where}: expected text, found a zero byte; save the list as a plain CSV")
                padded = [cell.strip() for cell in cells] + [""] * (len(header) - len(cells))
                yield where, dict(zip(header, padded, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"expected a UTF-8 CSV at {path}, could not read it: {error}") from None
    except OSError as error:
        raise DataError(f"expected a readable slide list at {path}: {error.strerror}") from None


def _check_header(header: Sequence[str], path: Path, note: Callable[[str], None]) -> None:
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        found = ", ".join(name for name in header if name) or "an empty file"
        raise DataError(f"expected columns {' and '.join(REQUIRED)} in {path}, found {found}")
    for name in header:
        if header.count(name) > 1 and name:
            raise DataError(f"expected each column of {path} once, found '{name}' {header.count(name)} times")
        if name in TABLE_COLUMNS:
            note(f"{path.name}: column '{name}' is ignored: `dino tile` writes a column of that name")
        elif name and name not in COLUMNS:
            close = difflib.get_close_matches(name, COLUMNS, 1, 0.75)
            if close:
                note(f"{path.name}: column '{name}' has no meaning of its own; did you mean '{close[0]}'?")


def _record(row: dict[str, str], folder: Path, where: str) -> SlideRecord:
    description = {name: row.get(name, "") for name in DESCRIPTION}
    further = {name: cell for name, cell in row.items() if name and cell and name not in (*COLUMNS, *TABLE_COLUMNS)}
    excluded = bool(description["exclude_reason"])
    if not row["image_path"]:
        raise DataError(f"{where}: expected an image_path, found none")
    mask, annotation = (
        _file(row[column], folder, column, where, excluded) if row.get(column) else None
        for column in ("mask_path", "annotation_path")
    )
    return SlideRecord(
        slide_id=_safe_id(row["sample_id"], where),
        image_path=_file(row["image_path"], folder, "image_path", where, excluded),
        mask_path=mask,
        spacing_at_level_0=_spacing(row.get("spacing_at_level_0", ""), where),
        annotation_path=annotation,
        **description,
        further=further,
    )


def _file(text: str, folder: Path, column: str, where: str, may_be_missing: bool) -> Location:
    try:
        location = parse_location(text)
    except DataError as error:
        raise DataError(f"{where}, {column}: {error}") from None
    if not isinstance(location, Path):
        return location  # whether it exists is found out when it is downloaded
    path = location.expanduser()
    path = path if path.is_absolute() else folder / path
    if not may_be_missing and not path.is_file():
        raise DataError(f"{where}: expected a file as {column}, found none at {path}")
    return path


def _spacing(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"{where}: expected spacing_at_level_0 as a positive number of µm per px, found '{text}'")
    return value


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _size(file: Location) -> int | None:
    try:
        if isinstance(file, RemoteFile):
            found = try_look_up(file)
            return found.size if found else None
        return file.stat().st_size
    except OSError:
        return None


def _version(file: RemoteFile) -> list[Any] | None:
    found = try_look_up(file)
    return [found.size, found.version] if found else None
