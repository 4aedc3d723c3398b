"""The words around the figures: sections of a report from its evidence."""

from collections.abc import Mapping
from typing import Any

from dino.report import attention, curves, maps, sheets
from dino.report.evidence import (
    AttentionEvidence,
    CropEvidence,
    Evidence,
    FeatureEvidence,
    RunEvidence,
    SlideEvidence,
)
from dino.report.page import Picture, Section, Table
from dino.report.projection import nearest, pca_rgb, spread_out
from dino.report.sheets import Cell

QUERIES = 4
NEIGHBOURS = 5


def sections(evidence: Evidence) -> list[Section]:
    """Every section that the evidence has something for, in reading order."""
    found = []
    if evidence.slide:
        found.append(Section("Slide and tiles", _counted(evidence.slide), [tiling_picture(evidence.slide)]))
    if evidence.crops:
        lead = "The first samples of the run, with the very random numbers that they were trained with."
        found.append(Section("What the network sees", lead, [crops_picture(evidence.crops, evidence.tile_um_per_px)]))
    if evidence.runs:
        lead = "Both losses are divided by ln K, so that runs with different numbers of prototypes K compare."
        found.append(Section("Training", lead, [curves_picture(run) for run in evidence.runs]))
    if evidence.features and evidence.slide:
        found.append(features_section(evidence.features, evidence.slide, evidence.own_place))
    pictures = []
    if evidence.tile_attention:
        pictures.append(tile_attention_picture(evidence.tile_attention))
    if evidence.region_attention:
        pictures.append(region_attention_picture(evidence.region_attention))
    if pictures:
        lead = "What the cls token of the last block draws on: where a network looks, not why."
        found.append(Section("Attention", lead, pictures))
    return found


def tiling_picture(slide: SlideEvidence) -> Picture:
    """Tiles and regions on the slide."""
    content = maps.tiling_map(slide.ground, slide.tiles, slide.side, slide.regions, slide.shown_regions)
    bold = " Attention over the bold ones is shown below." if len(slide.shown_regions) else ""
    return Picture(
        content,
        f"Thumbnail of slide {slide.slide_id}, with its {len(slide.tiles)} tiles outlined, and with its "
        f"{len(slide.regions)} regions outlined.",
        "Middle: what lies in no tile is faded, so faded tissue was left out and bright glass was taken in. Right: "
        f"regions are made of whole tiles of the same lattice.{bold}",
    )


def crops_picture(crops: CropEvidence, um_per_px: float) -> Picture:
    """Crops of a few tiles."""
    return Picture(
        sheets.crop_sheet(crops.tiles, crops.crops, um_per_px),
        f"{len(crops.tiles)} tiles, each followed by its {len(crops.crops[0])} augmented crops.",
        "Each row is one tile and its crops, after all augmentation, with the normalisation undone. The teacher sees "
        "the two global crops, the student all of them. The crops should still look like tissue: colours that no "
        "stain has, or local crops without any structure, ask for milder settings.",
    )


def curves_picture(run: RunEvidence) -> Picture:
    """Curves of one run."""
    return Picture(
        curves.curves(run.lines),
        f"Curves of the run of the {run.name.lower()}: loss, teacher entropy, learning rate, and a fourth panel.",
        f"{run.name}. A loss at 1 is a student that knows nothing of its teacher. The teacher's entropy should fall "
        "from 1 and settle well above 0: at 1 it finds all prototypes alike, at 0 it knows only one, and both are "
        "collapse. The loss follows the teacher, so it may rise while the features get better.",
    )


