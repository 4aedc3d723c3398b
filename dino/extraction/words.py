"""Tissue words: clusters of the tiles of many slides that a pathologist can name, in ``ROOT/words_<encoder>/``.

==============  ====================================================================================================
``words.json``  the centres, how they were found, and a few rows of the features that they belong to
``words.csv``   one row per word: tiles, slides, patients, share of the tiles, and ``name``, which people fill in
``tiles.csv``   the word of every tile
==============  ====================================================================================================

The first is written once; the tables are written again when there are more slides, and keep what people wrote.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dino import files
from dino.errors import DataError
from dino.extraction.colours import Clusters
from dino.extraction.folders import words_folder
from dino.slides.tables import csv_line

RECORD, TABLE, ASSIGNED = "words.json", "words.csv", "tiles.csv"
FORMAT = 1
WORD, NAME = "word", "name"
COLUMNS = (WORD, "tiles", "slides", "patients", "share", NAME)
ENCODINGS = ("utf-8-sig", "cp1252")  # of spreadsheets
SAME = 0.99  # cosine similarity of a tile's features that were extracted twice, on other hardware or in fp16


@dataclass(frozen=True)
class Probe:
    """The unit-length features of one tile, by which the features of an encoder are recognised."""

    slide_id: str
    x: int
    y: int
    features: np.ndarray


@dataclass(frozen=True)
class Count:
    """How often a word occurs: numbers of tiles, slides and patients (None where patients are not recorded)."""

    tiles: int
    slides: int
    patients: int | None


@dataclass(frozen=True)
class Words:
    """The words of an encoder.

    Attributes:
        folder: Where they are.
        clusters: Their centres, the most used first.
        probes: Features of a few tiles.
        details: How they were found.
    """

    folder: Path
    clusters: Clusters
    probes: Sequence[Probe]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> Path:
        """The table with the names."""
        return self.folder / TABLE

    def names(self) -> list[str]:
        """What each word is called: as people wrote, on one line, or "Word 3" where they did not.

        Raises:
            DataError: If the table cannot be read.
        """
        rows = read_table(self.table, len(self.clusters))
        written = [" ".join(files.printable(row.get(NAME, "")).split()) for row in rows]
        return [name or f"Word {number}" for number, name in enumerate(written, 1)]

    def check(self, find: Callable[[Probe], np.ndarray | None]) -> None:
        """Check that they were found in the features that are there now.

        Args:
            find: The unit-length features of a tile of the same place, None where there is none any more.

        Raises:
            DataError: If they are of other features.
        """
        for probe in self.probes:
            found = find(probe)
            if found is None:
                continue
            if found.shape != probe.features.shape or float(found @ probe.features) < SAME:
                raise DataError(
                    f"expected words of the features that are in ROOT now, found those of other features in "
                    f"{self.folder}: the tile {probe.x}, {probe.y} of slide '{probe.slide_id}' differs; move that "
                    "folder away (it has the names), then run `dino words` again"
                )


def read_words(root: Path, encoder: str) -> Words | None:
    """The words of an encoder; None if they have not been looked for.

    Raises:
        DataError: If their file is damaged.
    """
    folder = words_folder(root, encoder)
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        content = files.read_json(path)
        centres = np.array(content["centres"], np.float32)
        probes = [
            Probe(str(one["slide_id"]), int(one["x"]), int(one["y"]), np.array(one["features"], np.float32))
            for one in content["probes"]
        ]
        if content["format"] != FORMAT or centres.ndim != 2 or not np.isfinite(centres).all():
            raise ValueError(f"format {content['format']}, centres {centres.shape}")
        return Words(folder, Clusters(centres), probes, dict(content["details"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"expected {path} as written by `dino words`, could not read it: {files.printable(error)[:200]}; move "
            f"{TABLE} away if it has names, delete the folder and run `dino words` again"
        ) from None


def write_words(words: Words) -> None:
    """Write the record of words; the tables are written by :func:`write_table` and :func:`write_assigned`."""
    content = {
        "format": FORMAT,
        "details": words.details,
        "probes": [
            {"slide_id": one.slide_id, "x": one.x, "y": one.y, "features": _numbers(one.features)}
            for one in words.probes
        ],
        "centres": [_numbers(row) for row in words.clusters.centres],
    }
    files.write_text(words.folder / RECORD, json.dumps(content, default=str) + "\n")


def write_table(words: Words, counts: Sequence[Count]) -> None:
    """Write the table of words. Names and further columns that people wrote are kept, as they wrote them.

    Args:
        words: The words.
        counts: How often each occurs.

    Raises:
        DataError: If the table that is there cannot be read.
    """
    before = read_table(words.table, len(words.clusters)) if words.table.exists() else [{}] * len(words.clusters)
    further = [name for name in dict.fromkeys(name for row in before for name in row) if name not in COLUMNS]
    total = max(1, sum(count.tiles for count in counts))
    rows = [[*COLUMNS, *further]]
    for number, (count, row) in enumerate(zip(counts, before, strict=True), 1):
        patients = "" if count.patients is None else str(count.patients)
        cells = [str(number), str(count.tiles), str(count.slides), patients, f"{count.tiles / total:.4f}"]
        rows.append([*cells, row.get(NAME, ""), *(row.get(name, "") for name in further)])
    content = files.csv_text(rows)
    if not words.table.exists() or words.table.read_bytes() != content.encode():
        files.write_text(words.table, content)


def read_table(path: Path, count: int) -> list[dict[str, str]]:
    """The rows of a table of words, in order; also as spreadsheets save it, with semicolons or another encoding.

    Args:
        path: The table.
        count: Number of words.

    Returns:
        A row of cells by column for each word; empty for one that the table does not contain.

    Raises:
        DataError: If it is absent or not such a table, or names a word twice or one that does not exist.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"expected the names of words in {path}, found none ({error.strerror}); run `dino words` again"
        ) from None
    text = _decoded(raw)
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    columns = [cell.strip() for cell in next(lines, [])]
    if WORD not in columns or NAME not in columns:
        raise DataError(f"expected columns {WORD} and {NAME} in {path}, found {', '.join(columns)[:200] or 'none'}")
    rows: list[dict[str, str]] = [{} for _ in range(count)]
    for cells in lines:
        row = dict(zip(columns, cells, strict=False))
        if not any(cell.strip() for cell in cells):
            continue
        number = row.get(WORD, "").strip()
        if not number.isdecimal() or not 1 <= int(number) <= count:
            raise DataError(f"{path}, line {lines.line_num}: expected a word from 1 to {count}, found '{number[:50]}'")
        if rows[int(number) - 1]:
            raise DataError(f"{path}, line {lines.line_num}: expected each word once, found {number} again")
        rows[int(number) - 1] = row
    return rows


def write_assigned(words: Words, slides: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Write the word of every tile.

    Args:
        words: The words.
        slides: Slide id, level-0 ``(N, 2)`` x and y of its tiles, and the index of the word of each, -1 for none.
    """
    with files.atomic_path(words.folder / ASSIGNED) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f"slide_id,x,y,{WORD}\n")
        for slide_id, coords, found in slides:
            rows = zip(coords.tolist(), found.tolist(), strict=True)
            file.writelines(csv_line((slide_id, x, y, word + 1)) for (x, y), word in rows if word >= 0)


def _decoded(raw: bytes) -> str:
    for encoding in ENCODINGS[:-1]:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode(ENCODINGS[-1], errors="replace")


def _numbers(values: np.ndarray) -> list[float]:
    """Float32 values in as few digits as give them again."""
    return [float(f"{value:.9g}") for value in values.tolist()]
