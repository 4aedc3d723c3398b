"""``words``: clusters of the tiles of all slides, which a pathologist can name."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino import progress
from dino.config.schema import WordsConfig
from dino.environment import versions
from dino.errors import ConfigError, DataError
from dino.extraction.catalogue import Catalogue, read_catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.extraction.folders import encoder_name, tile_folder, words_folder
from dino.extraction.prototypes import head_of_features, mean_of_prototypes
from dino.extraction.record import COMPARED, EARLIER, RECORD, check_made_by, read_record
from dino.extraction.words import TABLE, Count, Words, write_assigned, write_table, write_words
from dino.files import oserror_to_data_error, tidy
from dino.models.weights import load_backbone_file

METHODS = KMEANS, PROTOTYPES = "kmeans", "prototypes"
COUNT, FEWEST, MOST = 16, 2, 64
PROBES = 8  # slides of which one tile is recorded


@dataclass(frozen=True)
class WordsSummary:
    """Result of :func:`find_words`.

    Attributes:
        words: The words.
        counts: How often each occurs.
        names: What each is called.
    """

    words: Words
    counts: list[Count]
    names: list[str]

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return sum(count.tiles for count in self.counts)


def find_words(model: str, root: Path, config: WordsConfig | None = None) -> WordsSummary:
    """Find the words of the tiles of all slides; count them again where they have been found before.

    Words that exist are kept, so that their names stay true: the tiles of slides that were added get the nearest one.

    Args:
        model: Run or checkpoint whose features are in ROOT, or the name of their encoder.
        root: ROOT of ``dino tile``, with the features of tiles that ``dino extract`` wrote.
        config: Number and method.

    Raises:
        ConfigError: If a setting is out of range, or the words that exist were found with another one.
        DataError: If there are no features of ``model``, or those of another model of that name; if words are of other
            features; if a file cannot be read or written.
        CheckpointError: If ``model`` cannot be loaded.
    """
    config = config or WordsConfig()
    if config.method not in (None, *METHODS):
        raise ConfigError(f"expected method {' or '.join(METHODS)}, found '{config.method}'")
    if config.count is not None and not FEWEST <= config.count <= MOST:
        raise ConfigError(f"expected count from {FEWEST} to {MOST}, found {config.count}")
    catalogue = read_catalogue(root)
    name = encoder_of(catalogue, model)
    folder = words_folder(root, name)
    with oserror_to_data_error(folder):
        words = EncoderFeatures(catalogue, name).words
        if words is None:
            words = _find(model, catalogue, name, config)
            folder.mkdir(exist_ok=True)
            tidy(folder)
            write_words(words)
        else:
            _check_same(words, config)
        features = EncoderFeatures(catalogue, name)  # with these words
        assigned = ((slide, catalogue.tiles[slide].coords, features.cluster(slide)) for slide in features.slide_ids)
        write_assigned(words, assigned)
        counts = count_words(features)
        write_table(words, counts)
    return WordsSummary(words, counts, words.names().shown)


def encoder_of(catalogue: Catalogue, model: str) -> str:
    """The encoder that is meant: the one of that name, or that of a run, checkpoint or export.

    Raises:
        DataError: If it is of level 2, or ROOT has no features of it, or those of another model of the same name.
        CheckpointError: If the model cannot be loaded.
    """
    loaded = load_backbone_file(model) if Path(model).exists() else None
    if loaded is not None and loaded.transform is None:
        raise DataError(
            f"expected the level-1 run that made the features of tiles in {catalogue.root}, found {model}, which is of "
            "level 2; pass the level-1 run"
        )
    (name, *_) = catalogue.chosen_encoders([model if model in catalogue.encoders else encoder_name(model)])
    if name == model and loaded is None:
        return name
    loaded = loaded or load_backbone_file(model)
    check_made_by(tile_folder(catalogue.root, name), loaded, f"name the encoder '{name}' alone")
    return name


def count_words(features: EncoderFeatures) -> list[Count]:
    """How often each word occurs."""
    size = len(features.clusters)
    tiles, slides = np.zeros(size, np.int64), np.zeros(size, np.int64)
    patients: list[set[str]] = [set() for _ in range(size)]
    for slide_id in features.slide_ids:
        found = features.cluster(slide_id)
        counts = np.bincount(found[found >= 0], minlength=size)
        tiles += counts
        slides += counts > 0
        for word in np.flatnonzero(counts):
            patients[word].add(features.patient(slide_id) or slide_id)
    recorded = all(features.patient(slide_id) for slide_id in features.slide_ids)
    return [Count(int(tiles[i]), int(slides[i]), len(patients[i]) if recorded else None) for i in range(size)]


# ---------------------------------------------------------------------------------------------- finding words


def _find(model: str, catalogue: Catalogue, name: str, config: WordsConfig) -> Words:
    folder = words_folder(catalogue.root, name)
    if (folder / TABLE).exists():
        raise DataError(
            f"expected the words of {folder / TABLE} beside it, found none; move that table away to find new words"
        )
    count, method = config.count or COUNT, config.method or KMEANS
    features = EncoderFeatures(catalogue, name, count)
    progress.say(f"{count} words ({method}) of the tiles of {len(features.slide_ids)} slides, features of {name}")
    if method == PROTOTYPES:
        clusters = mean_of_prototypes(head_of_features(model, catalogue.root, name), features, count)
    else:
        clusters = features.fitted(count).refined(features.unit_blocks)
    sizes = sum(np.bincount(clusters.assign(rows), minlength=len(clusters)) for rows in features.unit_blocks())
    clusters = clusters.ordered(np.asarray(sizes))
    probed = features.slide_ids[:: max(1, len(features.slide_ids) // PROBES)][:PROBES]
    record = EARLIER | read_record(tile_folder(catalogue.root, name) / RECORD)
    details = {
        "encoder": name,
        "method": method,
        "count": count,
        "slides": len(features.slide_ids),
        "features": {key: record.get(key) for key in (*COMPARED, "model")},
        "versions": versions(),
    }
    return Words(folder, clusters, [one for slide in probed if (one := features.probe(slide))], details)


def _check_same(words: Words, config: WordsConfig) -> None:
    """Raise ConfigError if words were found with other settings than those that are asked for."""
    for setting in ("count", "method"):
        asked, found = getattr(config, setting), words.details.get(setting)
        if asked is not None and asked != found:
            raise ConfigError(
                f"expected {setting}={found}, with which the words in {words.folder} were found, found {asked}; move "
                f"that folder away (its {TABLE} has the names) to find new words"
            )
