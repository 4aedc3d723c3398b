"""A few tiles of a dataset, spread over its slides, with what is known of their origin."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dino.data import BadSample, Dataset, Sample, SlideRanges

TILES_PER_SLIDE = 4  # at least, where there are more slides than tiles can be read


@dataclass(frozen=True)
class TileSet:
    """Tiles of one size.

    Attributes:
        pixels: uint8 (H, W, 3) of each.
        names: Name of each.
        slides: Slide of each, None where it is not known.
        owners: Patient of each; its slide where no patient is recorded, None where neither is known.
        um_per_px: Their spacing; 0 where it is not known.
    """

    pixels: Sequence[np.ndarray]
    names: Sequence[str]
    slides: Sequence[str | None]
    owners: Sequence[str | None]
    um_per_px: float = 0.0

    @property
    def patients(self) -> int:
        """Number of patients, or of slides where no patient is recorded."""
        return len({owner for owner in self.owners if owner})

    def others(self, query: int) -> np.ndarray:
        """Which tiles are known to be of another patient than tile ``query``: bool, (M,).

        If fewer than two patients are known, these are all other tiles.
        """
        if self.patients < 2:
            return np.arange(len(self.owners)) != query
        own = self.owners[query]
        return np.array([owner is not None and own is not None and owner != own for owner in self.owners])

    def subset(self, kept: Sequence[int]) -> "TileSet":
        """Some of the tiles."""
        names, pixels = [self.names[i] for i in kept], [self.pixels[i] for i in kept]
        slides, owners = ([one[i] for i in kept] for one in (self.slides, self.owners))
        return TileSet(pixels, names, slides, owners, self.um_per_px)


def read_some(dataset: Dataset, count: int, *, first: Sequence[int] = ()) -> TileSet:
    """Read tiles of a dataset of images, spread over its slides; those that cannot be read are left out.

    Args:
        dataset: The dataset.
        count: Number of tiles at most.
        first: Indices to read in any case, which come first.
    """
    samples = []
    for index in dict.fromkeys([*first, *spread(dataset.ranges, count)]):
        try:
            samples.append(dataset[index])
        except BadSample:
            continue
    return tile_set(samples)


def tile_set(samples: Sequence[Sample]) -> TileSet:
    """The samples of the most frequent size, that of the first one where several are as frequent."""
    if not samples:
        return TileSet([], [], [], [])
    (shape, _), *_ = Counter(sample.shape for sample in samples).most_common(1)
    kept = [sample for sample in samples if sample.shape == shape]
    spacings = {sample.spacing_um for sample in kept}
    spacing = max(value or 0.0 for value in spacings) if None not in spacings else 0.0
    return TileSet(
        [sample.pixels.permute(1, 2, 0).numpy() for sample in kept],
        [sample.name for sample in kept],
        [sample.slide_id for sample in kept],
        [sample.patient_id or sample.slide_id for sample in kept],
        spacing,
    )


def spread(ranges: SlideRanges, count: int) -> list[int]:
    """Indices of ``count`` samples at most: as many of each slide, evenly spaced; of evenly spaced slides if many.

    Args:
        ranges: The slides of the samples.
        count: Number of samples.
    """
    parts: dict[str | None, list[tuple[int, int]]] = defaultdict(list)
    for slide, start, end in zip(ranges.slide_ids, ranges.starts, ranges.starts[1:], strict=False):
        parts[slide].append((int(start), int(end)))
    slides = list(parts.values())
    if len(slides) * TILES_PER_SLIDE > count:
        slides = [slides[i] for i in _evenly(len(slides), max(1, count // TILES_PER_SLIDE))]
    return [index for slide in slides for index in _of_slide(slide, max(1, count // max(1, len(slides))))]


def _of_slide(parts: Sequence[tuple[int, int]], count: int) -> list[int]:
    starts, lengths = np.array([start for start, _ in parts]), np.array([end - start for start, end in parts])
    before = np.cumsum(lengths) - lengths
    places = np.array(_evenly(int(lengths.sum()), count))
    part = np.searchsorted(before, places, side="right") - 1
    return (starts[part] + places - before[part]).tolist()


def _evenly(total: int, count: int) -> list[int]:
    """``count`` of the numbers below ``total``, evenly spaced; all of them if there are not as many."""
    if total <= count:
        return list(range(total))
    return np.floor((np.arange(count) + 0.5) * total / count).astype(int).tolist()
