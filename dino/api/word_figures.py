"""What figures of words are made from, and the figures of ``dino figure words``."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from dino.api.words import count_words, encoder_of, find_words
from dino.config.schema import FigureConfig
from dino.data.images import decode
from dino.errors import ConfigError, DataError
from dino.extraction.catalogue import Catalogue, read_catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.extraction.words import read_words
from dino.report import style
from dino.report.figures import Thumbnail
from dino.report.words import WordData, WordMap, one_word, overview, slide_map
from dino.slides.tables import tile_path

THUMBNAIL_PX = 1600
SLIDES = 6  # of one word


def words_figure(model: str, root: Path, config: FigureConfig, encode: style.Encode) -> bytes:
    """Typical tiles of all words; with ``config.word`` one word over its slides, with ``config.slide`` all over one.

    Words that have not been found are found first, with the defaults of ``dino words``.

    Raises:
        ConfigError: If there is no such word.
        DataError: If slides, features or words cannot be read.
        CheckpointError: If the model cannot be loaded.
    """
    catalogue = read_catalogue(root, config.slides)
    name = encoder_of(catalogue, model)
    if read_words(root, name) is None:
        find_words(model, root)
    features = EncoderFeatures(catalogue, name)
    if config.word is not None and not 1 <= config.word <= len(features.clusters):
        raise ConfigError(f"expected word from 1 to {len(features.clusters)}, found {config.word}")
    if config.slide is not None and config.slide not in features.slide_ids:
        known = ", ".join(list(features.slide_ids)[:3])
        raise DataError(f"expected slide={config.slide} among the slides with features of {name}, found {known}")
    data = word_data(catalogue, features, None if config.word is None else config.word - 1, config.slide is None)
    if config.word is not None:
        shown = [config.slide] if config.slide is not None else _slides_with(features, config.word - 1)
        return one_word(data, config.word - 1, [word_map(catalogue, features, slide) for slide in shown], encode)
    if config.slide is not None:
        return slide_map(data, word_map(catalogue, features, config.slide), encode)
    return overview(data, encode)


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
    square = tiles.step_lv0 / catalogue.tiling.geometry.positions_per_step
    corners = tiles.coords + (tiles.step_lv0 - square) / 2  # an overlapping tile fills its middle
    return WordMap(slide_id, thumbnail, corners, square, features.cluster(slide_id))


def _slides_with(features: EncoderFeatures, word: int) -> list[str]:
    """The slides with most tiles of a word."""
    counts = {slide: int((features.cluster(slide) == word).sum()) for slide in features.slide_ids}
    return sorted((slide for slide in counts if counts[slide]), key=lambda slide: -counts[slide])[:SLIDES]


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
