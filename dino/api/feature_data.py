"""Data of figures from the features that ``dino extract`` wrote: words, and colours that compare between slides."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dino.api.words import count_words
from dino.data.images import decode
from dino.extraction.catalogue import Catalogue, read_catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.extraction.folders import tile_folder
from dino.extraction.record import RECORD, read_record
from dino.models.weights import LoadedBackbone
from dino.report.figures import Thumbnail
from dino.report.words import WordData, WordMap, plural
from dino.slides.tables import tile_path

THUMBNAIL_PX = 1600  # the longer side


@dataclass(frozen=True)
class StoredColours:
    """Colours of the tiles of a slide.

    Attributes:
        corners: Level-0 px, (N, 2): upper left corner of the square that each tile fills.
        square: Side of that square in level-0 px.
        rgb: float64 (N, 3) in [0, 1].
        slides: What they were fitted over, in words.
    """

    corners: np.ndarray
    square: float
    rgb: np.ndarray
    slides: str


def stored_colours(model: LoadedBackbone, root: Path, slide_id: str) -> StoredColours | None:
    """The colours of a slide by the features of all slides; None if ROOT has none of this slide by this model.

    Raises:
        DataError: If the features cannot be read.
    """
    catalogue = read_catalogue(root)
    features = _features_of(catalogue, model)
    if features is None or slide_id not in features.slide_ids:
        return None
    rgb = features.rgb(slide_id)
    known = rgb[:, 0] >= 0
    corners, square = _squares(catalogue, slide_id)
    return StoredColours(corners[known], square, rgb[known] / 255, plural(len(features.slide_ids), "slide"))


def _features_of(catalogue: Catalogue, model: LoadedBackbone) -> EncoderFeatures | None:
    """The features that a model made, None if there are none."""
    for name in catalogue.encoders:
        if read_record(tile_folder(catalogue.root, name) / RECORD).get("fingerprint") == model.fingerprint:
            return EncoderFeatures(catalogue, name)
    return None


def stored_words(model: LoadedBackbone, root: Path, slides: str | None, slide_id: str | None) -> WordData | None:
    """The words of the features of a model, with a map of a slide; None where they have not been looked for.

    Args:
        model: The model.
        root: ROOT.
        slides: Folder or slides.csv of slides that were moved.
        slide_id: The slide to map; None for no map.

    Raises:
        DataError: If features, words or slides cannot be read.
    """
    catalogue = read_catalogue(root, slides)
    features = _features_of(catalogue, model)
    if features is None or features.words is None:
        return None
    shown = None
    if slide_id is not None and slide_id in features.slide_ids:
        shown = word_map(catalogue, features, slide_id)
    return replace(word_data(catalogue, features), map=shown)


def word_data(
    catalogue: Catalogue, features: EncoderFeatures, only: int | None = None, examples: bool = True
) -> WordData:
    """The words of an encoder with typical tiles.

    Args:
        catalogue: The ROOT.
        features: The features.
        only: The only word whose tiles are read; None for all.
        examples: Read typical tiles.

    Raises:
        DataError: If a tile can neither be read from its slide nor from a file.
    """
    wanted = features.examples() if examples or only is not None else [[] for _ in features.labels()]
    wanted = [tiles if only in (None, word) else [] for word, tiles in enumerate(wanted)]
    pixels = _read(catalogue, [tile for tiles in wanted for tile in tiles])
    geometry = catalogue.tiling.geometry
    return WordData(
        features.encoder,
        features.labels(),
        count_words(features),
        [[pixels[tile] for tile in tiles] for tiles in wanted],
        len(features.slide_ids),
        geometry.tile_size_px * geometry.spacing_um,
    )


def word_map(catalogue: Catalogue, features: EncoderFeatures, slide_id: str) -> WordMap:
    """The words of the tiles of a slide on its thumbnail.

    Raises:
        DataError: If the slide cannot be read.
    """
    tiles = catalogue.tiles[slide_id]
    with closing(catalogue.slides.open(slide_id, tiles.step_lv0)) as reader:
        pixels = reader.thumbnail(THUMBNAIL_PX)
        downsample = reader.lattice.slide_size[0] / pixels.shape[1]
        thumbnail = Thumbnail(pixels, downsample, downsample * reader.spacing_um)
    return WordMap(slide_id, thumbnail, *_squares(catalogue, slide_id), features.cluster(slide_id))


def _squares(catalogue: Catalogue, slide_id: str) -> tuple[np.ndarray, float]:
    """The squares that the tiles of a slide fill without overlap: corners (N, 2) and side, in level-0 px."""
    tiles = catalogue.tiles[slide_id]
    square = tiles.step_lv0 / catalogue.tiling.geometry.positions_per_step
    return tiles.coords + (tiles.step_lv0 - square) / 2, square  # an overlapping tile fills its middle


def _read(catalogue: Catalogue, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], np.ndarray]:
    """Pixels of tiles by slide and index, uint8 (S, S, 3): from files where the slide is not there."""
    by_slide: dict[str, list[int]] = defaultdict(list)
    for slide_id, tile in wanted:
        by_slide[slide_id].append(tile)
    found = {}
    for slide_id, tiles in by_slide.items():
        coords, step = catalogue.tiles[slide_id].coords, catalogue.tiles[slide_id].step_lv0
        files = {tile: catalogue.root / tile_path(slide_id, *coords[tile].tolist()) for tile in tiles}
        if catalogue.slides.path(slide_id) is None and all(path.is_file() for path in files.values()):
            for tile, path in files.items():
                found[slide_id, tile] = decode(path).permute(1, 2, 0).numpy()
            continue
        with closing(catalogue.slides.open(slide_id, step)) as reader:
            for tile in tiles:
                found[slide_id, tile] = reader.read_cell(*coords[tile].tolist())
    return found
