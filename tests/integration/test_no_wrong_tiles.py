"""Folders without tiles end in one line that names what to do, and nothing else is trained on in their place."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import assert_vanishing_data_ends_in_one_line, command, config, make_tiles

from dino.api import pretrain
from dino.errors import DataError
from dino.slides import sample_slide


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message
    return message


@pytest.mark.parametrize("kept", ["tiling.json", None], ids=["with tiling.json", "without"])
def test_a_root_without_its_tiles_is_refused_although_it_has_previews(kept: str | None, tmp_path: Path) -> None:
    from dino.api import tile
    from dino.config.schema import TileConfig

    root = tmp_path / "root"
    tile([sample_slide()], root, TileConfig(tile_size_px=256, region_size_px=1024, num_workers=1, previews=True))
    shutil.rmtree(root / "patch_256_pretraining")
    if kept is None:
        (root / "tiling.json").unlink()
    assert list(root.rglob("*.jpg")), "previews"
    with pytest.raises(DataError) as caught:
        pretrain(config(root, tmp_path / "run"))
    assert "patch_256_pretraining" in one_line(caught) and "tile the same slides again" in one_line(caught)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("slide", ["a.svs", "a.tif", "scans/a.ndpi"])
def test_a_folder_of_slides_is_refused(slide: str, tmp_path: Path) -> None:
    """With thumbnails beside them, which are images; a TIFF pyramid is told by its header."""
    folder = make_tiles(tmp_path / "slides")
    path = folder / slide
    path.parent.mkdir(exist_ok=True)
    shutil.copy(sample_slide(), path)
    with pytest.raises(DataError) as caught:
        pretrain(config(folder, tmp_path / "run"))
    assert slide in one_line(caught) and "`dino tile" in one_line(caught)
    assert not (tmp_path / "run").exists()


def test_tiles_in_tiff_files_are_no_slides(tmp_path: Path) -> None:
    """Neither tiled ones nor ones with several pages."""
    folder = tmp_path / "tiles"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        pages = [Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)) for _ in range(2)]
        pages[0].save(folder / f"{index}.tif", save_all=True, append_images=pages[1:])
    assert pretrain(config(folder, tmp_path / "run", **{"training.max_steps": 1})).state == "finished"


@pytest.mark.parametrize("workers", [0, 1])
def test_tiles_that_vanish_end_the_run_in_one_line(workers: int, tmp_path: Path) -> None:
    """All of them, as when a mount is lost; with a worker, torch would put its traceback into the message."""
    tiles = make_tiles(tmp_path / "tiles")
    settings = config(tiles, tmp_path / "run", **{"speed.num_workers": workers, "training.max_bad_fraction": 1.0})
    words = command(settings, tmp_path)
    assert_vanishing_data_ends_in_one_line(words, tiles)
