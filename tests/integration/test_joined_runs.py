"""Runs on the tiles of several data folders, of different sources and spacings."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from shard_files import as_tars
from source_files import tiled, write_list
from test_shard_runs import quarantine
from tiny_runs import TINY_PATCH, assert_same_bits, config, make_tiles

from dino.api import pretrain
from dino.api.levels import PatchLevel, build_level
from dino.config.load import load_config
from dino.config.schema import PatchConfig
from dino.errors import DataError
from dino.evaluate.contents import find_in_stored


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """A ROOT of JPEG files, one of a tar per slide at twice the spacing, and a folder of WebDataset shards."""
    first = write_list(tmp_path / "basel", {"b1": "", "b2": "test"}, centre="Basel")
    second = write_list(tmp_path / "zurich", {"z1": "", "z2": ""}, centre="Zurich")
    make_tiles(tmp_path / "images")
    return [
        tiled(first, tmp_path / "root1", "jpeg"),
        tiled(second, tmp_path / "root2", "tar", spacing_um=1.0),
        as_tars(tmp_path / "images", tmp_path / "tars"),
    ]


def joined(roots: list[Path], output: Path, **changes: object) -> PatchConfig:
    found = config(roots[0], output, more_data_dirs=[str(root) for root in roots[1:]], **changes)
    assert isinstance(found, PatchConfig)
    return found


def test_all_tiles_are_trained_on_and_recorded(
    roots: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    alone = [build_level(joined([root], tmp_path / "run")) for root in roots]
    level = build_level(joined(roots, tmp_path / "run"))
    said = " ".join(capsys.readouterr().out.split())
    assert "root1: 32 px at 0.5 µm/px" in said and "root2: 32 px at 1 µm/px" in said and "unknown spacing" in said
    assert level.geometry == {"spacing_um": 0.5, "tile_size_px": 32, "spacings_um": [0.5, 1.0]}
    assert level.slides["slide_ids"] == ["b1", "slide0", "slide1", "slide2", "slide3", "z1", "z2"]
    assert level.split.held_out == alone[0].split.held_out != {} and len(level.dataset) == sum(
        len(one.dataset) for one in alone
    )
    index = 0
    for number, one in enumerate(alone, 1):
        for inner in range(len(one.dataset)):
            sample, expected = level.dataset.drawn(index, 7), one.dataset.drawn(inner, 7)
            assert sample.name == (f"{number}:" if number > 1 else "") + expected.name
            assert torch.equal(sample.pixels, expected.pixels) and sample.slide == expected.slide
            index += 1
    ranges = level.dataset.ranges
    assert ranges.counts == {slide: n for one in alone for slide, n in one.dataset.ranges.counts.items()}
    assert ranges.starts[-1] == len(level.dataset)
    fingerprints = {one.dataset.fingerprint for one in (*alone, level, build_level(joined(roots[:2], tmp_path / "r")))}
    assert len(fingerprints) == 5


def test_bad_tiles_are_named_with_the_number_of_their_folder(roots: list[Path], tmp_path: Path) -> None:
    images = sorted((tmp_path / "images").glob("slide0_*"))
    roots[2] = tmp_path / "images"
    for path in images:
        path.write_bytes(b"torn")
    lenient = {"training.max_bad_fraction": 0.5, "training.max_steps": 80}
    pretrain(joined(roots, tmp_path / "run", **lenient))
    assert quarantine(tmp_path / "run").keys() == {f"3:{path.name}" for path in images}


def test_the_command_takes_several_and_resumes_from_anywhere(roots: list[Path], tmp_path: Path) -> None:
    words = [f"{key}={value}" for key, value in TINY_PATCH.items()]
    start = [sys.executable, "-m", "dino", "pretrain", "patch", *(root.name for root in roots), "run", *words]
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    saved = load_config(PatchConfig, file=tmp_path / "run" / "config.yaml")
    assert saved.data_dir == str(roots[0]) and saved.more_data_dirs == [str(root) for root in roots[1:]]
    pretrain(replace(saved, output_dir=str(tmp_path / "other")))
    assert_same_bits(tmp_path / "run", tmp_path / "other")
    again = [sys.executable, "-m", "dino", "resume", str(tmp_path / "run")]
    done = subprocess.run(again, cwd="/", capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ bad input and leakage


def test_two_slides_under_one_id_are_refused(tmp_path: Path) -> None:
    first = tiled(write_list(tmp_path / "basel", {"a": "", "b": ""}), tmp_path / "root1", "jpeg")
    second = tiled(write_list(tmp_path / "zurich", {"b": "", "c": ""}), tmp_path / "root2", "jpeg")
    with pytest.raises(DataError, match="1 of different files, such as b; rename"):
        build_level(joined([first, second], tmp_path / "run"))


def test_one_slide_at_two_spacings_is_one_slide(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    slides = write_list(tmp_path / "basel", {"a": "", "b": ""})
    roots = [tiled(slides, tmp_path / f"at{um}", "jpeg", spacing_um=um) for um in (0.5, 1.0)]
    level = build_level(joined(roots, tmp_path / "run"))
    assert level.slides["slide_ids"] == ["a", "b"] and level.split.slides == 2 and level.warnings == []
    unknown = [roots[0], roots[0] / "patch_256_pretraining" / "imgs"]
    assert "taken as one slide each" in build_level(joined(unknown, tmp_path / "run")).warnings[-1]


def test_a_slide_that_is_held_out_in_one_folder_is_not_trained_on_in_another(tmp_path: Path) -> None:
    slides = write_list(tmp_path / "basel", {"a": "", "b": "test"})
    first = tiled(slides, tmp_path / "root1", "jpeg")
    slides.write_text(slides.read_text().replace(",test", ","))
    second = tiled(slides, tmp_path / "root2", "none", spacing_um=1.0)
    with pytest.raises(
        DataError, match=r"held-out slides .* in another folder, found the file of b \(partition 'test'"
    ):
        build_level(joined([first, second], tmp_path / "run"))


def test_leakage_is_looked_for_in_all_folders(roots: list[Path], tmp_path: Path) -> None:
    roots[2] = tmp_path / "images"
    settings = joined(roots, tmp_path / "run")
    trained = PatchLevel.pretraining(build_level(settings).slides, vars(settings))
    assert [folder for folder, _ in trained.files] == [roots[0] / "patch_256_pretraining" / "imgs", roots[2]]
    copy = tmp_path / "copy.png"
    copy.write_bytes(next(roots[2].glob("*.png")).read_bytes())
    labels = tmp_path / "labels.csv"
    other = sorted(roots[2].glob("*.png"))[1]
    labels.write_text(f"image_path,label,partition,slide_id\n{copy},a,val,new1\n{other},b,train,new2\n")
    with pytest.raises(DataError, match="found 1 that it has"):
        pretrain(joined(roots, tmp_path / "run", **{"evaluate.labels": str(labels)}))


def test_a_folder_that_is_not_there(roots: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a data folder at .*nowhere"):
        build_level(joined([*roots, tmp_path / "nowhere"], tmp_path / "run"))


def test_a_filter_applies_to_each_folder_and_to_parquet(tmp_path: Path) -> None:
    """Of files, parquet and slides together, the tiles that meet it are those that pandas selects from the tables."""
    pytest.importorskip("pyarrow")
    first = write_list(tmp_path / "basel", {"b1": "", "b2": "test"}, centre="Basel")
    second = write_list(tmp_path / "zurich", {"z1": "", "z2": ""}, centre="Zurich")
    parts = [
        tiled(first, tmp_path / "root1", "jpeg"),
        tiled(second, tmp_path / "root2", "parquet"),
    ]
    tables = [pd.read_csv(root / "tiles.csv").query("slide_id != 'b2'") for root in parts]
    limit = float(pd.concat(tables)["x"].median())
    level = build_level(joined(parts, tmp_path / "run", filter=f"x > {limit} or centre == 'Zurich' and y > 0"))
    wanted = {
        f"{row.slide_id}_{row.x}_{row.y}"
        for table, centre in zip(tables, ("Basel", "Zurich"), strict=True)
        for row in table.itertuples()
        if row.x > limit or (centre == "Zurich" and row.y > 0)
    }
    found = [Path(level.dataset[i].name).stem for i in range(len(level.dataset))]
    assert len(found) == len(wanted) and {*found} == wanted and 0 < len(wanted) < sum(map(len, tables))
    assert level.filtered is not None and sum(level.filtered["left_out"].values()) == sum(map(len, tables)) - len(found)
    with pytest.raises(DataError, match="expected tiles"):
        build_level(joined(parts, tmp_path / "run", filter="centre == 'Basel'"))


def test_copies_of_tiles_in_tars_are_refused_as_test_files(roots: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "labelled"
    folder.mkdir()
    image = next(path for path in sorted((tmp_path / "images").rglob("*")) if path.is_file())
    (folder / "copy.jpg").write_bytes(image.read_bytes())
    (folder / "new.jpg").write_bytes(image.read_bytes() + b"\0")  # of another size
    settings = joined(roots[1:], tmp_path / "run")
    trained = PatchLevel.pretraining(build_level(settings).slides, vars(settings))
    assert len(trained.stored) == 2 and not trained.files
    found = [one for sizes, content in trained.stored for one in find_in_stored(list(folder.iterdir()), sizes, content)]
    assert found == [folder / "copy.jpg"]
