"""What is trained on and what is held out: known values of ``partition``, and counts before, during and after a run."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from painted_slide import noise, write_slide
from tiny_runs import TINY_PATCH

from dino import api
from dino.config.load import load_config
from dino.config.schema import KnnConfig, PatchConfig, ReportConfig, TileConfig
from dino.errors import DataError
from dino.slides.partitions import Split, split_files, unknown_values
from dino.slides.tables import read_tiles

PARTITIONS = {"one": "", "two": "pretrain", "three": "train", "four": "test"}
TILING = TileConfig(tile_size_px=64, region_size_px=256, min_tissue=0.0, num_workers=1)


def tiled(folder: Path, partitions: dict[str, str]) -> Path:
    for seed, name in enumerate(partitions):
        write_slide(folder / f"{name}.tiff", [noise(384, 320 + 64 * seed, seed)], mpp=0.5)
    with (folder / "slides.csv").open("w", newline="") as file:
        rows = [(name, f"{name}.tiff", partition) for name, partition in partitions.items()]
        csv.writer(file).writerows([("sample_id", "image_path", "partition"), *rows])
    assert api.tile([folder / "slides.csv"], folder / "root", TILING).exit_code == 0
    return folder / "root"


def settings(root: Path, run: Path, **changes: object) -> PatchConfig:
    values = {**TINY_PATCH, "data_dir": str(root), "output_dir": str(run), "training.max_steps": 2, **changes}
    return load_config(PatchConfig, overrides=values)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiled(tmp_path_factory.mktemp("held_out"), PARTITIONS)


def counts(root: Path, *slides: str) -> int:
    return sum(tile.slide_id in slides for tile in read_tiles(root))


def test_tiling_warns_of_unknown_partitions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiled(tmp_path, {"one": "", "two": "train", "three": "held_out"})
    text = capsys.readouterr().out
    assert re.search(r"slides\.csv: partition 'train' holds 1 slide out of pretraining.*pretrain.*val, test", text)
    assert "did you mean 'pretrain'" in text and "'held_out'" not in text


def test_a_dry_run_counts_what_is_trained_on_and_held_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = api.pretrain(settings(root, root, dry_run=True)).numbers
    trained, held_out = counts(root, "one", "two"), counts(root, "three", "four")
    assert (numbers["samples"], numbers["slides"]) == (trained, 2)
    assert (numbers["held_out_samples"], numbers["held_out_slides"]) == (held_out, 2)
    text = capsys.readouterr().out
    assert f"training on {trained} tiles of 2 slides; held out: " in text
    assert f"{counts(root, 'three')} tiles of 1 slide (train)" in text and "partition 'train'" in text


def test_the_first_lines_and_the_report_of_a_run_count_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    api.pretrain(settings(root, run))
    trained, held_out = counts(root, "one", "two"), counts(root, "three", "four")
    lines = capsys.readouterr().out.splitlines()
    assert f"training on {trained} tiles of 2 slides" in lines[0] and "partition 'train'" in lines[1]
    data = json.loads((run / "status.json").read_text())["data"]
    assert (data["samples"], data["slides"]) == (trained, 2)
    assert data["held_out"]["test"] == {"slides": 1, "samples": counts(root, "four")}

    text = api.report([run], root, tmp_path / "report.html", ReportConfig(device="cpu")).read_text()
    found = text.index("whole-slide images were read with hs2p")
    methods = text[found - 10 : text.index("<", found)].rpartition(">")[2]
    assert "2 whole-slide images were read with hs2p" in methods and f"cut into {trained} tiles" in methods
    assert "2 further slides were held out from pretraining" in methods
    assert f"on {trained} tiles of 2 slides with DINO" in methods
    assert f"{trained + held_out} tiles" not in methods
    assert f"Patch level: trained on {trained} tiles of 2 slides; held out: " in text


def test_a_root_with_held_out_slides_only_names_their_partitions(tmp_path: Path) -> None:
    root = tiled(tmp_path, {"one": "train", "two": "train"})
    with pytest.raises(DataError, match=r"found only held-out slides \(2 of partition 'train'\); change partition"):
        api.pretrain(settings(root, tmp_path / "run"))


def test_files_are_split_by_their_slides() -> None:
    files = ["a1", "b1", "a2", "c1", "d1"]
    kept, held_out = split_files(files, lambda name: name[0], {"a": "test", "b": "", "c": "failed", "e": "val"})
    assert kept == ["b1", "d1"] and held_out == {"failed": (1, 1), "test": (1, 2)}
    split = Split("tiles", 2, 2, held_out)
    assert str(split) == "2 tiles of 2 slides; held out: 1 tile of 1 slide (failed), 2 tiles of 1 slide (test)"
    assert Split.from_dict(json.loads(json.dumps(split.to_dict()))) == split
    assert str(Split("regions", 1, 0)) == "1 region; held out: none"


def test_known_partitions_need_no_warning() -> None:
    assert unknown_values(["", "pretrain", "val", "test", "held_out"]) == []
    assert len(unknown_values(["Pretrain", "train", "train", "fold 1"])) == 3


@pytest.mark.parametrize("how", ["same path", "copy", "link"])
def test_a_held_out_slide_that_is_trained_on_under_another_id_is_refused(how: str, tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tiff", [noise(384, 320, 1)], mpp=0.5)
    other = tmp_path / ("a.tiff" if how == "same path" else "b.tiff")
    if how == "copy":
        shutil.copy(tmp_path / "a.tiff", other)
    elif how == "link":
        other.symlink_to(tmp_path / "a.tiff")
    with (tmp_path / "slides.csv").open("w", newline="") as file:
        rows = [("one", "a.tiff", "pretrain"), ("two", other.name, "test")]
        csv.writer(file).writerows([("sample_id", "image_path", "partition"), *rows])
    assert api.tile([tmp_path / "slides.csv"], tmp_path / "root", TILING).exit_code == 0
    with pytest.raises(
        DataError, match=r"found the file of two \(partition 'test'\).*also as one, which is trained on"
    ):
        api.pretrain(settings(tmp_path / "root", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_labelled_tiles_of_the_pretraining_are_refused_although_their_ids_are_other_ones(
    root: Path, tmp_path: Path
) -> None:
    """Copies under new names, and tiles of a held-out slide, which may be scored."""
    run = tmp_path / "run"
    api.pretrain(settings(root, run))
    of_slide = {slide: sorted((root / "patch_256_pretraining" / "imgs" / slide).iterdir()) for slide in PARTITIONS}
    for index in range(4):
        shutil.copy(of_slide["one"][index], tmp_path / f"copy{index}.jpg")

    def table(test: list[Path]) -> Path:
        rows = [(path, "xy"[i % 2], "train") for i, path in enumerate(of_slide["three"][:4])]
        rows += [(path, "xy"[i % 2], "test") for i, path in enumerate(test)]
        with (tmp_path / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image_path", "label", "partition"), *rows])
        return tmp_path / "labels.csv"

    knn = KnnConfig(k=[1], device="cpu")
    with pytest.raises(DataError, match="test files that the model has not been pretrained on, found 4"):
        api.evaluate_knn(str(run), table([tmp_path / f"copy{index}.jpg" for index in range(4)]), knn)
    scores = api.evaluate_knn(str(run), table(of_slide["four"][:4]), knn)
    assert scores["about"]["leakage"]["seen_files"] == []
    assert scores["about"]["leakage"]["compared"] == "slides by file name and files by path and content"
