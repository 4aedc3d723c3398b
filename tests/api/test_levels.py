"""Levels: the data that each finds in a folder, the metadata of samples, and the registry."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from painted_slide import halved, noise, write_slide
from PIL import Image

from dino.api import levels, pretrain
from dino.api.levels import LEVELS, PatchLevel, RegionLevel, build_level, level_named, level_of
from dino.api.tiling import tile
from dino.config.load import load_config
from dino.config.schema import PatchConfig, RegionConfig, TileConfig
from dino.data.datasets import slide_of
from dino.errors import ConfigError, DataError
from dino.slides.tables import read_regions, read_tiles

TINY = {"model.arch": "vit:dim=32,depth=2,heads=2", "speed.device": "cpu"}


@pytest.fixture
def slides_csv(tmp_path: Path) -> Path:
    """Two slides of tissue: one with all columns, one with none of the optional ones."""
    for seed, name in enumerate(("one", "two")):
        pixels = noise(517, 391, seed)
        write_slide(tmp_path / f"{name}.tiff", [pixels, halved(pixels)])
    with (tmp_path / "slides.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("sample_id", "image_path", "patient_id", "centre"),
                ("one", "one.tiff", "patient 1", "Basel"),
                ("two", "two.tiff", "", ""),
            ]
        )
    return tmp_path / "slides.csv"


def tiled(slides_csv: Path, storage: str) -> Path:
    root = slides_csv.parent / "data" / "root"
    settings = TileConfig(tile_size_px=64, region_size_px=256, spacing_um=0.49, num_workers=1, storage=storage)
    assert tile([slides_csv], root, settings).exit_code == 0
    assert list(root.rglob("coordinates/previews/**/*.jpg"))  # images that are no tiles
    return root


def patch(root: Path, **changes: object) -> PatchConfig:
    return load_config(PatchConfig, overrides={**TINY, "data_dir": str(root), **changes})


def region(root: Path, **changes: object) -> RegionConfig:
    return load_config(RegionConfig, overrides={**TINY, "data_dir": str(root), **changes})


def test_previews_of_a_tiled_root_are_not_used_as_tiles(slides_csv: Path) -> None:
    root = tiled(slides_csv, "none")
    with pytest.raises(DataError, match=r"found none \(storage=none\); read them from the slides"):
        pretrain(patch(root, output_dir=str(root.parent / "run"), source="files"))
    assert not (root.parent / "run").exists()
    tiles = {record.path.stem for record in read_tiles(root)}
    dataset = build_level(patch(root)).dataset  # of the slides
    assert {Path(dataset[i].name).name for i in range(len(dataset))} == tiles


def test_only_the_tiles_of_roots_in_a_folder_are_found(slides_csv: Path) -> None:
    root = tiled(slides_csv, "jpeg")
    tiles = {record.path.name for record in read_tiles(root)}
    names = [build_level(patch(folder)).dataset[0].name for folder in (root, root.parent)]
    assert {Path(name).name for name in names} <= tiles
    assert len(build_level(patch(root)).dataset) == len(build_level(patch(root.parent)).dataset) == len(tiles)
    Image.new("RGB", (64, 64)).save(root / "figure.png")
    assert len(build_level(patch(root)).dataset) == len(tiles)


def test_missing_tiles_of_a_root_raise_an_error(slides_csv: Path) -> None:
    root = tiled(slides_csv, "jpeg")
    (root / "patch_256_pretraining").rename(root / "moved")
    with pytest.raises(DataError, match=r"\(source=slides\), or tile the same slides again"):
        build_level(patch(root))


@pytest.mark.parametrize("stray", [False, True])
def test_the_error_for_a_root_without_grids_names_dino_extract(slides_csv: Path, stray: bool) -> None:
    root = tiled(slides_csv, "none")
    if stray:
        torch.save(torch.randn(16, 3), root / "elsewhere.pt")
    with pytest.raises(DataError, match=r"region_4096_pretraining, found none; run `dino extract MODEL .*root` first"):
        build_level(region(root))


def test_tiles_have_slide_patient_centre_and_spacing(slides_csv: Path) -> None:
    root = tiled(slides_csv, "jpeg")
    records = {record.path.name: record for record in read_tiles(root)}
    dataset = build_level(patch(root)).dataset
    found = [dataset[i] for i in range(len(dataset))]
    assert {sample.slide_id for sample in found} == {"one", "two"}
    for sample in found:
        record = records[Path(sample.name).name]
        assert sample.slide_id == record.slide_id == slide_of(sample.name)
        assert sample.spacing_um == record.spacing_um == 0.5  # the slide's own, within the tolerance of 0.49
        assert sample.shape == (64, 64) and sample.pixels.shape == (3, 64, 64)
        expected = ("patient 1", "Basel") if record.slide_id == "one" else (None, None)
        assert (sample.patient_id, sample.centre) == expected


def test_grids_have_slide_patient_centre_and_spacing(slides_csv: Path) -> None:
    root = tiled(slides_csv, "none")
    (root / "region_4096_pretraining").mkdir()
    records = {record.path.name: record for record in read_regions(root)}
    for name in records:
        torch.save(torch.randn(16, 3), root / "region_4096_pretraining" / name)
    level = build_level(region(root))
    assert level.geometry == {"spacing_um": 0.49, "tile_size_px": 64, "region_cells": [4, 4]}
    assert level.slides == {"slide_ids": ["one", "two"], "patient_ids": ["patient 1"]}
    assert len(level.dataset) == len(records) > 1
    for sample in (level.dataset[i] for i in range(len(level.dataset))):
        record = records[sample.name.removesuffix("#0")]
        assert (sample.slide_id, sample.spacing_um, sample.shape) == (record.slide_id, record.spacing_um, (4, 4))
        assert np.array_equal(sample.tissue, record.tissue)
        expected = ("patient 1", "Basel") if record.slide_id == "one" else (None, None)
        assert (sample.patient_id, sample.centre) == expected


def test_images_of_a_plain_folder_have_slide_ids_only(tmp_path: Path) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / "a_slide_0_64.png")
    Image.new("RGB", (32, 24)).save(tmp_path / "picture.png")
    dataset = build_level(patch(tmp_path)).dataset
    assert [dataset[i].slide_id for i in range(2)] == ["a_slide", None]
    assert (dataset[0].patient_id, dataset[0].centre, dataset[0].spacing_um) == (None, None, None)
    assert dataset[0].shape == (24, 32)


def test_levels_are_found_by_name_and_by_settings() -> None:
    assert level_named("patch") is level_of(PatchConfig()) is PatchLevel
    assert level_named("region") is level_of(RegionConfig()) is RegionLevel
    with pytest.raises(ConfigError, match="expected a level patch or region, found 'slide'"):
        level_named("slide")


def test_a_further_level_is_one_class_in_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class WideConfig(PatchConfig):
        """Settings of a level of this test."""

    class WideLevel(PatchLevel):
        name, schema = "wide", WideConfig

        def __init__(self, config: WideConfig) -> None:
            self.data = config.data_dir

    monkeypatch.setattr(levels, "LEVELS", {**LEVELS, "wide": WideLevel})
    level = build_level(WideConfig(data_dir=str(tmp_path)))
    assert isinstance(level, WideLevel) and level.data == str(tmp_path)
    assert level_named("wide") is WideLevel and level_of(PatchConfig()) is PatchLevel


@pytest.mark.parametrize(
    ("tile_size", "patch_size", "expected"), [(256, 16, 256), (256, 14, 252), (None, 14, 252), (8, 16, 16)]
)
def test_export_size_is_the_largest_multiple_of_the_patch_size(
    tmp_path: Path, tile_size: int | None, patch_size: int, expected: int
) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / "picture.png")
    side = 4 * patch_size
    sizes = {"model.patch_size": patch_size, "aug.global_crops_size": side, "aug.local_crops_size": side}
    level = build_level(patch(tmp_path, **sizes))
    level.geometry["tile_size_px"] = tile_size
    assert level.export_size_px == expected


def test_labelled_items_of_another_level_raise_errors(tmp_path: Path) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / "picture.png")
    torch.save(torch.randn(24, 3), tmp_path / "grid.pt")
    image, grid = tmp_path / "picture.png", tmp_path / "grid.pt"
    spec = levels.BackboneSpec("hvit_xs", "region", 3, (4, 6), 1)
    with pytest.raises(DataError, match=r"expected images for the level-1 model M, found the feature grid .*grid\.pt"):
        PatchLevel.labelled_reader([image, grid], spec, PatchConfig(), "M", {})
    with pytest.raises(DataError, match=r"expected \.pt feature grids for the level-2 model M, found .*picture\.png"):
        RegionLevel.labelled_reader([image, grid], spec, RegionConfig(), "M", {})
    assert PatchLevel.labelled_reader([image], spec, PatchConfig(), "M", {})(image).shape == (3, 24, 32)
    read = RegionLevel.labelled_reader([grid], spec, RegionConfig(), "M", {})
    with pytest.raises(DataError, match="square"):  # no regions.csv
        read(grid)
    torch.save(torch.randn(16, 5), grid)
    with pytest.raises(DataError, match="expected one region of D=3"):
        read(grid)
