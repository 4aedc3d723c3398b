"""Features of all tiles of a ROOT, memory-mapped: colours, clusters, similarity to a tile, nearest neighbours."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from dino.data.bags import find_bags, map_features, open_bag
from dino.errors import ConfigError, DataError
from dino.extraction.catalogue import Catalogue
from dino.extraction.colours import Clusters, ColourBasis
from dino.extraction.folders import tile_folder
from dino.extraction.neighbours import Bounds
from dino.extraction.words import Probe, Words, read_words

FITTED_ROWS = 20_000  # tiles that colours and clusters are fitted to, evenly from all slides
BLOCK_ROWS = 65_536  # rows that are converted to float32 at a time
BOUNDED_ROWS = 100_000  # tiles from which on bounds of similarities pay
EXAMPLES = 16  # tiles that show a cluster
CLUSTERS = 10  # where there are no words
MAX_CLUSTERS = 64

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class SlideFeatures:
    """The features of one slide.

    Attributes:
        rows: ``(n, D)`` float16 or float32, memory-mapped.
        tile_of_row: ``(n,)`` index in tiles.csv of the tile of each row, -1 for a tile that is not listed there.
    """

    rows: np.ndarray
    tile_of_row: np.ndarray

    @cached_property
    def norms(self) -> np.ndarray:
        """Length of each row, ``(n,)`` float32; a row of zeros has length 1."""
        lengths = [np.linalg.norm(block, axis=1) for block in self.blocks()]
        norms = np.concatenate([*lengths, np.zeros(0, np.float32)])
        return np.where(norms == 0, 1, norms).astype(np.float32)

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows as float32, block by block."""
        for start in range(0, len(self.rows), BLOCK_ROWS):
            yield np.asarray(self.rows[start : start + BLOCK_ROWS], np.float32)

    def unit_blocks(self) -> Iterator[np.ndarray]:
        """All rows with unit length as float32, block by block."""
        for start in range(0, len(self.rows), BLOCK_ROWS):
            yield self.unit(slice(start, start + BLOCK_ROWS))

    def unit(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Rows of unit length, float32."""
        values = np.asarray(self.rows[rows], np.float32)
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        return np.nan_to_num(values / np.where(lengths == 0, 1, lengths))

    def similarity(self, query: np.ndarray) -> np.ndarray:
        """Cosine similarity of each row to a unit-length vector, ``(n,)`` float32."""
        products = [block @ query for block in self.blocks()]
        return np.nan_to_num(np.concatenate([*products, np.zeros(0, np.float32)]) / self.norms, nan=-1.0)

    def by_tile(self, values: np.ndarray, count: int, absent: float | int) -> np.ndarray:
        """Values of rows ``(n, ...)`` in the order of tiles.csv, ``(count, ...)``; ``absent`` where there is no row."""
        listed = self.tile_of_row >= 0
        result = np.full((count, *values.shape[1:]), absent, values.dtype)
        result[self.tile_of_row[listed]] = values[listed]
        return result


@dataclass(frozen=True)
class Neighbour:
    """A tile that is similar to another one: its slide, its index in the slide's tiles, the cosine similarity."""

    slide_id: str
    tile: int
    similarity: float


@dataclass(frozen=True)
class Label:
    """What a cluster is called, and its RGB colour."""

    name: str
    colour: tuple[int, int, int]


class EncoderFeatures:
    """The features of one encoder; all methods may be called from several threads.

    Args:
        catalogue: The ROOT.
        encoder: Name of the encoder.
        clusters: Number of clusters; None for the words of ``dino words`` where there are any, else 10.

    Raises:
        DataError: If there are none of slides of this ROOT.
    """

    def __init__(self, catalogue: Catalogue, encoder: str, clusters: int | None = None) -> None:
        self._catalogue, self.encoder, self._count = catalogue, encoder, clusters
        folder = tile_folder(catalogue.root, encoder)
        self._paths = {slide: path for slide, path in find_bags(folder).items() if slide in catalogue.tiles}
        if not self._paths:
            raise DataError(f"expected features of the slides of {catalogue.root} in {folder}, found none of them")
        self._slides: dict[str, SlideFeatures] = {}
        self._made: dict[str, object] = {}
        self._lock = threading.RLock()

    @property
    def slide_ids(self) -> Sequence[str]:
        """Slides with features."""
        return list(self._paths)

    def slide(self, slide_id: str) -> SlideFeatures:
        """The features of a slide.

        Raises:
            DataError: If there are none, or their file is damaged.
        """
        with self._lock:
            if slide_id not in self._slides:
                self._slides[slide_id] = self._map(slide_id)
            return self._slides[slide_id]

    @property
    def basis(self) -> ColourBasis:
        """Colours, fitted over all slides."""
        return self._once("basis", lambda: ColourBasis.fit(self._sample()))

    @property
    def words(self) -> Words | None:
        """The words of this encoder; None if there are none, or a number of clusters was asked for.

        Raises:
            DataError: If they are damaged, or of other features.
        """
        if self._count is not None:
            return None
        return self._once("words", lambda: self.checked(read_words(self._catalogue.root, self.encoder)))

    def checked(self, words: Words | None) -> Words | None:
        """Words that were read.

        Raises:
            DataError: If they are of other features.
        """
        if words is not None:
            words.check(self._probed)
        return words

    @property
    def clusters(self) -> Clusters:
        """Words, or clusters fitted over all slides."""
        words = self.words
        return words.clusters if words else self.fitted(self._count or CLUSTERS)

    def fitted(self, count: int) -> Clusters:
        """Clusters fitted to tiles of all slides.

        Args:
            count: Their number.
        """
        return self._once(f"{count} clusters", lambda: Clusters.fit(self._sample(), count))

    def labels(self) -> list[Label]:
        """Name and colour of each cluster: words as they are named now, and the same colour for the same name.

        Raises:
            DataError: If the names cannot be read.
        """
        words = self.words
        return self.labelled(words.names().shown if words else None)

    def labelled(self, names: Sequence[str] | None) -> list[Label]:
        """:meth:`labels` with the given names; None for those of clusters."""
        names = names or [f"Cluster {number}" for number in range(1, len(self.clusters) + 1)]
        colours: dict[str, tuple[int, int, int]] = {}
        for name, colour in zip(names, self.clusters.colours, strict=True):
            colours.setdefault(name, colour)
        return [Label(name, colours[name]) for name in names]

    def unit_blocks(self) -> Iterator[np.ndarray]:
        """The unit-length features of all slides, ``(n, D)`` float32, some of one slide at a time."""
        for slide_id in self._paths:
            yield from self.slide(slide_id).unit_blocks()

    def patient(self, slide_id: str) -> str | None:
        """The patient of a slide, None where it is not recorded."""
        return self._catalogue.slides.status[slide_id].patient_id or None

    def probe(self, slide_id: str) -> Probe | None:
        """The first tile of a slide that is listed, None where there is none."""
        listed = np.flatnonzero(self.slide(slide_id).tile_of_row >= 0)[:1]
        if not len(listed):
            return None
        x, y = self._catalogue.tiles[slide_id].coords[self.slide(slide_id).tile_of_row[listed[0]]].tolist()
        return Probe(slide_id, x, y, self.slide(slide_id).unit(listed)[0])

    def _probed(self, probe: Probe) -> np.ndarray | None:
        """The features now of the tile of a probe."""
        if probe.slide_id not in self._paths:
            return None
        place = (self._catalogue.tiles[probe.slide_id].coords == (probe.x, probe.y)).all(1)
        features = self.slide(probe.slide_id)
        rows = np.flatnonzero(np.isin(features.tile_of_row, np.flatnonzero(place)))[:1]
        return features.unit(rows)[0] if len(rows) else None

    def rgb(self, slide_id: str) -> np.ndarray:
        """Colours of the tiles of a slide, int64 ``(N, 3)``; -1 for tiles without features."""
        features = self.slide(slide_id)
        rgb = np.concatenate([self.basis.rgb(rows) for rows in features.unit_blocks()])
        return self._by_tile(slide_id, rgb.astype(np.int64), -1)

    def cluster(self, slide_id: str) -> np.ndarray:
        """Cluster of the tiles of a slide, int64 ``(N,)``; -1 for tiles without features."""
        features = self.slide(slide_id)
        found = np.concatenate([self.clusters.assign(rows) for rows in features.unit_blocks()])
        return self._by_tile(slide_id, found, -1)

    def word_of(self, slide_id: str, tile: int) -> int | None:
        """Index of the word of one tile; None where there are no words.

        Raises:
            DataError: If the tile has no features.
        """
        words = self.words
        return int(words.clusters.assign(self.vector(slide_id, tile)[None])[0]) if words else None

    def similarity(self, slide_id: str, query: np.ndarray) -> np.ndarray:
        """Cosine similarity of the tiles of a slide to a unit-length vector, float32 ``(N,)``; NaN without features."""
        return self._by_tile(slide_id, self.slide(slide_id).similarity(query), np.nan)

    def vector(self, slide_id: str, tile: int) -> np.ndarray:
        """The unit-length features of a tile, ``(D,)`` float32.

        Raises:
            DataError: If it has none.
        """
        features = self.slide(slide_id)
        found = np.flatnonzero(features.tile_of_row == tile)
        if not len(found):
            raise DataError(f"expected features of this tile from {self.encoder}, found none; extract the slide again")
        return features.unit(found[:1])[0]

    def neighbours(self, slide_id: str, tile: int, count: int, others: bool = True) -> list[Neighbour]:
        """The tiles most similar to a tile, by exact search through all of them.

        Args:
            slide_id: Its slide.
            tile: Its index in the slide's tiles.
            count: Number of neighbours.
            others: Only tiles of other patients (of other slides, where patients are not recorded).

        Returns:
            The most similar first.
        """
        query, patient = self.vector(slide_id, tile), self._catalogue.patient(slide_id)
        searched = [one for one in self._paths if not others or self._catalogue.patient(one) != patient]
        bounds = self._bounds()
        if bounds is not None:
            found = self._bounded(bounds, query, count, searched, (slide_id, tile))
            if found is not None:
                return found
        found = []
        for other in searched:
            features = self.slide(other)
            similarity = np.where(features.tile_of_row < 0, -np.inf, features.similarity(query))
            if other == slide_id:
                similarity[features.tile_of_row == tile] = -np.inf
            best = np.argpartition(-similarity, min(count, len(similarity) - 1))[:count]
            found += [Neighbour(other, int(features.tile_of_row[i]), float(similarity[i])) for i in best]
            found = sorted(found, key=lambda one: -one.similarity)[:count]
        return [one for one in found if np.isfinite(one.similarity)]

    def _bounded(
        self, bounds: Bounds, query: np.ndarray, count: int, searched: Sequence[str], itself: tuple[str, int]
    ) -> list[Neighbour] | None:
        """:meth:`neighbours` with the help of bounds; None where they do not help."""
        slides = list(self._paths)
        tiles = np.concatenate([self.slide(one).tile_of_row for one in slides])
        excluded, known = tiles < 0, set(searched)
        for slide_id, start, end in zip(slides, bounds.starts, bounds.starts[1:], strict=False):
            if slide_id not in known:
                excluded[start:end] = True
            elif slide_id == itself[0]:
                excluded[start:end] |= tiles[start:end] == itself[1]
        found = bounds.nearest(query, count, excluded)
        if found is None:
            return None
        of_row = np.searchsorted(bounds.starts, found[0], side="right") - 1
        return [
            Neighbour(slides[number], int(tiles[row]), float(similarity))
            for number, row, similarity in zip(of_row, *found, strict=True)
        ]

    def _bounds(self) -> Bounds | None:
        """Bounds of similarities, made beside the first search of many tiles; None until then, and for few tiles."""
        with self._lock:
            if "bounds" not in self._made:
                self._made["bounds"] = None
                slides = [self.slide(one) for one in self._paths]
                if sum(len(one.rows) for one in slides) >= BOUNDED_ROWS:
                    threading.Thread(target=self._make_bounds, args=[slides], daemon=True).start()
            return self._made["bounds"]  # type: ignore[return-value]

    def _make_bounds(self, slides: Sequence[SlideFeatures]) -> None:
        bounds = Bounds(slides, self._sample())
        with self._lock:
            self._made["bounds"] = bounds

    def examples(self) -> list[list[tuple[str, int]]]:
        """Typical tiles of each cluster, near its centre, as ``(slide, tile)``.

        They are of different patients where possible, and of different slides where patients are not recorded.
        """
        return self._once("examples", self._examples)

    def _examples(self) -> list[list[tuple[str, int]]]:
        found: list[dict[str, list[tuple[float, str, int]]]] = [defaultdict(list) for _ in range(len(self.clusters))]
        for slide_id in self._paths:
            features = self.slide(slide_id)
            distances = np.concatenate([self.clusters.distances(rows) for rows in features.unit_blocks()])
            nearest = distances.argmin(1)
            for cluster in np.unique(nearest):
                rows = np.flatnonzero((nearest == cluster) & (features.tile_of_row >= 0))
                rows = rows[np.argsort(distances[rows, cluster])][:EXAMPLES]
                found[cluster][self._catalogue.patient(slide_id)] += [
                    (float(distances[row, cluster]), slide_id, int(features.tile_of_row[row])) for row in rows
                ]
        return [_in_turn(by_patient) for by_patient in found]

    def _by_tile(self, slide_id: str, values: np.ndarray, absent: float) -> np.ndarray:
        return self.slide(slide_id).by_tile(values, len(self._catalogue.tiles[slide_id].coords), absent)

    def _once(self, name: str, make: Callable[[], Result]) -> Result:
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]  # type: ignore[return-value]

    def _sample(self) -> np.ndarray:
        """Unit-length rows, as many of each slide, evenly over its rows: ``(n, D)``."""

        def rows() -> np.ndarray:
            share = max(1, FITTED_ROWS // len(self._paths))
            parts = []
            for slide_id in self._paths:
                features = self.slide(slide_id)
                count = len(features.rows)
                parts.append(features.unit(np.unique(np.linspace(0, count - 1, min(share, count)).astype(np.int64))))
            return np.concatenate(parts)

        return self._once("sample", rows)

    def _map(self, slide_id: str) -> SlideFeatures:
        if slide_id not in self._paths:
            raise DataError(f"expected features of slide '{slide_id}' from {self.encoder}, found none; extract it")
        bag = open_bag(self._paths[slide_id])
        if bag.coords is None or not len(bag):
            raise DataError(f"expected features of tiles with coordinates of slide '{slide_id}', found none")
        return SlideFeatures(map_features(bag), _match(self._catalogue.tiles[slide_id].coords, bag.coords))


def check_clusters(count: int | None) -> None:
    """Raise ConfigError if a number of clusters is out of range."""
    if count is not None and not 2 <= count <= MAX_CLUSTERS:
        raise ConfigError(f"expected 2 to {MAX_CLUSTERS} clusters, found {count}")


def only_encoder(catalogue: Catalogue, encoder: str | None, clusters: int | None) -> EncoderFeatures | None:
    """The features to export: of the encoder that was named, or of the only one; None if there are none.

    Raises:
        ConfigError: If there are several, and none was named.
        DataError: If there are none of that name.
    """
    names = catalogue.chosen_encoders([encoder] if encoder is not None else [])
    if encoder is None and len(names) > 1:
        raise ConfigError(
            f"expected to know whose clusters to export, found features of {', '.join(names)}; pass encoder={names[0]}"
        )
    return EncoderFeatures(catalogue, names[0], clusters) if names else None


def _match(listed: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """Index in ``listed`` (N, 2) of each of ``coords`` (n, 2), -1 for those that are not listed."""
    if np.array_equal(listed, coords):  # as written by this package
        return np.arange(len(coords))
    known = {(x, y): i for i, (x, y) in enumerate(listed.tolist())}
    return np.array([known.get((x, y), -1) for x, y in coords.tolist()], np.int64)


def _in_turn(by_patient: dict[str, list[tuple[float, str, int]]]) -> list[tuple[str, int]]:
    """The nearest tile of each patient, then the second of each, and so on."""
    ranked = [
        (rank, distance, slide, tile)
        for tiles in by_patient.values()
        for rank, (distance, slide, tile) in enumerate(sorted(tiles)[:EXAMPLES])
    ]
    return [(slide, tile) for _, _, slide, tile in sorted(ranked)[:EXAMPLES]]
