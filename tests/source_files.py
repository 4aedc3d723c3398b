"""Small slides, lists of them, and data folders that are tiled from them."""

import csv
from pathlib import Path
from typing import Any

from painted_slide import halved, noise, write_slide

from dino.api.tiling import tile
from dino.config.schema import TileConfig

SMALL: dict[str, Any] = {"tile_size_px": 32, "region_size_px": 64, "num_workers": 1, "previews": False}


def write_list(folder: Path, slides: dict[str, str], **columns: str) -> Path:
    """Slides and a list of them: their partition by name; ``columns`` are values of all."""
    for seed, name in enumerate(slides):
        pixels = noise(200, 140, seed + 100 * len(folder.name))
        write_slide(folder / f"{name}.tiff", [pixels, halved(pixels)])
    rows = [(name, f"{name}.tiff", partition, *columns.values()) for name, partition in slides.items()]
    with (folder / "slides.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("sample_id", "image_path", "partition", *columns), *rows])
    return folder / "slides.csv"


def tiled(slide_list: Path, root: Path, storage: str, **settings: object) -> Path:
    """A data folder with the tiles of slides."""
    assert tile([slide_list], root, TileConfig(**{**SMALL, **settings}, storage=storage)).exit_code == 0
    return root
