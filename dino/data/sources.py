"""Where samples come from: a folder of tiles, or a folder of feature grids."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from dino import randomness
from dino.data.grids import grid_shape, open_grids, read_grid
from dino.data.images import decode
from dino.errors import DataError
from dino.files import printable

TILE_NAME = re.compile(r"(?P<slide>.+)_(?P<x>\d+)_(?P<y>\d+)")


@dataclass(frozen=True)
class Sample:
    """One training sample before cropping.

    Attributes:
        pixels: ``(3, H, W)`` uint8 tile, or ``(D, h, w)`` float32 feature grid.
        name: Path within the source's folder (with ``#m`` behind it for the m-th region of a file).
        slide_id: Slide it was cut from, where known.
        tissue: ``(h, w)`` tissue fraction of each cell of a grid, where known.
    """

    pixels: Tensor
    name: str
    slide_id: str | None = None
    tissue: np.ndarray | None = None


class BadSample(DataError):
    """A sample that cannot be used.

    Attributes:
        name: The sample's name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class Source(Protocol):
    """Samples as a function of the draw number: ``source(seed, draw, attempt)``."""

    def __len__(self) -> int:
        """How many samples one pass holds."""
        ...

    def __call__(self, seed: int, draw: int, attempt: int = 0) -> Sample:
        """The sample of one draw; ``attempt`` > 0 gives its replacements.

        Raises:
            BadSample: If the sample cannot be used.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the sample names in order: equal for equal data, wherever it lies."""
        ...


def slide_of(path: Path) -> str | None:
    """Slide id in a tile's or region's file name ``<slide>_<x>_<y>``, parsed from the right."""
    match = TILE_NAME.fullmatch(path.stem)
    return match["slide"] if match else None


def index_of(seed: int, draw: int, attempt: int, count: int) -> int:
    """Which of ``count`` samples a draw takes: a permutation per pass, then independent replacements."""
    if attempt == 0:
        return randomness.permuted(seed, draw, count)
    return int(randomness.generator(seed, draw, f"replacement/{attempt}").integers(count))


def _fingerprint(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


class ImageFolder:
    """Tiles of a folder.

    Args:
        root: The folder; names are relative to it.
        paths: Image files under it, in a fixed order.
    """

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self.root = root
        self._names = [str(path.relative_to(root)) for path in paths]

    def __len__(self) -> int:
        """How many tiles there are."""
        return len(self._names)

    def __call__(self, seed: int, draw: int, attempt: int = 0) -> Sample:
        """Decode the tile of one draw.

        Raises:
            BadSample: If the file cannot be decoded.
        """
        name = self._names[index_of(seed, draw, attempt, len(self))]
        path = self.root / name
        try:
            return Sample(decode(path), name, slide_of(path))
        except DataError as error:
            raise BadSample(printable(name), str(error)) from None

    @property
    def fingerprint(self) -> str:
        """Hash of the tile names in order."""
        return _fingerprint(self._names)

    @property
    def slide_ids(self) -> set[str]:
        """Slides that the tiles were cut from, as far as their names tell."""
        return {slide for name in self._names if (slide := slide_of(Path(name)))}


@dataclass(frozen=True)
class GridEntry:
    """One region of a grid file: its file, its number there, and what ``regions.csv`` says of it."""

    path: Path
    region: int = 0
    slide_id: str | None = None
    shape: tuple[int, int] | None = None
    tissue: np.ndarray | None = None


class GridFolder:
    """Feature grids of a folder; all of one D and one shape.

    Args:
        root: The folder; names are relative to it.
        entries: Files under it with what is known of each, in a fixed order. A file with several regions is unfolded.
        order: Order of the rows in the files, ``yx`` or ``xy``.
        notice: Called after each checked file, for a progress bar.
        max_bad_fraction: Share of the files that may be no grids; they stay in the list and are bad when drawn.

    Raises:
        DataError: If more files than that are no grids, or D or the shape differ within the folder.
    """

    def __init__(
        self,
        root: Path,
        entries: Sequence[GridEntry],
        order: str = "yx",
        notice: Callable[[], None] = lambda: None,
        max_bad_fraction: float = 0.0,
    ) -> None:
        self.root, self.order = root, order
        self._entries: list[GridEntry] = []
        kinds: dict[tuple[int, int, int], Path] = {}
        bad: list[str] = []
        for entry in entries:
            slide = entry.slide_id or slide_of(entry.path)
            try:
                regions, cells, dim = open_grids(entry.path).shape
                kinds.setdefault((dim, *grid_shape(entry.path, cells, entry.shape)), entry.path)
            except DataError as error:
                regions = 1
                bad.append(str(error))
            self._entries += [GridEntry(entry.path, m, slide, entry.shape, entry.tissue) for m in range(regions)]
            notice()
        if len(bad) > max_bad_fraction * len(entries):
            more = f" (and {len(bad) - 1} more such files)" if len(bad) > 1 else ""
            raise DataError(f"{bad[0]}{more}; more than training.max_bad_fraction={max_bad_fraction:g} of the files")
        if len(kinds) != 1:
            found = "; ".join(
                f"D={d}, {h} x {w} in {printable(path.name)}" for (d, h, w), path in list(kinds.items())[:3]
            )
            raise DataError(
                f"expected grids of one D and one shape in {root}, found {found or 'none'}; split the folder"
            )
        ((self.dim, self.height, self.width),) = kinds

    def __len__(self) -> int:
        """How many regions there are."""
        return len(self._entries)

    def __call__(self, seed: int, draw: int, attempt: int = 0) -> Sample:
        """Read the grid of one draw.

        Raises:
            BadSample: If the file cannot be read or holds values that are not finite.
        """
        entry = self._entries[index_of(seed, draw, attempt, len(self))]
        try:
            grid = read_grid(entry.path, self.order, (self.height, self.width), entry.region)
            if len(grid) != self.dim:
                raise DataError(
                    f"expected D={self.dim} in {printable(entry.path)}, found {len(grid)}; was it replaced?"
                )
        except DataError as error:
            raise BadSample(printable(self._name(entry)), str(error)) from None
        return Sample(grid, self._name(entry), entry.slide_id, entry.tissue)

    @property
    def fingerprint(self) -> str:
        """Hash of the region names in order."""
        return _fingerprint([self._name(entry) for entry in self._entries])

    @property
    def slide_ids(self) -> set[str]:
        """Slides that the regions belong to, as far as it is known."""
        return {entry.slide_id for entry in self._entries if entry.slide_id}

    def _name(self, entry: GridEntry) -> str:
        return f"{entry.path.relative_to(self.root)}#{entry.region}"


def keep_partition(
    paths: Sequence[Path], slide_of_path: Callable[[Path], str | None], partitions: Mapping[str, str]
) -> list[Path]:
    """The files that may be pretrained on: those of slides whose partition is blank or ``pretrain``.

    Args:
        paths: Files.
        slide_of_path: Tells a file's slide.
        partitions: Partition of each slide; slides that are not listed are kept.
    """
    return [path for path in paths if partitions.get(slide_of_path(path) or "", "") in {"", "pretrain"}]
