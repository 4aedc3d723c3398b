"""Level 2 on features of tiles as TRIDENT writes them, from which regions are cut."""

import shutil
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tiny_runs import TINY, last

from dino.api import pretrain
from dino.api.roots import Root
from dino.config.load import load_config
from dino.config.schema import RegionConfig
from dino.data import region_grids
from dino.data.region_grids import open_regions
from dino.errors import DataError

DIM, SIDE = 6, 4


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """Three slides: of 9 x 8 tiles, of 4 x 9 tiles without two, and one that is too small for a region."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "features_uni"
    folder.mkdir()
    for slide, height, width, absent in (("a.1", 9, 8, 0), ("b_1_2", 4, 9, 2), ("c", 2, 3, 0)):
        cells = np.argwhere(np.ones((height, width)))[: height * width - absent]
        with h5py.File(folder / f"{slide}.h5", "w") as file:
            file["features"] = generator.standard_normal((len(cells), DIM)).astype(np.float32)
            file["coords"] = cells[generator.permutation(len(cells))][:, ::-1] * 256
            file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 256, "overlap": 0})
    return folder


def settings(data: Path, run: Path, **changes: object) -> RegionConfig:
    fixed = {"data_dir": str(data), "output_dir": str(run), "region_cells": SIDE, "training.max_steps": 4}
    return load_config(RegionConfig, overrides={**TINY, "training.batch_size_per_gpu": 2, **fixed, **changes})


@pytest.mark.parametrize("packed", [True, False])
def test_a_run_is_that_of_the_same_regions_as_grids(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    cache = {"speed.cache_dir": str(tmp_path / "cache") if packed else "none"}
    pretrain(settings(features, tmp_path / "cut", **cache))
    said = " ".join(capsys.readouterr().out.split())
    assert "complete regions of 4 x 4 tiles: 5 with 80 of 112 tiles, in 2 of 3 slides; other tiles are left out" in said
    (tmp_path / "grids").mkdir()
    for slide in ("a.1", "b_1_2"):
        regions = open_regions(features / f"{slide}.h5", SIDE)
        torch.save(torch.stack([regions[i] for i in range(len(regions))]), tmp_path / "grids" / f"{slide}.pt")
    pretrain(settings(tmp_path / "grids", tmp_path / "stored", **cache))
    one, other = last(tmp_path / "cut"), last(tmp_path / "stored")
    assert all(torch.equal(one["teacher"][key], other["teacher"][key]) for key in one["teacher"])


def test_the_coordinates_of_few_slides_are_in_memory(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[weakref.ref] = []
    alive = []

    def watched(path: Path, side: int) -> region_grids.RegionGrids:
        alive.append(sum(one() is not None for one in opened))
        found = region_grids._open.__wrapped__(path, side, None)  # that which is not kept for later calls
        opened.append(weakref.ref(found))
        return found

    for number in range(20):
        shutil.copy(features / "a.1.h5", features / f"copy{number}.h5")
    monkeypatch.setattr(region_grids, "open_regions", watched)
    assert len(Root(features).grids(SIDE)[1]) == 22
    assert len(alive) == 23 and max(alive) <= 1


def test_slides_without_a_whole_region_are_an_error(features: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected regions of 10 x 10 tiles .* found 0 with 0 of 112 tiles"):
        pretrain(settings(features, tmp_path / "run", region_cells=10))
    assert not (tmp_path / "run").exists()
