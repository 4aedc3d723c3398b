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
