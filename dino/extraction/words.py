"""Tissue words: clusters of the tiles of many slides that a pathologist can name, in ``ROOT/words_<encoder>/``.

==============  ====================================================================================================
``words.json``  the centres, how they were found, and a few rows of the features that they belong to
``words.csv``   one row per word: tiles, slides, patients, share of the tiles, and ``name``, which people fill in
``tiles.csv``   the word of every tile
==============  ====================================================================================================

The first is written once; the tables are written again when there are more slides, and keep what people wrote.
"""

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
from dino.extraction.word_table import NAME, WORD, Names, changed, checked_name, read_table, replace, writing
from dino.slides.tables import csv_line

RECORD, TABLE, ASSIGNED = "words.json", "words.csv", "tiles.csv"
FORMAT = 1
COLUMNS = (WORD, "tiles", "slides", "patients", "share", NAME)
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

    def names(self) -> Names:
        """What people wrote into the table.

        Raises:
            DataError: If the table cannot be read.
        """
        return read_table(self.table, len(self.clusters)).names(len(self.clusters))

    def write_name(self, word: int, name: str, version: str) -> None:
        """Write the name of a word into the table. Everything else in it stays as it is.

        Args:
            word: Index of the word.
            name: Its name; empty for none.
            version: Version of the names (:meth:`names`) that were shown when it was typed.

        Raises:
            TableChanged: If the table has been changed since.
            DataError: If there is no such word, the name is not one, or the table cannot be read or written.
        """
        name = checked_name(name)
        if not 0 <= word < len(self.clusters):
            raise DataError(f"expected a word from 1 to {len(self.clusters)}, found {word + 1}")
        with files.oserror_to_data_error(self.folder), writing(self.folder, RECORD):
            before = read_table(self.table, len(self.clusters))
            if before.names(len(self.clusters)).version != version:
                raise changed(self.table)
            replace(self.table, before.raw, before.renamed(word, name, self.table))

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
        DataError: If the table that is there cannot be read, or someone changes it at this moment.
    """
    with writing(words.folder, RECORD):
        table = read_table(words.table, len(words.clusters)) if words.table.exists() else None
        before = table.cells(len(counts)) if table else [{}] * len(counts)
        further = [name for name in dict.fromkeys(name for row in before for name in row) if name not in COLUMNS]
        total = max(1, sum(count.tiles for count in counts))
        rows = [[*COLUMNS, *further]]
        for number, (count, row) in enumerate(zip(counts, before, strict=True), 1):
            patients = "" if count.patients is None else str(count.patients)
            cells = [str(number), str(count.tiles), str(count.slides), patients, f"{count.tiles / total:.4f}"]
            rows.append([*cells, row.get(NAME, ""), *(row.get(name, "") for name in further)])
        content = files.csv_text(rows).encode()
        if table is None or table.raw != content:
            replace(words.table, table.raw if table else None, content)


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


def _numbers(values: np.ndarray) -> list[float]:
    """Float32 values in as few digits as give them again."""
    return [float(f"{value:.9g}") for value in values.tolist()]
