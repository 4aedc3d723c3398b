"""Settings of ``dino report``, ``dino figure`` and ``dino attention``; part of :mod:`dino.config.schema`."""

from dataclasses import dataclass

from dino.config.declare import runtime


@dataclass
class ReportConfig:
    """`dino report`."""

    slide: str | None = runtime(None, "id of the slide to show (null: the one with the most regions, then tiles)")
    slides: str | None = runtime(None, "folder or slides.csv of the slides, if they were moved after tiling")
    tiles: int | None = runtime(
        None,
        "tiles that are embedded, for maps and for neighbours each (null: 2000; on a CPU fewer for large networks)",
    )
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")


@dataclass
class FigureConfig:
    """`dino figure`."""

    slide: str | None = runtime(
        None, "id of the slide to show (null: the one with the most regions, then tiles; words: typical tiles of all)"
    )
    word: int | None = runtime(None, "words: the only word to show, with its slides, from 1 (null: all)")
    tile: str | None = runtime(
        None, "tile (level 2: region) to show: X,Y in level-0 px on the slide, or an image file (null: dissimilar ones)"
    )
    slides: str | None = runtime(None, "folder or slides.csv of the slides, if they were moved after tiling")
    tiles: int = runtime(1000, "tiles that are embedded at most")
    rows: int = runtime(4, "attention, neighbours: number of tiles or regions, one per row")
    k: int = runtime(5, "neighbours: number of neighbours of each tile")
    heads: list[int] = runtime([], "attention: heads that are shown beside their mean, from 1 (empty: the first three)")
    level_1: str | None = runtime(
        None, "heatmap of a level-2 model: its level-1 model, whose attention and the product of both are shown as well"
    )
    by: str = runtime("slide", "umap: what colours mean: slide, patient, centre, scanner, stain or partition")
    untrained: bool = runtime(False, "also show the untrained network; MODEL has to be a run")
    dpi: int = runtime(300, "px per inch")
    arch: str | None = runtime(None, "architecture of an external checkpoint, if its number of heads is not dim/64")
    transform: str = runtime("auto", "normalisation: auto (recorded in the checkpoint), imagenet, hipt or timm")
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")


@dataclass
class AttentionConfig:
    """`dino attention`."""

    slide: str | None = runtime(None, "id of the only slide to map (null: all)")
    slides: str | None = runtime(None, "folder or slides.csv of the slides, if they were moved after tiling")
    grids: str | None = runtime(None, "encoder whose grids level 2 reads (null: the one that it was trained on)")
    method: str = runtime(
        "last", "last: attention of the cls token in the last block, by head; rollout: through all blocks"
    )
    offsets: int = runtime(1, "places per tile along each axis at which level 1 looks; overlaps are averaged in place")
    stride: int = runtime(1, "distance in cells of the regions that level 2 looks at; overlaps are averaged in place")
    arch: str | None = runtime(None, "architecture of an external checkpoint, if its number of heads is not dim/64")
    transform: str = runtime("auto", "normalisation: auto (recorded in the checkpoint), imagenet, hipt or timm")
    precision: str = runtime("bf16", "bf16 (autocast; fp32 on a CPU without it), fp32 or fp64")
    batch_size: int = runtime(64, "tiles or regions per forward pass")
    num_workers: int = runtime(2, "threads that read pixels")
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
