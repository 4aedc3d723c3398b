"""Balanced sampling of runs: groups from tables, errors, equal draws for any workers and ranks, resuming, records."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_runs import (
    Crash,
    assert_same_bits,
    config,
    crash_after,
    last,
    make_tiles,
    metrics,
)
from typer.testing import CliRunner

from dino.api import pretrain
from dino.api.balancing import describe
from dino.api.levels import Level, build_level
from dino.cli.main import app
from dino.errors import ConfigError, DataError
from dino.slides import sample_slide
from dino.slides.parts import merge, save_part
from dino.slides.tables import TILES_FOLDER, SlideStatus, read_tiles

SLIDES = ["slide0"] * 2 + ["slide1"] * 3 + ["slide2"] * 5 + ["slide3"] * 10
CENTRES = {"slide0": "A", "slide1": "A", "slide2": "B", "slide3": ""}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """20 tiles of four slides of unequal size in three centres, one of them not known."""
    made = make_tiles(tmp_path / "made", len(SLIDES))
    folder = tmp_path / "root"
    (folder / TILES_FOLDER / "imgs").mkdir(parents=True)
    for number, (path, slide) in enumerate(zip(sorted(made.iterdir()), SLIDES, strict=True)):
        path.rename(folder / TILES_FOLDER / "imgs" / f"{slide}_{number * 48}_0.png")
    for slide, centre in CENTRES.items():
        further = {"grade": slide[-1]} if slide != "slide2" else {}
        save_part(folder, SlideStatus(slide, "ok", patient_id=f"p{slide}", centre=centre, further=further), {})
    merge(folder)
    return folder


def dino(words: list[str]) -> int:
    return CliRunner().invoke(app, words).exit_code


def level_of(root: Path, **changes: object) -> Level:
    return build_level(config(root, root / "run", **changes))


def drawn(level: Level, count: int) -> Counter[str | None]:
    sampler, found = level.sampler(0), Counter()
    for index, times in Counter(sampler(draw) for draw in range(count)).items():
        found[level.dataset[index].slide_id] += times
    return found


def test_without_settings_every_tile_is_drawn_once_per_pass(root: Path) -> None:
    for level in (level_of(root), level_of(root, **{"sampling.balance": "none"})):
        assert level.groups is None
        assert drawn(level, 20) == Counter(SLIDES)


def test_slides_and_centres_get_equal_shares(root: Path) -> None:
    level = level_of(root, **{"sampling.balance": "slide"})
    assert level.groups is not None and level.samples == len(level.dataset) == 20
    assert drawn(level, level.groups.cycle) == dict.fromkeys(CENTRES, level.groups.cycle // 4)
    nested = level_of(root, **{"sampling.balance": ["centre", "patient", "slide"]}).groups
    assert nested is not None and nested.columns == ["centre", "patient_id", "slide_id"]
    assert dict(zip(nested.names, nested.shares, strict=True)) == {
        ("A", "pslide0", "slide0"): pytest.approx(1 / 6, abs=1e-4),
        ("A", "pslide1", "slide1"): pytest.approx(1 / 6, abs=1e-4),
        ("B", "pslide2", "slide2"): pytest.approx(1 / 3, abs=1e-4),
        ("unknown", "pslide3", "slide3"): pytest.approx(1 / 3, abs=1e-4),
    }
    assert any("10 tiles of 1 slides have no centre; they form group 'unknown'" in line for line in describe(nested))
    graded = level_of(root, **{"sampling.balance": "grade"}).groups  # a further column of slides.csv
    assert graded is not None and graded.names == [("0",), ("1",), ("3",), ("unknown",)]


def test_weights_and_subsets(root: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.csv"
    weights.write_text("slide_id,weight\nslide0,3\nslide1,0\n")
    groups = level_of(root, **{"sampling.balance": "slide", "sampling.weights": str(weights)}).groups
    assert groups is not None and groups.samples == 17
    assert groups.shares == pytest.approx([3 / 5, 1 / 5, 1 / 5], abs=1e-4)
    level = level_of(root, **{"sampling.max_tiles_per_slide": 4})
    assert level.samples == level.split.samples == 2 + 3 + 4 + 4
    assert len({level.sampler(0)(draw) for draw in range(13)}) == 13
    assert drawn(level, 13) == {"slide0": 2, "slide1": 3, "slide2": 4, "slide3": 4}


@pytest.mark.parametrize(
    ("settings", "table", "message"),
    [
        ({"sampling.balance": "center"}, "", "did you mean 'centre'"),
        ({"sampling.balance": "stage"}, "", "centre, grade, patient_id, scanner, slide_id, stain"),
        ({"sampling.balance": ["slide", "slide_id"]}, "", "once"),
        ({"sampling.balance": "scanner"}, "", "expected slides with a value of 'scanner'"),
        ({"sampling.temperature": 1.5}, "", "from 0 to 1"),
        ({"sampling.max_tiles_per_slide": -1}, "", "at least 0"),
        ({}, "centre,weight\nZ,1\n", "1 others: 'Z'"),
        ({}, "slide_id,weight\nslide9,1\n", "did you mean 'slide"),
        ({}, "centre,weight\nA,-1\n", "weight of at least 0 for 'A', found '-1'"),
        ({}, "centre,weight\nA,nan\n", "found 'nan'"),
        ({}, "centre,weight\nA,1\nA,2\n", "two of 'A'"),
        ({}, "centre,weight\nA,0\nB,0\nunknown,0\n", "found only 0"),
        ({}, "centre,slide,weight\nA,slide0,1\n", "one column of the slides"),
        ({}, "centre\nA\n", "missing weight"),
    ],
)
def test_bad_settings_end_in_one_line(root: Path, tmp_path: Path, settings: dict, table: str, message: str) -> None:
    if table:
        (tmp_path / "weights.csv").write_text(table)
        settings = {**settings, "sampling.weights": str(tmp_path / "weights.csv")}
    with pytest.raises((ConfigError, DataError)) as error:
        level_of(root, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_balanced_run_resumes_with_the_same_bits_and_counts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sampling.balance": ["centre", "slide"], "speed.precision": "fp32"}
    pretrain(config(root, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        crash_after(patch, 5)
        with pytest.raises(Crash):
            pretrain(config(root, tmp_path / "parts", **settings))
    pretrain(config(root, tmp_path / "parts", **settings, **{"speed.num_workers": 3}))
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")

    counts = last(tmp_path / "whole")["state"]["callbacks"]["SharesLog"]["counts"]
    level = level_of(root, **settings)
    found = drawn(level, 8 * 4)
    assert level.groups is not None
    assert counts.tolist() == [found[name[1]] for name in level.groups.names] and counts.sum() == 32
    record = json.loads((tmp_path / "parts" / "status.json").read_text())["sampling"]
    assert (record["draws"], record["groups"], record["columns"]) == (32, 4, ["centre", "slide_id"])
    assert [one["realised"] for one in record["shares"]] == (counts / 32).tolist()
    shares = [line["shares"] for line in metrics(tmp_path / "parts") if "shares" in line]
    assert len(shares) == 8 and shares[-1]["A / slide0"] == counts[0].item() / 32


def test_other_groups_are_another_run(root: Path, tmp_path: Path) -> None:
    settings = {"sampling.balance": "centre"}
    pretrain(config(root, tmp_path / "run", **settings))
    save_part(root, SlideStatus("slide3", "ok", patient_id="pslide3", centre="B"), {})
    merge(root)
    with pytest.raises(ConfigError, match="belongs to another run"):
        pretrain(config(root, tmp_path / "run", **settings))


def test_replacements_of_a_bad_tile_are_of_its_group_and_counted(root: Path, tmp_path: Path) -> None:
    bad = sorted(root.rglob("slide0_*.png"))[0]
    bad.write_bytes(b"no image")
    settings = {"sampling.balance": "slide", "training.max_bad_fraction": 0.2}
    pretrain(config(root, tmp_path / "run", **settings))
    level = level_of(root, **settings)
    sampler = level.sampler(0)
    slides = Counter(SLIDES[sampler(draw)] for draw in range(32))
    counts = last(tmp_path / "run")["state"]["callbacks"]["SharesLog"]["counts"]
    assert counts.tolist() == [slides[slide] for slide in CENTRES]
    assert len(last(tmp_path / "run")["state"]["quarantine"]) == 1


def test_a_dry_run_lists_the_groups(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(config(root, tmp_path / "run", **{"sampling.balance": "slide", "dry_run": True}))
    shown = capsys.readouterr().out
    assert "slide3" in shown and "25.000%" in shown and "share of draws" in shown


def test_a_filter_leaves_out_tiles_of_files_and_is_recorded(root: Path, tmp_path: Path) -> None:
    names = sorted(path.stem for path in root.rglob("slide*.png"))
    rows = [f"{name.split('_')[0]},{name.split('_')[1]},0,48,0.5,0.5,{i / 20}" for i, name in enumerate(names)]
    header = "slide_id,x,y,step_lv0,spacing_requested_um,spacing_um,tissue"
    (root / "tiles.csv").write_text("\n".join([header, *rows[:-1]]) + "\n")  # the last tile is not listed
    expression = "tissue >= 0.15 and centre in ['A', 'B']"
    kept = [name for i, name in enumerate(names[:-1]) if i >= 3 and CENTRES[name.split("_")[0]]]
    settings = {"filter": expression, "sampling.balance": "slide"}
    level = level_of(root, **settings)
    assert sorted(Path(level.dataset[i].name).stem for i in range(len(level.dataset))) == kept
    assert level.samples == level.split.samples == len(kept)
    pretrain(config(root, tmp_path / "run", **settings))
    record = json.loads((tmp_path / "run" / "status.json").read_text())["data"]
    left_out = {"tissue >= 0.15": 3, "centre in ['A', 'B']": 9, "a row in tiles.csv": 1}
    assert record["filter"] == {"expression": expression, "tiles": 20, "left_out": left_out}
    with pytest.raises(ConfigError, match="belongs to another run"):
        pretrain(config(root, tmp_path / "run", **{**settings, "filter": "tissue >= 0.1"}))
    with pytest.raises(DataError, match=r"found none .*tissue > 2"):
        level_of(root, filter="tissue > 2")


def test_a_filter_on_the_command_line_keeps_tiles_of_slides(tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    table.write_text(f"sample_id,image_path,site\nkidney,{sample_slide()},kidney\n")
    root = tmp_path / "root"
    assert dino(["tile", str(table), str(root), "storage=none", "previews=false"]) == 0
    tiles = [tile for tile in read_tiles(root) if tile.tissue > 0.6]
    level = level_of(root, filter="tissue > 0.6 and site == 'kidney'")
    assert 0 < len(level.dataset) == len(tiles) < 44
    assert [level.dataset[i].name for i in range(len(tiles))] == [
        str(Path(*t.path.parts[-2:]).with_suffix("")) for t in tiles
    ]
    words = ["filter=tissue > 0.6 and site in ['kidney', 'lung']", "sampling.balance=[site,slide]"]
    tiny = ["model.arch=vit:dim=32,depth=2,heads=2", "training.batch_size_per_gpu=4", "speed.num_workers=0"]
    pretrain_dry = ["pretrain", "patch", str(root), str(tmp_path / "run"), "dry_run=true", *tiny]
    assert dino([*pretrain_dry, *words]) == 0
    assert dino([*pretrain_dry, "filter=site == 'lung'"]) == 2

    assert dino(["tile", str(table), str(tmp_path / "tar"), "storage=tar", "previews=false"]) == 0
    stored = level_of(tmp_path / "tar", filter="tissue > 0.6 and site == 'kidney'")
    assert stored.samples == len(tiles)
    assert {Path(stored.dataset[i].name).stem for i in range(len(tiles))} == {tile.path.stem for tile in tiles}
