"""Settings of ``dino report`` and ``dino figure``; part of :mod:`dino.config.schema`."""

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

    slide: str | None = runtime(None, "id of the slide to show (null: the one with the most regions, then tiles)")
    tile: str | None = runtime(
        None, "tile (level 2: region) to show: X,Y in level-0 px on the slide, or an image file (null: dissimilar ones)"
    )
    slides: str | None = runtime(None, "folder or slides.csv of the slides, if they were moved after tiling")
    tiles: int = runtime(1000, "tiles that are embedded at most")
    rows: int = runtime(4, "attention, neighbours: number of tiles or regions, one per row")
    k: int = runtime(5, "neighbours: number of neighbours of each tile")
    heads: list[int] = runtime([], "attention: heads that are shown beside their mean, from 1 (empty: the first three)")
    by: str = runtime("slide", "umap: what colours mean: slide, patient, centre, scanner, stain or partition")
    untrained: bool = runtime(False, "also show the untrained network; MODEL has to be a run")
    dpi: int = runtime(300, "px per inch")
    arch: str | None = runtime(None, "architecture of an external checkpoint, if its number of heads is not dim/64")
    transform: str = runtime("auto", "normalisation: auto (recorded in the checkpoint), imagenet, hipt or timm")
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
