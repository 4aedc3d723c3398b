"""Where samples come from: the protocol, and a folder of tiles (feature grids: :mod:`dino.data.grid_folder`)."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from torch import Tensor

from dino import randomness
from dino.data.images import decode
from dino.data.names import Names
from dino.data.tile_cache import TileCache
from dino.errors import DataError
from dino.files import printable

F = TypeVar("F", Path, str)
TILE_NAME = re.compile(r"(?P<slide>.+)_(?P<x>\d+)_(?P<y>\d+)")


@dataclass(frozen=True)
class Sample:
    """One training sample before cropping.

    Attributes:
        pixels: ``(3, H, W)`` uint8 tile, ``(h * w, D)`` cells of a feature grid, or ``()`` int64: the row of a grid
            that the crops hold.
        name: Path within the source's folder (with ``#m`` behind it for the m-th region of a file).
        slide_id: Slide it was cut from, where known.
        tissue: ``(h, w)`` tissue fraction of each cell of a grid, where known.
        shape: ``(h, w)`` of a grid in cells; None for a tile, whose pixels show it.
    """

    pixels: Tensor
    name: str
    slide_id: str | None = None
    tissue: np.ndarray | None = None
    shape: tuple[int, int] | None = None


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


def slide_of(path: Path | str) -> str | None:
    """Slide id in a tile's or region's file name ``<slide>_<x>_<y>``, parsed from the right."""
    name = os.fspath(path).rpartition(os.sep)[2]
    match = TILE_NAME.fullmatch(name.rpartition(".")[0] or name)
    return match["slide"] if match else None


def index_of(seed: int, draw: int, attempt: int, count: int) -> int:
    """Which of ``count`` samples a draw takes: a permutation per pass, then independent replacements."""
    if attempt == 0:
        return randomness.permuted(seed, draw, count)
    return int(randomness.generator(seed, draw, f"replacement/{attempt}").integers(count))


class ImageFolder:
    """Tiles of a folder.

    Args:
        root: The folder.
        names: Paths of image files in it, in a fixed order.
        cache: Keeps what was decoded; None to decode a tile each time it is drawn. The pixels are the same.
    """

    def __init__(self, root: Path, names: Sequence[str], cache: TileCache | None = None) -> None:
        self.root, self._names, self._cache = root, Names(names), cache

    def __len__(self) -> int:
        """How many tiles there are."""
        return len(self._names)

    def __call__(self, seed: int, draw: int, attempt: int = 0) -> Sample:
        """Decode the tile of one draw.

        Raises:
            BadSample: If the file cannot be decoded.
        """
        index = index_of(seed, draw, attempt, len(self))
        name = self._names[index]
        path = self.root / name
        try:
            return Sample(decode(path) if self._cache is None else self._cache(index, path), name, slide_of(name))
        except DataError as error:
            raise BadSample(printable(name), str(error)) from None

    @property
    def fingerprint(self) -> str:
        """Hash of the tile names in order."""
        return self._names.fingerprint

    @property
    def slide_ids(self) -> set[str]:
        """Slides that the tiles were cut from, as far as their names tell."""
        return {slide for name in self._names if (slide := slide_of(name))}


def keep_partition(
    files: Sequence[F], slide_of_file: Callable[[F], str | None], partitions: Mapping[str, str]
) -> list[F]:
    """The files that may be pretrained on: those of slides whose partition is blank or ``pretrain``.

    Args:
        files: Names or paths.
        slide_of_file: Tells a file's slide.
        partitions: Partition of each slide; slides that are not listed are kept.
    """
    held_out = {slide for slide, partition in partitions.items() if partition not in {"", "pretrain"}}
    return [file for file in files if slide_of_file(file) not in held_out] if held_out else list(files)
