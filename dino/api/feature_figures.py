"""Figures of features: tiles of a slide in colour, and tiles as points."""

import numpy as np

from dino.api.feature_data import stored_colours
from dino.api.figure_source import FigureSource
from dino.environment import import_extra
from dino.errors import ConfigError
from dino.report import figures, style
from dino.report.projection import pca_rgb, unit_rows
from dino.report.robustness import VALUE_COLOURS, scatter

SIZE = 5.0  # inches of a map of features
NOT_RECORDED = "not recorded"


def pca(source: FigureSource, encode: style.Encode) -> bytes:
    """Tiles of a slide, coloured by the principal components of their features.

    Where ROOT has the features of the model, the colours are those of the viewer, fitted over all slides.
    """
    source.expect_images("pca")
    thumbnail = source.slide.thumbnail()
    stored = None if source.config.untrained else stored_colours(source.model, source.root, source.slide.slide_id)
    if stored is not None:
        panel = f"Principal components over {stored.slides}", stored.rgb
        return figures.feature_maps(thumbnail, [panel], stored.corners, stored.square, encode)
    mapped = source.slide.read_map(source.config.tiles)
    panels = [
        (f"{name.capitalize()}: principal components", pca_rgb(source.features(network, mapped.pixels)))
        for name, network in reversed(source.networks.items())
    ]
    return figures.feature_maps(thumbnail, panels, mapped.corners, mapped.square, encode)


def umap(source: FigureSource, encode: style.Encode) -> bytes:
    """Tiles as points, near one another where their features are similar."""
    source.expect_images("umap")
    package = import_extra("umap", "the figure 'umap'", "umap")
    tiles, by = source.tiles, source.config.by
    labels = _labels(source, by)
    features = unit_rows(source.features(source.model, tiles.pixels))
    points = package.UMAP(random_state=0, n_jobs=1, n_neighbors=min(15, len(features) - 1)).fit_transform(features)
    words = sorted({*labels})
    numbers = np.array([words.index(label) for label in labels])
    with style.figure(SIZE, SIZE + 0.6) as drawn:
        axes = drawn.subplots()
        scatter(axes, points, numbers, words, VALUE_COLOURS)
        axes.set_title(f"UMAP of {len(points):,} tiles, by {by}")
        drawn.subplots_adjust(left=0.02, right=0.98, top=0.94, bottom=0.18)
        return encode(drawn)


def _labels(source: FigureSource, by: str) -> list[str]:
    """What each tile is coloured by.

    Raises:
        ConfigError: If there is no such column.
        DataError: If it is a column of a ROOT, and `dino tile` did not write the folder.
    """
    tiles = source.tiles
    known = {"slide": tiles.slides, "patient": tiles.owners}
    if by in known:
        return [value or NOT_RECORDED for value in known[by]]
    columns = ("centre", "scanner", "stain", "partition")
    if by not in columns:
        raise ConfigError(f"expected by to be {', '.join((*known, *columns))}, found '{by}'")
    status = source.tables.slides.status
    return [getattr(status.get(slide or ""), by, "") or NOT_RECORDED for slide in tiles.slides]
