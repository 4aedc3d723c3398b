"""Tiles that are read from the slides while training: none is stored, and each may be read anywhere on the tissue."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import randomness
from dino.config.schema import SamplingConfig
from dino.data.datasets import UNKNOWN, BadSample, Dataset, Sample, SlideInfo, SlideRanges
from dino.errors import CacheError, ConfigError, DataError
from dino.files import printable
from dino.slides.lattice import Lattice
from dino.slides.places import PlacedTiles
from dino.slides.reader import BACKEND, SlideReader, openslide_cache
from dino.slides.tables import tile_path
from dino.slides.tiled import TiledSlides

CACHE_MB = 64.0  # of a process, for decoded parts of its open slides


def cell_tensor(reader: SlideReader, x: int, y: int) -> Tensor:
    """Pixels of the cell at level-0 ``(x, y)``, as :meth:`~dino.slides.reader.SlideReader.read_cell` returns them.

    Returns:
        ``(3, S, S)`` uint8.

    Raises:
        DataError: If the slide is damaged there.
    """
    return torch.from_numpy(np.ascontiguousarray(reader.read_cell(x, y).transpose(2, 0, 1)))


def corner_of(place: tuple[int, int], step_lv0: int, lattice: Lattice) -> tuple[int, int]:
    """Level-0 corner of the tile of another lattice with the same centre as the tile of ``step_lv0`` px at a place."""
    inner = (step_lv0 - lattice.step_lv0) // 2
    return place[0] + inner, place[1] + inner


def centred(place: tuple[int, int], step_lv0: int, lattices: Sequence[Lattice]) -> tuple[int, int]:
    """The place nearest to a place about whose centre the tiles of all lattices are inside the slide.

    Args:
        place: Level-0 corner of a tile.
        step_lv0: Its side there.
        lattices: Of one slide, at several spacings.

    Raises:
        DataError: If the slide is smaller than a tile.
    """
    for lattice in sorted(lattices, key=lambda one: one.step_lv0):  # the largest tile has the least room
        corner = corner_of(place, step_lv0, lattice)
        inside = lattice.clamped(*corner)
        place = place[0] + inside[0] - corner[0], place[1] + inside[1] - corner[1]
    return place


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the tile of a draw is read, as a function of the draw number.

    Attributes:
        jitter_px: Largest shift along x and y, in px of the tile.
        spacings_um: What is drawn: the spacing of each picture of a sample. All of them have the same centre.
        shares: Share of each of these, which sum to 1.
        seed: Seed.
    """

    jitter_px: int
    spacings_um: Sequence[tuple[float, ...]]
    shares: Sequence[float]
    seed: int
    _numbers: randomness.Stream = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare the generator."""
        object.__setattr__(self, "_numbers", randomness.Stream(self.seed, "placement"))

    @classmethod
    def of(
        cls,
        sampling: SamplingConfig,
        spacing_um: float,
        tile_size_px: int,
        seed: int,
        pictures_um: tuple[float, ...] = (),
    ) -> "Placement":
        """The placement that settings ask for.

        Args:
            sampling: The settings.
            spacing_um: Spacing of tiling.
            tile_size_px: Side of a tile.
            seed: Seed of the run.
            pictures_um: Spacing of each picture of a sample; empty for one picture at a spacing of ``sampling``.

        Raises:
            ConfigError: If a setting is out of range, or both ask for spacings.
        """
        if pictures_um and sampling.spacing_um:
            raise ConfigError(
                f"expected either sampling.spacing_um (found {list(sampling.spacing_um)}) or aug.global_spacing_um and "
                "aug.local_spacing_um, found both; leave one out"
            )
        spacings = list(sampling.spacing_um) or [spacing_um]
        shares = list(sampling.spacing_shares) or [1.0] * len(spacings)
        for name, good, rule in (
            ("jitter_px", 0 <= sampling.jitter_px <= tile_size_px // 2, f"from 0 to {tile_size_px // 2}, half a tile"),
            ("spacing_um", min(spacings) > 0 and len({*spacings}) == len(spacings), "different positive numbers"),
            (
                "spacing_shares",
                len(shares) == len(spacings) and min(shares) > 0,
                f"a positive number for each of the {len(spacings)} spacings of sampling.spacing_um",
            ),
        ):
            if not good:
                raise ConfigError(f"expected sampling.{name} to be {rule}, found {getattr(sampling, name)}")
        sets = [pictures_um] if pictures_um else [(spacing,) for spacing in spacings]
        return cls(sampling.jitter_px, sets, [share / sum(shares) for share in shares], seed)

    def draw(self, draw: int) -> tuple[tuple[float, ...], tuple[float, float]]:
        """Spacing of each picture of a draw, and its shift along x and y in px of the tile, at most half its side."""
        rng = self._numbers.at(draw)
        chosen = int(np.searchsorted(np.cumsum(self.shares)[:-1], rng.random(), side="right"))
        across, down = (2 * rng.random(2) - 1) * self.jitter_px
        return self.spacings_um[chosen], (float(across), float(down))


class OpenSlides:
    """Slides that are kept open, the last used ones of a bounded number. Each process opens its own.

    Opening a slide takes as long as reading five tiles. All share one cache for decoded parts, because tiles are drawn
    at random: the memory of an open slide is then that of its tables, 3 MB for one of 100,000 x 100,000 px.

    Args:
        slides: The slides of a ROOT.
        limit: Largest number of slides to keep open; a slide that is read at two spacings counts twice.
    """

    def __init__(self, slides: TiledSlides, limit: int) -> None:
        self._limit = max(1, limit)
        # Another library has a cache for each slide.
        self._slides = slides if slides.reader == BACKEND else replace(slides, cache_mb=CACHE_MB / self._limit)
        self._open: OrderedDict[tuple[str, float], SlideReader] = OrderedDict()
        self._cache: Any = None
        self._process = os.getpid()

    def __call__(self, slide_id: str, step_lv0: int, spacing_um: float) -> SlideReader:
        """The reader of a slide at a spacing.

        Raises:
            DataError: If it cannot be opened, or differs from the slide that was tiled.
        """
        if self._process != os.getpid():  # a forked worker would share the file positions of its parent's readers
            self._open, self._cache, self._process = OrderedDict(), None, os.getpid()
        key = (slide_id, spacing_um)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        try:
            reader = self._slides.open(slide_id, step_lv0, spacing_um)
        except CacheError:  # other processes have slides open too, such as the main one in an evaluation
            if not self._open:
                raise
            self.close(*{slide for slide, _ in self._open})
            reader = self._slides.open(slide_id, step_lv0, spacing_um)
        if self._slides.reader == BACKEND:
            self._cache = self._cache or openslide_cache(CACHE_MB)
            reader.share_cache(self._cache)
        self._open[key] = reader
        while len(self._open) > self._limit:
            self._open.popitem(last=False)[1].close()
        return reader

    def close(self, *slide_ids: str) -> None:
        """Close slides: after an error openslide reads nothing more through the same handle."""
        for key in [key for key in self._open if key[0] in slide_ids]:
            self._open.pop(key).close()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files."""
        return {**vars(self), "_open": OrderedDict(), "_cache": None}


