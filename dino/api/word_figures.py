"""The figures of ``dino figure words``."""

from pathlib import Path

from dino.api.feature_data import word_data, word_map
from dino.api.words import encoder_of, find_words
from dino.config.schema import FigureConfig
from dino.errors import ConfigError, DataError
from dino.extraction.catalogue import read_catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.extraction.words import read_words
from dino.report import style
from dino.report.words import one_word, overview, slide_map

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


def _slides_with(features: EncoderFeatures, word: int) -> list[str]:
    """The slides with most tiles of a word."""
    counts = {slide: int((features.cluster(slide) == word).sum()) for slide in features.slide_ids}
    return sorted((slide for slide in counts if counts[slide]), key=lambda slide: -counts[slide])[:SLIDES]
