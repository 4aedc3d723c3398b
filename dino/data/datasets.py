"""Datasets: the tiles or the feature grids of a folder, by index."""

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, repeat
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dino.data.grids import Survey, read_cells
from dino.data.images import Names, decode
from dino.data.packed import GridFiles, PackedGrids
from dino.data.tile_cache import tile_cache
from dino.errors import DataError
from dino.files import printable

TILE_NAME = re.compile(r"(?P<slide>.+)_(?P<x>\d+)_(?P<y>\d+)")


@dataclass(frozen=True)
class SlideInfo:
    """What the tables of a ROOT record of a slide; None where they do not.

    Attributes:
        patient_id: Its patient.
        centre: Where it was made.
        spacing_um: Spacing of the pixels of its tiles in µm per px.
    """

    patient_id: str | None = None
    centre: str | None = None
    spacing_um: float | None = None


UNKNOWN = SlideInfo()


@dataclass(frozen=True)
class Sample:
    """One training sample before cropping.

    Attributes:
        pixels: ``(3, H, W)`` uint8 tile, ``(P, 3, H, W)`` pictures of one place at P spacings, ``(h * w, D)`` cells of
            a feature grid, or ``()`` int64: the row of a grid that the crops hold.
        name: Path within the dataset's folder (with ``#m`` appended for the m-th region of a file).
        shape: ``(H, W)`` of a tile in px, ``(h, w)`` of a grid in cells.
        slide_id: Slide it was cut from, where known.
        slide: What is recorded of that slide.
        tissue: ``(h, w)`` tissue fraction of each cell of a grid, where known.
    """

    pixels: Tensor
    name: str
    shape: tuple[int, int]
    slide_id: str | None = None
    slide: SlideInfo = UNKNOWN
    tissue: np.ndarray | None = None

    @property
    def patient_id(self) -> str | None:
        """Patient of the slide, where known."""
        return self.slide.patient_id

    @property
    def centre(self) -> str | None:
        """Centre that made the slide, where known."""
        return self.slide.centre

    @property
    def spacing_um(self) -> float | None:
        """Spacing of the pixels in µm per px, where known: of the first picture, or of a grid's tiles."""
        return self.slide.spacing_um