class SlideTileDataset(Dataset):
    """The tiles of a ROOT, read from its slides (level 1).

    At the listed places and the spacing of tiling the pixels are those that ``dino tile`` cuts, before they are
    compressed. A tile costs less than a byte of memory.

    Args:
        tiles: The listed tiles of each slide.
        slides: Where the slides are.
        infos: What is known of each slide.
        placement: Where the tile of a draw is read.
        open_slides: Slides that a process keeps open.

    Raises:
        DataError: If a slide cannot give a spacing.
    """

    def __init__(
        self,
        tiles: Sequence[PlacedTiles],
        slides: TiledSlides,
        infos: Mapping[str, SlideInfo],
        placement: Placement,
        open_slides: int = 64,
    ) -> None:
        self._geometry, self._placement, self._infos = slides.geometry, placement, infos
        self._ids = [one.slide_id for one in tiles]
        self._steps = [one.step_lv0 for one in tiles]
        self._places = [one.places for one in tiles]
        self._starts = np.cumsum([0, *map(len, self._places)], dtype=np.int64)
        _check_spacings(self._ids, slides, sorted({one for each in placement.spacings_um for one in each}))
        pictures = max(map(len, placement.spacings_um))  # of a slide, with a reader for each
        self._readers = OpenSlides(slides, max(1, open_slides) * pictures)

    def __len__(self) -> int:
        """Number of listed tiles."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        """Read a listed tile at the spacing of tiling.

        Raises:
            BadSample: If its slide cannot be read there.
        """
        return self._read(index, (self._geometry.spacing_um,), (0.0, 0.0))

    def drawn(self, index: int, draw: int) -> Sample:
        """Read a tile at the spacing, and shifted by as much, as its draw number says.

        Where crops are cut across scales, the sample has a picture for each spacing, all with the same centre.

        Raises:
            BadSample: If its slide cannot be read there.
        """
        return self._read(index, *self._placement.draw(draw))

    def drawn_place(self, index: int, draw: int) -> tuple[str, tuple[int, int]]:
        """Slide and level-0 corner of the tile that a draw takes, at the spacing of tiling."""
        number, place = self._listed(index)
        return self._ids[number], self._shifted(number, place, self._placement.draw(draw)[1])

    def places(self, start: int, end: int) -> np.ndarray:
        """Where listed tiles of one slide lie, see :meth:`Dataset.places`."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        before = int(self._starts[number])
        return self._places[number].coords[start - before : end - before]

    def _listed(self, index: int) -> tuple[int, tuple[int, int]]:
        """Number of the slide of a listed tile, and its place."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, self._places[number][index - int(self._starts[number])]

    def _read(self, index: int, spacings_um: Sequence[float], shift: tuple[float, float]) -> Sample:
        number, listed = self._listed(index)
        slide_id, step, size = self._ids[number], self._steps[number], self._geometry.tile_size_px
        name = str(Path(*tile_path(slide_id, *listed).parts[-2:]).with_suffix(""))
        try:
            readers = [self._readers(slide_id, step, spacing) for spacing in spacings_um]
            place = self._shifted(number, listed, shift)
            if any(shift) or any(spacing != self._geometry.spacing_um for spacing in spacings_um):
                place = centred(place, step, [reader.lattice for reader in readers])
            pictures = [cell_tensor(reader, *corner_of(place, step, reader.lattice)) for reader in readers]
        except CacheError:
            raise  # of the disk, not of the slide
        except DataError as error:
            self._readers.close(slide_id)
            raise BadSample(printable(name), f"slide {printable(slide_id)}: {error}") from None
        info = self._infos.get(slide_id, UNKNOWN)
        if spacings_um[0] != self._geometry.spacing_um:
            info = replace(info, spacing_um=readers[0].lattice.spacing_um)
        pixels = pictures[0] if len(pictures) == 1 else torch.stack(pictures)  # (3, S, S) or (P, 3, S, S)
        return Sample(pixels, name, (size, size), slide_id, info)

    def _shifted(self, number: int, place: tuple[int, int], shift: tuple[float, float]) -> tuple[int, int]:
        """A place shifted, if the tiles that it then overlaps are listed; else along x or y only, or not at all."""
        (x, y), step = place, self._steps[number]
        dx, dy = (round(px * step / self._geometry.tile_size_px) for px in shift)
        for across, down in ((dx, dy), (dx, 0), (0, dy)):
            columns = {x, x + step * int(np.sign(across))}
            rows = {y, y + step * int(np.sign(down))}
            if all((column, row) in self._places[number] for column in columns for row in rows):
                return x + across, y + down
        return place

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the slides, the places and the geometry of the tiles."""
        digest = hashlib.sha256(f"slides {self._geometry}".encode())
        for slide_id, step, places in zip(self._ids, self._steps, self._places, strict=True):
            digest.update(os.fsencode(f"\0{slide_id}\0{step}\0"))
            x, y = places.coords.T
            digest.update((y << 32 | x).tobytes())
        return digest.hexdigest()

    @property
    def ranges(self) -> SlideRanges:
        """The slides in the order of their tiles."""
        return SlideRanges(self._ids, self._starts)


def _check_spacings(slide_ids: Sequence[str], slides: TiledSlides, spacings_um: Sequence[float]) -> None:
    """Raise DataError if a slide is coarser than a spacing, or smaller than a tile of it."""
    geometry = slides.geometry
    for spacing in spacings_um:
        if spacing == geometry.spacing_um:
            continue
        for slide_id in slide_ids:
            status = slides.status[slide_id]
            actual = status.spacing_um or geometry.spacing_um
            side = geometry.tile_size_px * spacing / actual
            if actual > spacing * (1 + geometry.tolerance) or side > min(status.width, status.height):
                raise DataError(
                    f"expected slides that give tiles at {spacing:g} µm/px, found '{slide_id}' of {status.width} x "
                    f"{status.height} px at {actual:g} µm/px; leave out that spacing or the slide"
                )
