"""``figure``: single figures for a publication, from the code of the report."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dino.api.feature_figures import pca, umap
from dino.api.figure_source import FigureSource
from dino.api.word_figures import words_figure
from dino.config.schema import FigureConfig
from dino.environment import import_extra
from dino.errors import ConfigError, DataError
from dino.files import oserror_to_data_error, write_bytes
from dino.report import montages, style
from dino.report.features import neighbour_images, query_image
from dino.report.heatmap import heatmap, place
from dino.report.projection import farthest_points

WORDS = "words"


def figure(kind: str, model: str, root: Path, output: Path, config: FigureConfig | None = None) -> Path:
    """Write one figure.

    Args:
        kind: ``attention``, ``heatmap``, ``neighbours``, ``pca``, ``umap`` or ``words``.
        model: Run folder, checkpoint, export or ``timm:NAME``; for words also the name of an encoder with features in
            ROOT.
        root: ROOT of `dino tile`, or a folder of images (attention, neighbours and umap of a level-1 model).
        output: A .png, .pdf or .svg file.
        config: Which slide, tiles and heads.

    Returns:
        ``output``.

    Raises:
        ConfigError: If there is no such kind or format, a setting does not fit, or a package is not installed.
        DataError: If slides, tiles or features cannot be read, or the file cannot be written.
        CheckpointError: If the model cannot be loaded.
    """
    config, form = config or FigureConfig(), output.suffix.lower().removeprefix(".")
    if kind not in (*FIGURES, WORDS):
        raise ConfigError(f"expected a figure {', '.join((*FIGURES, WORDS))}, found '{kind}'")
    if form not in style.FORMATS:
        raise ConfigError(f"expected a figure ending in .{', .'.join(style.FORMATS)}, found {output}")
    for name in ("dpi", "rows", "k", "tiles"):
        if getattr(config, name) < 1:
            raise ConfigError(f"expected {name} of at least 1, found {getattr(config, name)}")
    import_extra("matplotlib", "figures")
    encode = style.encoder(form, config.dpi)
    if kind == WORDS:
        content = words_figure(model, root, config, encode)
    else:
        with ExitStack() as stack:
            content = FIGURES[kind](FigureSource(model, root, config, stack), encode)
    with oserror_to_data_error(output.parent):
        write_bytes(output, content)
    return output


def _attention(source: FigureSource, encode: style.Encode) -> bytes:
    """Tissue of tiles or regions, and the attention of the cls token over it."""
    count = source.model.backbone.num_heads
    heads = source.config.heads or range(1, min(3, count) + 1)
    wrong = [head for head in heads if not 1 <= head <= count]
    if wrong:
        raise ConfigError(f"expected heads from 1 to {count}, found {wrong[0]}")
    if source.reads_images:
        tiles = source.tiles
        images = [tiles.pixels[i] for i in _queries(source)]
        inputs, um_per_px = images, tiles.um_per_px
    else:
        regions, inputs = source.regions(every=False)
        images = [source.slide.region_image(region) for region in regions]
        tile_um = source.slide.spacing_um * source.slide.root.tiling.geometry.tile_size_px
        um_per_px = tile_um * regions[0].grid[0] / images[0].shape[0]
    maps = {name: source.attention(network, inputs) for name, network in source.networks.items()}
    return montages.attention_montage(
        images,
        maps["trained"],
        maps.get("untrained"),
        um_per_px,
        heads=[head - 1 for head in heads],
        smooth=source.reads_images,
        encode=encode,
    )


def _heatmap(source: FigureSource, encode: style.Encode) -> bytes:
    """Attention of the cls token of every tile or region, in place on the slide; of both levels also the product."""
    slide, tile = source.slide, source.model if source.reads_images else source.level_1
    thumbnail, maps = slide.thumbnail(), []
    if tile is not None:
        shown, _, _ = slide.map_tiles(source.config.tiles)
        boxes = np.array([(one.x, one.y, one.step_lv0, one.step_lv0) for one in shown], dtype=np.float64)
        relative = _relative(source.attention(tile, slide.read(shown)))
        maps.append(("Attention over tiles", place(thumbnail, boxes, relative)))
    if not source.reads_images:
        regions, grids = source.regions(every=True)
        relative = _relative(source.attention(source.model, grids))
        maps.append(("Attention over regions", place(thumbnail, slide.boxes(regions), relative)))
    if len(maps) > 1:
        maps.append(("Product", maps[0][1] * maps[1][1]))
    return heatmap(thumbnail, maps, encode)


def _relative(maps: np.ndarray) -> list[np.ndarray]:
    """The mean over heads (h, w) of each of ``maps`` (n, heads, h, w), relative to its mean over the tokens."""
    means = maps.mean(1)  # (n, h, w)
    return list(means / means.mean((1, 2), keepdims=True))


def _neighbours(source: FigureSource, encode: style.Encode) -> bytes:
    """Tiles, and their nearest neighbours from other patients."""
    source.expect_images("neighbours")
    tiles, queries = source.tiles, _queries(source)
    if len(tiles.names) < 2:
        raise DataError(f"expected at least two tiles in {source.root}, found {len(tiles.names)}")
    sides = {
        name: neighbour_images(tiles, source.features(network, tiles.pixels), queries, source.config.k)
        for name, network in source.networks.items()
    }
    images = [query_image(tiles, query) for query in queries]
    return montages.neighbour_montage(images, sides["trained"], sides.get("untrained", []), encode)


def _queries(source: FigureSource) -> list[int]:
    """The tile that the settings name; else dissimilar ones."""
    if source.config.tile is not None:
        return [0]
    return farthest_points(source.features(source.model, source.tiles.pixels), source.config.rows)


FIGURES: Mapping[str, Callable[[FigureSource, style.Encode], bytes]] = {
    "attention": _attention,
    "heatmap": _heatmap,
    "neighbours": _neighbours,
    "pca": pca,
    "umap": umap,
}