class BadSample(DataError):
    """A sample that cannot be used.

    Attributes:
        name: The sample's name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class ChangedData(DataError):
    """Data that is not as it was when the run started: no sample of it is bad, but the run has to start again."""


@dataclass(frozen=True, eq=False)
class SlideRanges:
    """The slides of a dataset's samples, in memory that does not depend on the number of samples.

    Where values of the tiles themselves are asked for (``columns``), a range has one slide and one value of each.

    Attributes:
        slide_ids: Slide of each range, None where it is not known. A slide may have several ranges.
        starts: ``(R + 1,)`` int64; range ``i`` has the indices ``starts[i] ... starts[i + 1] - 1``.
        columns: Columns of the table of tiles whose values are known.
        values: Different values of these columns, which tiles outside the ranges may have too.
        codes: ``(R,)`` int64, which of them each range has; None for the first of them for all.
    """

    slide_ids: Sequence[str | None]
    starts: np.ndarray
    columns: Sequence[str] = ()
    values: Sequence[tuple[str, ...]] = ((),)
    codes: np.ndarray | None = None

    @classmethod
    def of(cls, slides: Iterable[str | None]) -> "SlideRanges":
        """The ranges of samples whose slides are given in order."""
        runs = [(slide, sum(1 for _ in run)) for slide, run in groupby(slides)]
        return cls([slide for slide, _ in runs], np.cumsum([0, *(count for _, count in runs)], dtype=np.int64))

    @classmethod
    def joined(cls, parts: "Sequence[SlideRanges]") -> "SlideRanges":
        """The ranges of several datasets, one after the other, with the same columns."""
        ends = np.cumsum([0, *(part.starts[-1] for part in parts)], dtype=np.int64)
        starts = [before + part.starts[:-1] for before, part in zip(ends[:-1], parts, strict=True)]
        numbers: dict[tuple[str, ...], int] = {}
        codes = []
        for part in parts:
            mapped = np.array([numbers.setdefault(value, len(numbers)) for value in part.values], np.int64)
            codes.append(mapped[0 if part.codes is None else part.codes] + np.zeros(len(part.slide_ids), np.int64))
        slide_ids = [slide for part in parts for slide in part.slide_ids]
        starts = np.concatenate([*starts, ends[-1:]])
        return cls(slide_ids, starts, parts[0].columns, list(numbers), np.concatenate(codes))

    @property
    def units(self) -> Iterator[tuple[str | None, int]]:
        """Slide of each range, and the number of its values."""
        codes: Iterable[int] = repeat(0, len(self.slide_ids)) if self.codes is None else self.codes.tolist()
        return zip(self.slide_ids, codes, strict=True)

    @property
    def counts(self) -> dict[str | None, int]:
        """Number of samples of each slide."""
        counts: Counter[str | None] = Counter()
        for slide, count in zip(self.slide_ids, np.diff(self.starts).tolist(), strict=True):
            counts[slide] += count
        return dict(counts)

    @property
    def known(self) -> set[str]:
        """The slides that are known."""
        return {slide for slide in self.slide_ids if slide}


class Dataset(Protocol):
    """Samples by index; which of them is taken when is up to a :class:`~dino.data.samplers.Sampler`."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at an index in ``[0, len)``.

        Raises:
            BadSample: If the sample cannot be used.
        """
        ...

    def drawn(self, index: int, draw: int) -> Sample:
        """The sample at an index, as a draw takes it: where reading has random choices, they depend on the draw number.

        Raises:
            BadSample: If the sample cannot be used.
        """
        return self[index]

    def places(self, start: int, end: int) -> np.ndarray:
        """Where consecutive samples of one slide lie, by which a table of tiles lists them.

        Args:
            start: Index of the first of them.
            end: Index after the last one.

        Returns:
            ``(end - start, 2)`` int64 level-0 ``(x, y)``, -1 where it is not known.
        """
        return np.full((end - start, 2), -1, np.int64)

    @property
    def fingerprint(self) -> str:
        """Hash of the sample names in order: equal for equal data, wherever its folder is."""
        ...

    @property
    def ranges(self) -> SlideRanges:
        """The slides of the samples."""
        ...

    @property
    def slide_ids(self) -> set[str]:
        """Slides of all samples, where known."""
        return self.ranges.known


def slide_of(path: Path | str) -> str | None:
    """Slide id in a tile's or region's file name ``<slide>_<x>_<y>``, parsed from the right."""
    name = os.fspath(path).rpartition(os.sep)[2]
    match = TILE_NAME.fullmatch(name.rpartition(".")[0] or name)
    return match["slide"] if match else None


def place_of(path: Path | str) -> tuple[str, int, int] | None:
    """Slide, x and y in a tile's or region's file name; None where they are not."""
    name = os.fspath(path).rpartition(os.sep)[2]
    match = TILE_NAME.fullmatch(name.rpartition(".")[0] or name)
    return (match["slide"], int(match["x"]), int(match["y"])) if match else None


class EncodedTiles(Protocol):
    """Image files of tiles, wherever they are stored."""

    @property
    def names(self) -> Names:
        """Path of each, ``<slide>/<slide>_<x>_<y>.jpg`` where ``dino tile`` wrote it, in a fixed order."""
        ...

    @property
    def ranges(self) -> SlideRanges:
        """The slides in their names."""
        return SlideRanges.of(slide_of(name) for name in self.names)

    def read(self, index: int) -> Tensor:
        """``(3, H, W)`` uint8 pixels of a tile.

        Raises:
            DataError: If it cannot be decoded.
            ChangedData: If it is not as it was when the tiles were listed, and those beside it neither.
        """
        ...


class FolderTiles(EncodedTiles):
    """Image files in a folder.

    Args:
        root: The folder.
        names: Paths of image files in it, in a fixed order.
        ram_cache_gb: GB of memory for decoded tiles; 0 to decode a tile each time it is read. The pixels are the same.

    Raises:
        ConfigError: If there is not as much memory.
    """

    def __init__(self, root: Path, names: Sequence[str], ram_cache_gb: float = 0.0) -> None:
        self._root, self._names = root, Names(names)
        self._cache = tile_cache(len(names), ram_cache_gb)

    @property
    def names(self) -> Names:
        """Their paths in the folder."""
        return self._names

    def read(self, index: int) -> Tensor:
        """Decode a file, or return its pixels from memory.

        Raises:
            DataError: If it cannot be decoded.
        """
        path = self._root / self._names[index]
        return decode(path) if self._cache is None else self._cache(index, path)


class SomeTiles(EncodedTiles):
    """Some of the tiles of a store.

    Args:
        tiles: All.
        indices: Index of each in all.
    """

    def __init__(self, tiles: EncodedTiles, indices: Sequence[int]) -> None:
        self._tiles, self._indices = tiles, np.asarray(indices, np.int64)
        self._names = Names(tiles.names[int(index)] for index in self._indices)

    @property
    def names(self) -> Names:
        """Their names."""
        return self._names

    def read(self, index: int) -> Tensor:
        """Decode a tile, see :meth:`EncodedTiles.read`."""
        return self._tiles.read(int(self._indices[index]))


class TileDataset(Dataset):
    """Tiles that are stored as image files (level 1).

    What is known of a slide is looked up by its id when one of its tiles is read, so that a tile costs the memory of
    its name only.

    Args:
        tiles: The files.
        slides: What is known of each slide.
    """

    def __init__(self, tiles: EncodedTiles, slides: Mapping[str, SlideInfo] | None = None) -> None:
        self._tiles, self._slides = tiles, slides or {}

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self._tiles.names)

    def __getitem__(self, index: int) -> Sample:
        """Decode a tile.

        Raises:
            BadSample: If the file cannot be decoded.
            ChangedData: If it is of data that has changed since the run started.
        """
        name = self._tiles.names[index]
        try:
            pixels = self._tiles.read(index)  # (3, H, W)
        except ChangedData:
            raise
        except DataError as error:
            raise BadSample(printable(name), str(error)) from None
        height, width = pixels.shape[-2:]
        slide_id = slide_of(name)
        return Sample(pixels, name, (height, width), slide_id, self._slides.get(slide_id or "", UNKNOWN))

    def places(self, start: int, end: int) -> np.ndarray:
        """Where tiles lie according to their names, see :meth:`Dataset.places`."""
        found = (place_of(self._tiles.names[index]) for index in range(start, end))
        return np.array([place[1:] if place else (-1, -1) for place in found], np.int64).reshape(-1, 2)

    @property
    def fingerprint(self) -> str:
        """Hash of the tile names in order."""
        return self._tiles.names.fingerprint

    @cached_property
    def ranges(self) -> SlideRanges:
        """Slides in the names of the tiles."""
        return self._tiles.ranges


class GridDataset(Dataset):
    """Feature grids of a folder (level 2); all of one D and one shape.

    Args:
        files: The files, with what is known of each, in a fixed order. Each region of a file is a sample.
        survey: Their shapes.
        packed: All of them in one file; None to read each file when a sample of it is read. The values are the same.
            Files that change or vanish later are not read again: a run ends with the data that it began with.
        by_row: Return a sample's row in the packed grids instead of its cells: for crops that hold all cells.
        slides: What is known of each slide.
    """

    def __init__(
        self,
        files: GridFiles,
        survey: Survey,
        packed: PackedGrids | None = None,
        *,
        by_row: bool = False,
        slides: Mapping[str, SlideInfo] | None = None,
    ) -> None:
        self._files, self._packed, self._by_row, self._slides = files, packed, by_row, slides or {}
        self.height, self.width, self.dim = survey.height, survey.width, survey.dim
        self._names = [str(entry.path.relative_to(files.root)) for entry in files.entries]
        self._slide_ids = [entry.slide_id or slide_of(entry.path) for entry in files.entries]
        self._ends = list(accumulate(survey.regions))  # of the rows of each file

    def __len__(self) -> int:
        """Number of regions."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Read the grid of a region.

        Raises:
            BadSample: If the file cannot be read, or holds values that are not finite.
        """
        number = bisect_right(self._ends, index)
        region = index - (self._ends[number - 1] if number else 0)
        name, entry, slide_id = f"{self._names[number]}#{region}", self._files.entries[number], self._slide_ids[number]
        try:
            cells = self._read(number, region, index)
        except DataError as error:
            raise BadSample(printable(name), str(error)) from None
        slide = self._slides.get(slide_id or "", UNKNOWN)
        return Sample(cells, name, (self.height, self.width), slide_id, slide, entry.tissue)

    def _read(self, number: int, region: int, row: int) -> Tensor:
        packed, entry = self._packed, self._files.entries[number]
        if packed is not None and row not in packed.bad:
            return torch.tensor(row) if self._by_row else packed.cells[row]
        cells = read_cells(entry.path, self._files.order, (self.height, self.width), region)
        if cells.shape[1] != self.dim:
            raise DataError(
                f"expected D={self.dim} in {printable(entry.path)}, found {cells.shape[1]}; was it replaced?"
            )
        if packed is not None:
            raise DataError(
                f"expected {printable(entry.path)} as it was when the grids were packed, found another file; start the "
                "command again"
            )
        return cells.to(self._files.dtype)

    @property
    def fingerprint(self) -> str:
        """Hash of the region names in order."""
        starts = [0, *self._ends[:-1]]
        regions = zip(self._names, starts, self._ends, strict=True)
        return Names(f"{name}#{region}" for name, start, end in regions for region in range(end - start)).fingerprint

    @cached_property
    def ranges(self) -> SlideRanges:
        """Slides of the regions, where known."""
        lengths = np.diff([0, *self._ends]).tolist()
        runs = zip(self._slide_ids, lengths, strict=True)
        return SlideRanges.of(slide for slide, length in runs for _ in range(length))