def features_section(features: FeatureEvidence, slide: SlideEvidence, own_place: Mapping[str, Any] | None) -> Section:
    """PCA maps, neighbours and the own-place table."""
    panels = [("Untrained", pca_rgb(features.untrained)), ("Trained", pca_rgb(features.trained))]
    picture = Picture(
        maps.feature_maps(slide.ground, panels, features.squares, features.square),
        f"Slide {slide.slide_id}, and its tiles coloured by the principal components of their features, untrained and "
        "trained.",
        "Each square is one tile, its first three principal components shown as red, green and blue. Tiles of like "
        "colour have like features; the colours themselves mean nothing and do not compare between panels. Good "
        "features give tissue of one kind one colour, with edges where the tissue changes.",
    )
    items: list[Picture | Table] = [picture, neighbours_picture(features)]
    if own_place:
        items.append(own_place_table(own_place))
    return Section("What the features hold", "The untrained network is the floor that training has to beat.", items)


def neighbours_picture(features: FeatureEvidence) -> Picture:
    """A few tiles and those most like them, by both networks."""
    trained = features.trained[features.separate]
    untrained = features.untrained[features.separate]
    queries = spread_out(trained, QUERIES)

    def row(rows: Any, query: int) -> list[Cell]:
        return [
            Cell(features.pixels[i], f"{cosine:.2f}")
            for i, cosine in zip(*nearest(rows, query, NEIGHBOURS), strict=True)
        ]

    return Picture(
        sheets.neighbour_sheet(
            [features.pixels[query] for query in queries],
            [row(trained, query) for query in queries],
            [row(untrained, query) for query in queries],
        ),
        f"{len(queries)} tiles, each with its nearest tiles by the trained and by the untrained network.",
        f"Tiles that differ much from one another, each with the {NEIGHBOURS} most similar of {len(trained)} tiles "
        "that do not overlap; below them the cosine similarity. An untrained network goes by colour and brightness; a "
        "trained one should find the same kind of tissue.",
    )


def own_place_table(own_place: Mapping[str, Any]) -> Table:
    """Own-place retrieval: teacher, untrained, pixels, chance.

    Args:
        own_place: ``tiles`` (how many) and the shares ``teacher``, ``untrained``, ``pixels``.
    """
    count = own_place["tiles"]
    names = {"teacher": "Trained teacher", "untrained": "Untrained network", "pixels": "8 x 8 pixels, less their mean"}
    rows = [[name, f"{own_place[key]:.1%}"] for key, name in names.items()]
    return Table(
        ["Features", "Tiles that find their own place"],
        [*rows, ["Chance", f"{1 / count:.1%}"]],
        f"Each of {count} tiles is read once more, shifted by 64 px along both axes, turned by a quarter and with its "
        "stain jittered; the share whose nearest tile of the original lattice, by cosine similarity, is its own place. "
        "It needs no labels, and asks only whether features survive what should not matter.",
    )


def tile_attention_picture(evidence: AttentionEvidence) -> Picture:
    """Attention over tiles."""
    content = attention.attention_sheet(evidence.pictures, evidence.trained, evidence.untrained, evidence.um_per_px)
    return Picture(
        content,
        f"{len(evidence.pictures)} tiles with the attention of the patch-level network laid over them.",
        "Tiles. Attention above an even share is red; the deepest red is twice that share, or more where a panel has "
        "more. A pale panel looks everywhere alike, as an untrained network does. Heads that look at different things "
        "(nuclei, fibres, edges) are a good sign.",
    )


def region_attention_picture(evidence: AttentionEvidence) -> Picture:
    """Attention over regions."""
    height, width = evidence.trained.shape[-2:]
    content = attention.attention_sheet(
        evidence.pictures, evidence.trained, evidence.untrained, evidence.um_per_px, smooth=False
    )
    return Picture(
        content,
        f"{len(evidence.pictures)} regions with the attention of the region-level network laid over them.",
        f"Regions of {height} x {width} tiles, one square per tile: here the tokens are tiles. Read as above.",
    )


def _counted(slide: SlideEvidence) -> str:
    scope = "One slide" if slide.slides == 1 else f"{slide.slides:,} slides"
    shown = "" if slide.slides == 1 else f" The pictures are of {slide.slide_id}."
    return f"{scope}, {slide.all_tiles:,} tiles, {slide.all_regions:,} regions.{shown}"
