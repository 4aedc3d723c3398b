"""Runs on tiles in tar and parquet shards: the promises of runs on tile files hold for them, and both are one run."""

import csv
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from painted_slide import halved, noise, write_slide
from shard_files import PACKERS, pack_tar
from source_files import tiled
from tiny_runs import (
    Crash,
    add_bad_files,
    assert_same_bits,
    command,
    config,
    crash_after,
    last,
    metrics,
)

from dino.api import pretrain
from dino.data.shards import TarTiles
from dino.errors import ConfigError, DataError

LENIENT = {"training.max_bad_fraction": 0.6, "training.max_steps": 12}


@pytest.fixture(params=["tar", "parquet"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return request.param


@pytest.fixture
def shards(tiles: Path, tmp_path: Path, kind: str) -> Path:
    return PACKERS[kind](tiles, tmp_path / kind)


def quarantine(run: Path) -> dict[str, str]:
    with (run / "quarantine.csv").open(newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int, run: Callable[[], object]) -> None:
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, step)
        run()


def test_bad_tiles_are_replaced_listed_and_the_same_after_a_crash(
    tiles: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_bad_files(tiles)
    pretrain(config(tiles, tmp_path / "files", **LENIENT))
    shards = PACKERS[kind](tiles, tmp_path / kind)
    interrupted(monkeypatch, 8, lambda: pretrain(config(shards, tmp_path / "run", **LENIENT)))
    pretrain(config(shards, tmp_path / "run", **LENIENT, **{"speed.num_workers": 1}))
    assert quarantine(tmp_path / "run").keys() == quarantine(tmp_path / "files").keys()
    assert all(f".{kind}: " in reason for reason in quarantine(tmp_path / "run").values())
    assert metrics(tmp_path / "run")[-1]["loss"] == metrics(tmp_path / "files")[-1]["loss"]


def test_a_shard_that_is_damaged_before_the_start_is_used_as_far_as_it_is_readable(
    tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shards = PACKERS["tar"](tiles, tmp_path / "tar", 2)
    shard = sorted(shards.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    summary = pretrain(config(shards, tmp_path / "run", **LENIENT))
    assert summary.state == "finished" and summary.numbers["bad_files"] <= 1
    assert "train-000000.tar: it is cut off or damaged after" in " ".join(capsys.readouterr().out.split())


def test_a_shard_that_changes_during_a_run_ends_it_and_nothing_is_lost(
    tiles: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dino.train.loop import Trainer

    pretrain(config(tiles, tmp_path / "whole", **{"training.max_steps": 30}))
    honest = Trainer._step

    def step(self: Trainer, *args: object) -> object:
        if self.step == 4:
            for path in shards.glob(f"*.{shards.name}"):
                os.utime(path)
        return honest(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("dino.data.shards.GROUP_BYTES", 1)
    with monkeypatch.context() as patch, pytest.raises(DataError, match="has changed; run the same command again"):
        patch.setattr(Trainer, "_step", step)
        pretrain(config(shards, tmp_path / "run", **{"training.max_steps": 30}))
    pretrain(config(shards, tmp_path / "run", **{"training.max_steps": 30}))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_a_shard_that_vanishes_is_replaced_by_others(
    tiles: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dino.train.loop import Trainer

    monkeypatch.setattr("dino.data.shards.OPEN_SHARDS", 1)
    shards = PACKERS[kind](tiles, tmp_path / kind, 6)
    honest = Trainer._step
    gone = sorted(shards.glob(f"*.{kind}"))[:2]

    def step(self: Trainer, *args: object) -> object:
        if self.step == 1:
            for path in gone:
                path.unlink(missing_ok=True)
        return honest(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_step", step)
    assert pretrain(config(shards, tmp_path / "run", **LENIENT)).state == "finished"
    reasons = quarantine(tmp_path / "run").values()
    assert reasons and all(any(path.name in reason for path in gone) for reason in reasons)


def test_shards_that_all_vanish_end_the_command_in_one_line(shards: Path, tmp_path: Path) -> None:
    run = config(shards, tmp_path / "run", **{"training.max_steps": 5})
    pretrain(run)
    for path in shards.glob(f"*.{shards.name}"):
        path.unlink()
    words = command(config(shards, tmp_path / "other", source=shards.name), tmp_path)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and f"expected {shards.name} files in" in done.stderr and "Traceback" not in done.stderr


def test_other_tiles_are_another_run(tiles: Path, tmp_path: Path, kind: str) -> None:
    shards = PACKERS[kind](tiles, tmp_path / kind)
    pretrain(config(shards, tmp_path / "run", **{"training.max_steps": 2}))
    sorted(shards.glob(f"*.{kind}"))[0].unlink()
    with pytest.raises(ConfigError, match="samples"):
        pretrain(config(shards, tmp_path / "run", **{"training.max_steps": 2}))


# ------------------------------------------------------------------------------------------------ what dino tile writes


@pytest.fixture(scope="module")
def slide_list(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides, one of them held out."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("one", "two", "held")):
        pixels = noise(200, 140, seed)
        write_slide(folder / f"{name}.tiff", [pixels, halved(pixels)])
    rows = [(name, f"{name}.tiff", name[0], "test" if name == "held" else "") for name in ("one", "two", "held")]
    with (folder / "slides.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("sample_id", "image_path", "patient_id", "partition"), *rows])
    return folder / "slides.csv"


def test_a_root_of_shards_is_the_root_of_files(slide_list: Path, tmp_path: Path, kind: str) -> None:
    files = tiled(slide_list, tmp_path / "files", "jpeg")
    shards = tiled(slide_list, tmp_path / kind, kind)
    pretrain(config(files, tmp_path / "of_files"))
    pretrain(config(shards, tmp_path / "of_shards", **{"speed.num_workers": 1}))
    assert_same_bits(tmp_path / "of_files", tmp_path / "of_shards")
    records = [last(tmp_path / run) for run in ("of_files", "of_shards")]
    assert records[0]["geometry"] == records[1]["geometry"]
    assert (
        records[0]["training_slides"]
        == records[1]["training_slides"]
        == {
            "slide_ids": ["one", "two"],
            "patient_ids": ["o", "t"],
        }
    )


def test_a_tar_that_lacks_tiles_of_its_manifest(slide_list: Path, tmp_path: Path) -> None:
    root = tiled(slide_list, tmp_path / "root", "tar")
    folder = root / "patch_256_pretraining" / "tars"
    with (folder / "one.tiles.manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    whole = (folder / "one.tiles.tar").read_bytes()
    (folder / "one.tiles.tar").write_bytes(whole[: len(whole) // 2])
    pretrain(config(root, tmp_path / "run", **LENIENT, **{"training.nepochs": 1}))
    listed = quarantine(tmp_path / "run")
    assert listed and all("one/one_" in name and "one.tiles.tar" in reason for name, reason in listed.items())
    assert len(listed) <= len(rows)
    (folder / "one.tiles.manifest.csv").unlink()
    with pytest.raises(DataError, match="expected the manifest of one.tiles.tar"):
        pretrain(config(root, tmp_path / "other"))


def test_settings_of_other_sources_are_refused(tiles: Path, tmp_path: Path) -> None:
    shards = PACKERS["tar"](tiles, tmp_path / "tar")
    for setting, message in (
        ({"speed.ram_cache": 0.1}, "no speed.ram_cache"),
        ({"sampling.jitter_px": 4}, "source=slides"),
        ({"source": "zip"}, "expected source auto, files, tar, parquet, slides"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain(config(shards, tmp_path / "run", **setting))


def test_a_dry_run_writes_no_index(shards: Path, tmp_path: Path) -> None:
    pretrain(config(shards, tmp_path / "run", dry_run=True))
    assert not (shards / ".histodino").exists() and not (tmp_path / "run").exists()


def test_reading_is_one_call_at_an_offset(tiles: Path, tmp_path: Path) -> None:
    """No file position is shared by processes, and no byte of another tile is read."""
    shard = pack_tar(tmp_path / "tar" / "a.tar", [(path.name, path.read_bytes()) for path in sorted(tiles.iterdir())])
    from dino.data.shards import open_tars

    found = TarTiles(*open_tars(shard.parent, "auto", of_slides=False, may_write=True))
    for index, path in enumerate(sorted(tiles.iterdir())):
        _, first, size = found._index.places[index].tolist()
        assert shard.read_bytes()[first : first + size] == path.read_bytes()
