"""Runs on tiles that are read from slides: the promises of runs on tile files hold for them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from painted_slide import halved, noise, write_slide
from tiny_runs import (
    Crash,
    assert_same_bits,
    assert_vanishing_data_ends_in_one_line,
    command,
    config,
    crash_after,
    last,
    metrics,
    with_evaluation,
)

from dino.api import extract, pretrain
from dino.api.tiling import tile
from dino.config.schema import ExtractConfig, PatchConfig, TileConfig
from dino.errors import ConfigError, DataError
from dino.models.weights import load_backbone_file
from dino.slides.tables import read_tiles

PLACED = {"sampling.jitter_px": 12, "sampling.spacing_um": [0.5, 1.0], "speed.open_slides": 2}
SMALL = {"tile_size_px": 32, "region_size_px": 64, "num_workers": 1, "previews": False}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four slides, one of them held out, of which only the places of tiles were written."""
    names = ("one", "two", "three", "held")
    for seed, name in enumerate(names):
        pixels = noise(230, 170, seed)
        write_slide(tmp_path / "slides" / f"{name}.tiff", [pixels, halved(pixels)])
    with (tmp_path / "slides.csv").open("w", newline="") as file:
        rows = [(name, f"slides/{name}.tiff", name[0], "test" if name == "held" else "") for name in names]
        csv.writer(file).writerows([("sample_id", "image_path", "patient_id", "partition"), *rows])
    assert tile([tmp_path / "slides.csv"], tmp_path / "root", TileConfig(**SMALL, storage="none")).exit_code == 0
    return tmp_path / "root"


def settings(root: Path, output: Path, **changes: object) -> PatchConfig:
    found = config(root, output, **{**PLACED, **changes})
    assert isinstance(found, PatchConfig)
    return found


def quarantine(run: Path) -> dict[str, str]:
    with (run / "quarantine.csv").open(newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def test_a_run_on_slides_is_judged_exported_and_records_what_it_read(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    summary = pretrain(settings(root, tmp_path / "run"))
    assert "tiles are read from slides, shifted by up to 12 px, at 0.5 or 1 µm/px" in capsys.readouterr().out
    assert summary.state == "finished" and summary.numbers["bad_files"] == 0
    saved = last(tmp_path / "run")
    assert saved["geometry"]["spacings_um"] == [0.5, 1.0] and saved["geometry"]["tile_size_px"] == 32
    assert saved["training_slides"] == {"slide_ids": ["one", "three", "two"], "patient_ids": ["o", "t"]}
    split = json.loads((tmp_path / "run" / "status.json").read_text())["data"]
    held = sum(record.slide_id == "held" for record in read_tiles(root))
    assert split["samples"] == len(read_tiles(root)) - held and split["held_out"] == {
        "test": {"slides": 1, "samples": held}
    }


def test_a_run_on_crops_across_scales_records_its_spacings(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    across = {"sampling.spacing_um": [], "aug.global_spacing_um": 1.0, "aug.local_spacing_um": 0.5}
    pretrain(settings(root, tmp_path / "whole", **across, **{"logging.report": True}))
    said = "shifted by up to 12 px, global crops at 1 and local crops at 0.5 µm/px about the same centre"
    assert said in capsys.readouterr().out
    assert last(tmp_path / "whole")["geometry"] == {"spacing_um": 0.5, "tile_size_px": 32, "spacings_um": [0.5, 1.0]}
    with pytest.raises(ConfigError, match="global_spacing_um"):
        pretrain(settings(root, tmp_path / "whole", **{**across, "aug.global_spacing_um": 2.0}))


def test_a_slide_that_is_damaged_after_tiling_is_left_out_tile_by_tile(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slides" / "two.tiff").write_bytes(b"no slide")
    lenient = {"training.max_bad_fraction": 0.6, "training.max_steps": 16}
    pretrain(settings(root, tmp_path / "run", **lenient))
    found = quarantine(tmp_path / "run")
    assert found and all(name.startswith("two/two_") and "two.tiff" in reason for name, reason in found.items())
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 8)
        pretrain(settings(root, tmp_path / "cut", **lenient))
    pretrain(settings(root, tmp_path / "cut", **lenient, **{"speed.num_workers": 3}))
    assert_same_bits(tmp_path / "run", tmp_path / "cut")


def test_another_slide_under_the_same_name_is_not_trained_on(root: Path, tmp_path: Path) -> None:
    write_slide(tmp_path / "slides" / "two.tiff", [noise(262, 170, 9)])
    pretrain(settings(root, tmp_path / "run", **{"training.max_bad_fraction": 0.6}))
    reasons = set(quarantine(tmp_path / "run").values())
    assert len(reasons) == 1 and "expected the slide that was tiled, 230 x 170 px" in reasons.pop()


@pytest.mark.parametrize("workers", [0, 1])
def test_slides_that_vanish_end_the_run_in_one_line(workers: int, root: Path, tmp_path: Path) -> None:
    """All of them, as when a mount is lost. Handles that are open may go on for a while."""
    shown = {"speed.num_workers": workers, "training.max_bad_fraction": 1.0, "training.max_steps": 200}
    words = command(settings(root, tmp_path / "run", **shown, **{"speed.open_slides": 1}), tmp_path)
    assert_vanishing_data_ends_in_one_line(words, tmp_path / "slides")


def test_tile_files_and_slides_are_different_data(root: Path, tmp_path: Path) -> None:
    pretrain(settings(root, tmp_path / "run"))
    stored = tmp_path / "stored"
    assert tile([tmp_path / "slides.csv"], stored, TileConfig(**SMALL)).exit_code == 0
    with pytest.raises(ConfigError, match="data"):
        pretrain(config(stored, tmp_path / "run", source="files"))
    pretrain(settings(stored, tmp_path / "again", source="slides"))  # the same places of the same slides
    assert metrics(tmp_path / "again") == metrics(tmp_path / "run")


def test_slides_that_were_pretrained_on_are_known_without_tile_files(root: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    assert tile([tmp_path / "slides.csv"], stored, TileConfig(**SMALL)).exit_code == 0
    images = tmp_path / "labelled"
    images.mkdir()
    for path in (stored / "patch_256_pretraining" / "imgs").rglob("one_*.jpg"):
        shutil.copy(path, images / path.name.replace("one", "slide"))
    found = with_evaluation(images, every_steps=4)
    table = Path(str(found["evaluate.labels"]))
    table.write_text(table.read_text().replace(",held", ",one,").replace("slide_id", "slide_id,nothing"))
    with pytest.raises(DataError, match="slides that the model has not been pretrained on, found 1"):
        pretrain(settings(root, tmp_path / "run", **found))


def test_features_are_extracted_at_the_spacings_that_a_model_was_trained_at(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(settings(root, run, **{"sampling.spacing_um": [1.0]}))
    loaded = load_backbone_file(run)
    assert loaded.spacing_um == 1.0 and loaded.spacings_um == [1.0]
    pretrain(settings(root, tmp_path / "both"))
    assert load_backbone_file(tmp_path / "both" / "backbone").spacings_um == [0.5, 1.0]
    small = ExtractConfig(device="cpu", what="tiles")
    with pytest.raises(DataError, match=r"tiled at the 1 µm/px that .* found 0.5"):
        extract(run, root, small)
    assert tile([tmp_path / "slides.csv"], tmp_path / "coarse", TileConfig(**SMALL, spacing_um=1.0)).exit_code == 0
    for model, data in ((run, tmp_path / "coarse"), (tmp_path / "both", root)):
        assert extract(model, data, small).written == 4
