"""What networks are given and what they make of it: crops, maps, nearest neighbours, attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dino.evaluate.verdict import FROZEN, INITIAL, RANDOM, TEACHER, in_words
from dino.files import printable
from dino.report import figures, montages
from dino.report.data import AttentionData, CropData, FeatureData, ReportData, RunData, SlideData
from dino.report.montages import MontageImage
from dino.report.page import Figure, Section, Table
from dino.report.projection import farthest_points, nearest_neighbours, pca_rgb
from dino.report.tiles import TileSet
from dino.train.evaluator import OWN_PLACE

QUERIES = 4
NEIGHBOURS = 5
MAPS = 3  # runs on one map


def features_section(data: ReportData) -> Section:
    """Feature maps, nearest neighbours and the self-retrieval table."""
    items: list[Figure | Table] = []
    if data.slide and data.features and data.features[0].map:
        items.append(maps_figure(data.slide, data.features))
    items += [neighbours_figure(one) for one in data.features if len(one.tiles.names) > 1]
    if data.self_retrieval:
        items.append(self_retrieval_table(data.self_retrieval))
    items += [table for run in data.runs if run.reads_images and (table := floor_table(run))]
    return Section("Tile features", "The untrained network is the baseline.", items)


def maps_figure(slide: SlideData, features: Sequence[FeatureData]) -> Figure:
    """Tiles of a slide, coloured by their features, untrained and by each run."""
    mapped = [(one.name, one.map) for one in features if one.map]
    panels = [("Untrained", pca_rgb(mapped[0][1].untrained))]
    panels += [(name if len(mapped) > 1 else "Trained", pca_rgb(found.trained)) for name, found in mapped[:MAPS]]
    first = mapped[0][1]
    return Figure(
        figures.feature_maps(slide.thumbnail, panels, first.corners, first.square),
        f"Slide {slide.slide_id}, and its tiles coloured by the principal components of their features, untrained and "
        "trained.",
        "Each square is one tile; red, green and blue are the first three principal components of the features. "
        "Similar colours mean similar features. The colours themselves have no meaning and cannot be compared between "
        "panels. Good features give each kind of tissue one colour, with clear borders.",
    )


def neighbours_figure(features: FeatureData) -> Figure:
    """A few tiles and their nearest neighbours from other patients, for both networks."""
    tiles, queries = features.tiles, farthest_points(features.trained, QUERIES)
    trained, untrained = (
        neighbour_images(tiles, of, queries, NEIGHBOURS) for of in (features.trained, features.untrained)
    )
    return Figure(
        montages.neighbour_montage([query_image(tiles, query) for query in queries], trained, untrained),
        f"{len(queries)} tiles, each with its nearest neighbours by the trained and by the untrained network.",
        f"{features.name}. Dissimilar tiles, each with its {NEIGHBOURS} nearest neighbours among {len(tiles.names):,} "
        f"tiles{whose(tiles)} Below each: cosine similarity, and slide. All tiles have one scale. An untrained "
        "network compares colour and brightness; a trained one should find the same kind of tissue.",
    )


def query_image(tiles: TileSet, index: int) -> MontageImage:
    """A tile with its slide and a scale bar."""
    return MontageImage(tiles.pixels[index], [_name(tiles, index)], tiles.um_per_px)


def neighbour_images(
    tiles: TileSet, features: np.ndarray, queries: Sequence[int], count: int
) -> list[list[MontageImage]]:
    """The nearest neighbours of tiles from other patients, with their cosine similarity and their slide.

    Args:
        tiles: The tiles.
        features: Float, (M, D) of each.
        queries: Indices of those whose neighbours are searched.
        count: Number of neighbours.
    """
    found = [nearest_neighbours(features, query, count, tiles.others(query)) for query in queries]
    return [
        [MontageImage(tiles.pixels[i], [f"{cosine:.2f}", _name(tiles, i)]) for i, cosine in zip(*one, strict=True)]
        for one in found
    ]


def _name(tiles: TileSet, index: int) -> str:
    return printable(tiles.slides[index] or tiles.names[index])


def whose(tiles: TileSet) -> str:
    """The end of a sentence on tiles: of whom the neighbours are."""
    if tiles.patients > 1:
        return (
            f" of {tiles.patients:,} patients; neighbours are of other patients than the tile (a slide without a "
            "recorded patient counts as one)."
        )
    known = "Only one patient is known" if tiles.patients else "Neither patients nor slides are known"
    return f". {known}, so neighbours may be of the same patient, and similar for that reason alone."


def floor_table(run: RunData) -> Table | None:
    """Self-retrieval accuracy that a run measured at its end; None if it did not."""
    floor = run.status.get("floor") or {}
    names = {TEACHER: "Trained teacher", **{name: f"Baseline: {in_words(name)}" for name in (INITIAL, RANDOM, FROZEN)}}
    rows = [[text, f"{floor[key]:.1%}"] for name, text in names.items() if (key := f"{OWN_PLACE}{name}") in floor]
    if not rows:
        return None
    return Table(
        ["Features", "Self-retrieval accuracy"],
        rows,
        f"{run.name}, measured at the end of the run: the fraction of training samples whose second view is closest to "
        "the first view of the same sample. It needs no labels, and measures only how invariant the features are.",
    )


def self_retrieval_table(accuracies: Mapping[str, Any]) -> Table:
    """Self-retrieval accuracy of the teacher and of the baselines.

    Args:
        accuracies: ``teacher``, ``untrained`` and ``pixels``, and the number of ``tiles``.
    """
    count = accuracies["tiles"]
    names = {
        "teacher": "Trained teacher",
        "untrained": "Baseline: untrained network",
        "pixels": "Baseline: 8 x 8 pixels, mean-centred",
    }
    rows = [[name, f"{accuracies[key]:.1%}"] for key, name in names.items()]
    return Table(
        ["Features", "Self-retrieval accuracy"],
        [*rows, ["Chance", f"{1 / count:.1%}"]],
        f"Each of {count} tiles is read four more times, shifted by a quarter of its side along both axes, rotated by "
        "quarter turns and with jittered stain. The accuracy is the fraction of these views whose nearest neighbour "
        "among the original tiles, by cosine similarity, is the same tile. It needs no labels, and measures only how "
        "invariant the features are to these changes.",
    )


def crops_figure(crops: CropData, um_per_px: float) -> Figure:
    """Crops of a few tiles."""
    return Figure(
        montages.crop_montage(crops.tiles, crops.crops, um_per_px if crops.one_spacing else 0.0),
        f"{len(crops.tiles)} tiles, each followed by its {len(crops.crops[0])} augmented crops.",
        "Each row is one tile and its crops after all augmentations (normalization undone). The teacher sees the two "
        "global crops, the student all of them. The crops should still look like tissue: weaken the augmentations if "
        "colours are unlike any stain, or if local crops show no structure.",
    )


def tile_attention_figure(name: str, attention: AttentionData) -> Figure:
    """Attention over tiles."""
    return Figure(
        montages.attention_montage(attention.images, attention.trained, attention.untrained, attention.um_per_px),
        f"{len(attention.images)} tiles overlaid with the attention of {name}.",
        f"{name}: tiles. Red is attention above the mean of the panel; the deepest red is at least twice the mean. A "
        "grey panel has nearly uniform attention, as an untrained network has. Heads that attend to different "
        "structures (nuclei, fibres, edges) are a good sign.",
    )


def region_attention_figure(name: str, attention: AttentionData) -> Figure:
    """Attention over regions."""
    height, width = attention.trained.shape[-2:]
    return Figure(
        montages.attention_montage(
            attention.images, attention.trained, attention.untrained, attention.um_per_px, smooth=False
        ),
        f"{len(attention.images)} regions overlaid with the attention of {name}.",
        f"{name}: regions of {height} x {width} tiles, one square per tile: the tokens of this level are tiles. Red is "
        "attention above the mean of the panel.",
    )
