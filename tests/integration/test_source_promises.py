"""What every source of tiles promises: exact resumption, any workers, two processes as one, kills at random moments."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import exit_codes, fork, fork_group, kill_at_random
from shard_files import PACKERS
from source_files import SMALL, tiled, write_list
from tiny_runs import Crash, assert_same_bits, assert_same_numbers, config, crash_after, last, make_tiles

from dino.api import pretrain
from dino.api.tiling import tile
from dino.config.schema import PatchConfig, TileConfig

Settings = Callable[..., PatchConfig]  # of an output folder and changes
PLACED = {"sampling.jitter_px": 12, "sampling.spacing_um": [0.5, 1.0], "speed.open_slides": 2}
ACROSS = {"sampling.jitter_px": 12, "aug.global_spacing_um": 1.0, "aug.local_spacing_um": 0.5}


def settings_of(root: Path, **fixed: object) -> Settings:
    def settings(output: Path, **changes: object) -> PatchConfig:
        found = config(root, output, **{**fixed, **changes})
        assert isinstance(found, PatchConfig)
        return found

    return settings


def slides(folder: Path, **fixed: object) -> list[Settings]:
    """Three slides, one of them held out, of which only the places of tiles were written."""
    listed = write_list(folder / "slides", {"one": "", "two": "", "held": "test"}, centre="Basel")
    assert tile([listed], folder / "root", TileConfig(**SMALL, storage="none")).exit_code == 0
    return [settings_of(folder / "root", **{**PLACED, **fixed})]


def across_scales(folder: Path) -> list[Settings]:
    """The same with crops across scales."""
    return slides(folder, **{**ACROSS, "sampling.spacing_um": []})


def tar(folder: Path) -> list[Settings]:
    """Files, and tar files of them: a run may go on from either."""
    files = make_tiles(folder / "tiles")
    return [settings_of(files), settings_of(PACKERS["tar"](files, folder / "tar"))]


def parquet(folder: Path) -> list[Settings]:
    """Files, and parquet files of them."""
    pytest.importorskip("pyarrow")
    files = make_tiles(folder / "tiles")
    return [settings_of(files), settings_of(PACKERS["parquet"](files, folder / "parquet"))]


def joined(folder: Path) -> list[Settings]:
    """Balanced centres of a ROOT of JPEG files and one of tar files at twice the spacing, and their folders moved."""
    first = tiled(write_list(folder / "basel", {"b1": "", "b2": "test"}, centre="Basel"), folder / "root1", "jpeg")
    listed = write_list(folder / "zurich", {"z1": "", "z2": ""}, centre="Zurich")
    second = tiled(listed, folder / "root2", "tar", spacing_um=1.0)
    (folder / "moved").symlink_to(folder)
    balanced = {"sampling.balance": ["centre", "slide"]}
    return [
        settings_of(one, **balanced, more_data_dirs=[str(other)])
        for one, other in ((first, second), (folder / "moved" / "root1", folder / "moved" / "root2"))
    ]


def sources(*fast: Callable[[Path], list[Settings]]) -> list[object]:
    """All sources; those that are not named are slow tests."""
    slow = pytest.mark.slow
    every = (slides, across_scales, tar, parquet, joined)
    return [pytest.param(one, id=one.__name__, marks=[] if one in fast else slow) for one in every]


def crash(monkeypatch: pytest.MonkeyPatch, step: int, run: Callable[[], object]) -> None:
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, step)
        run()


def draws_of_groups(run: Path) -> list[int]:
    shares = last(run)["state"]["callbacks"].get("SharesLog")
    return shares["counts"].tolist() if shares else []


@pytest.mark.parametrize("source", sources(slides, across_scales, tar, parquet, joined))
def test_interrupted_twice_and_with_other_workers_it_ends_with_the_same_bits(
    source: Callable[[Path], list[Settings]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, then = (source(tmp_path) * 2)[:2]
    pretrain(first(tmp_path / "whole"))
    crash(monkeypatch, 2, lambda: pretrain(first(tmp_path / "cut")))
    crash(monkeypatch, 5, lambda: pretrain(then(tmp_path / "cut", **{"speed.num_workers": 1})))
    pretrain(then(tmp_path / "cut", **{"speed.num_workers": 3, "speed.open_slides": 1}))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    records = [last(tmp_path / run) for run in ("whole", "cut")]
    assert all(records[0][name] == records[1][name] for name in ("geometry", "training_slides"))
    assert draws_of_groups(tmp_path / "whole") == draws_of_groups(tmp_path / "cut")


@pytest.mark.parametrize("source", sources(slides, joined))
def test_two_processes_train_as_one(source: Callable[[Path], list[Settings]], tmp_path: Path) -> None:
    """Of shards, both need the index, which one of them makes."""
    *_, settings = source(tmp_path)
    double = {"speed.precision": "fp64", "training.max_steps": 5}
    halves = settings(tmp_path / "two", **double, **{"training.batch_size_per_gpu": 2})
    assert exit_codes(fork_group(lambda: pretrain(halves), 2)) == [0, 0]
    pretrain(settings(tmp_path / "one", **double))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")
    assert draws_of_groups(tmp_path / "one") == draws_of_groups(tmp_path / "two")


@pytest.mark.parametrize("source", sources(slides))
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    source: Callable[[Path], list[Settings]], tmp_path: Path
) -> None:
    first, then = (source(tmp_path) * 2)[:2]
    long = {"training.max_steps": 40, "speed.num_workers": 1}
    pretrain(first(tmp_path / "whole", **long))
    cut, moments = then(tmp_path / "cut", **long), random.Random(0)
    for _ in range(3):
        assert kill_at_random([fork(lambda: pretrain(cut))], tmp_path / "cut" / "metrics.jsonl", moments)
    assert pretrain(cut).state == "finished"
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
