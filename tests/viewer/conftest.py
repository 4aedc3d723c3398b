"""A ROOT of three painted slides of two patients, with features, and the viewer of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dino.config.load import load_config
from dino.config.schema import TileConfig
from dino.extraction import tile_files
from dino.slides.tables import read_regions, read_slide_tiles
from tests import painted_slide

HOSTILE = "<img src=x onerror=alert(1)>&\"'"  # a slide id can be this
PATIENTS = {"one": "P1", "two": "P1", HOSTILE: "P2"}
CENTRES = {"one": "A", "two": "B", HOSTILE: "A"}
DIM = 8
UNIT = 4  # px per step of red and green


def write_features(root: Path, encoder: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Features of all tiles that differ from each other, in the files that `dino extract` writes."""
    rng = np.random.default_rng(seed)
    (root / f"features_{encoder}").mkdir()
    written = {}
    for slide_id, tiles in read_slide_tiles(root).items():
        import torch

        rows = rng.normal(size=(len(tiles.coords), DIM)).astype(np.float32)
        path = root / f"features_{encoder}" / f"{slide_id}.h5"
        with tile_files.create(path, tiles.coords, tile_files.Layout(DIM), {}, {}) as file:
            file.write(np.arange(len(rows)), torch.from_numpy(rows))
        written[slide_id] = rows
    return written


def write_grids(root: Path, encoder: str, seed: int = 2) -> dict[str, np.ndarray]:
    """Grids of features of all regions, in the files that `dino extract` writes: ``(h * w, D)`` by file name."""
    import torch

    rng, folder = np.random.default_rng(seed), root / f"region_4096_pretraining_{encoder}"
    folder.mkdir()
    written = {}
    for record in read_regions(root):
        rows = rng.normal(size=(record.grid[0] * record.grid[1], DIM)).astype(np.float32)
        torch.save(torch.from_numpy(rows), folder / record.path.name)
        written[record.path.name] = rows
    return written


def write_maps(catalogue, folder: Path, names: Sequence[str] = ("tile", "tile x region")) -> None:
    """Attention maps of slide "one": 1 in the left half of its tiles, 3 in the right half, and three times that."""
    from dino.extraction.pyramid import write_pyramid

    status = catalogue.slides.status["one"]
    values = np.ones((4 * (status.height // 64), 4 * (status.width // 64)), np.float32)  # 4 tokens a side
    values[:, values.shape[1] // 2 :] = 3
    spacing = 16 * status.spacing_um
    write_pyramid(folder / "one.ome.tif", lambda: iter([values, 3 * values]), names, values.shape, spacing)


@pytest.fixture(scope="session")
def painted(tmp_path_factory) -> Path:
    """The ROOT, without features."""
    from dino import api

    folder = tmp_path_factory.mktemp("viewer")
    lines = ["sample_id,image_path,patient_id,centre"]
    for number, (slide_id, patient) in enumerate(PATIENTS.items()):
        pixels = painted_slide.coordinates(700 + 64 * number, 640, UNIT)
        levels = [pixels, pixels[::4, ::4]]
        painted_slide.write_slide(folder / "slides" / f"{number}.tif", levels)
        quoted = slide_id.replace('"', '""')
        lines.append(f'"{quoted}",slides/{number}.tif,{patient},{CENTRES[slide_id]}')
    (folder / "slides.csv").write_text("\n".join(lines) + "\n")
    settings = load_config(
        TileConfig, overrides={"tile_size_px": 64, "region_size_px": 256, "storage": "none", "previews": False}
    )
    assert api.tile([folder / "slides.csv"], folder / "root", settings).exit_code == 0
    return folder / "root"


@pytest.fixture(scope="session")
def features(painted) -> dict[str, np.ndarray]:
    """The features of encoder "random", written into the ROOT."""
    return write_features(painted, "random")


@pytest.fixture(scope="session")
def catalogue(painted, features):
    """The tables of the ROOT with features."""
    from dino.extraction.catalogue import read_catalogue

    return read_catalogue(painted)
