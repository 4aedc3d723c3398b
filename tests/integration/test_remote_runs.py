"""Slides of a web server are tiled and trained on as local ones are: same tables, same bits, with faults and kills."""

import csv
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import exit_codes, fork, fork_group, kill_at_random
from painted_slide import halved, noise, write_slide
from store_server import Store, serving
from tiny_runs import assert_same_bits, assert_same_numbers, config, last

from dino.api import extract, pretrain
from dino.api.levels import build_level
from dino.api.tiling import tile
from dino.config.schema import ExtractConfig, PatchConfig, TileConfig
from dino.errors import ConfigError
from dino.slides import remote, remote_cache
from dino.slides.remote import parse_location
from dino.slides.tables import FAILED, OK, read_status

SMALL = {"tile_size_px": 32, "region_size_px": 64, "num_workers": 1, "previews": False, "storage": "none"}
NAMES = ("one", "two", "three")
SIGNED = "?X-Amz-Credential=KEY&X-Amz-Signature=SECRET"
pytest.importorskip("aiohttp", reason="needs the extra [remote]")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("store")
    for seed, name in enumerate(NAMES):
        pixels = noise(230, 170, seed)
        write_slide(folder / f"{name}.tiff", [pixels, halved(pixels)])
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote_cache, "_failed", {})


def slide_list(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("sample_id", "image_path"), *rows])
    return path


def tiled(path: Path, store: Store, prefix: str, query: str = "") -> Path:
    """A ROOT of the three slides, at an address or in a local folder."""
    rows = [(name, f"{prefix}/{name}.tiff{query}") for name in NAMES]
    settings = TileConfig(**SMALL, slide_cache=str(path / "cache"))
    (path / "root").mkdir(parents=True)
    assert tile([slide_list(path / "slides.csv", rows)], path / "root", settings).exit_code == 0
    return path / "root"


def settings(root: Path, output: Path, cache: Path, **changes: object) -> PatchConfig:
    further = {"sampling.jitter_px": 8, "speed.slide_cache": str(cache), "speed.open_slides": 1}
    found = config(root, output, **{**further, **changes})
    assert isinstance(found, PatchConfig)
    return found


def test_remote_slides_are_tiled_as_local_ones_and_credentials_are_recorded_nowhere(
    store: Store, tmp_path: Path
) -> None:
    local = tiled(tmp_path / "local", store, str(store.folder))
    found = tiled(tmp_path / "remote", store, f"{store.address}/reset", SIGNED)
    for name in ("tiles.csv", "regions.csv"):
        assert (found / name).read_bytes() == (local / name).read_bytes()
    recorded = {slide: str(row.image_path) for slide, row in read_status(found).items()}
    assert recorded == {name: f"{store.address}/reset/{name}.tiff" for name in NAMES}
    texts = [path.read_bytes() for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert not any(b"SECRET" in text for text in texts if b"sample_id,image_path" not in text)
    # Finished slides are not downloaded again, also with other signatures.
    before = store.requests("GET", "/reset/one.tiff")
    again = slide_list(tmp_path / "again.csv", [(name, f"{store.address}/reset/{name}.tiff") for name in NAMES])
    assert tile([again], found, TileConfig(**SMALL, slide_cache=str(tmp_path / "new"))).reused == 3
    assert store.requests("GET", "/reset/one.tiff") == before


def test_a_slide_that_cannot_be_downloaded_fails_and_the_others_are_tiled(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [("one", f"{store.address}/busy/one.tiff"), ("gone", f"{store.address}/plain/gone.tiff{SIGNED}")]
    listed = slide_list(tmp_path / "slides.csv", rows)
    summary = tile([listed], tmp_path / "root", TileConfig(**SMALL, slide_cache=str(tmp_path / "cache")))
    assert summary.exit_code == 2
    status = read_status(tmp_path / "root")
    assert status["one"].status == OK and status["one"].tiles > 0
    assert status["gone"].status == FAILED and "404" in status["gone"].reason
    assert "SECRET" not in capsys.readouterr().err + status["gone"].reason


def test_runs_on_remote_slides_are_those_on_local_ones(store: Store, tmp_path: Path) -> None:
    """With a cache that holds two of three slides, 0 and 2 workers, and two processes."""
    local, found = (
        tiled(tmp_path / n, store, p) for n, p in (("l", str(store.folder)), ("r", f"{store.address}/plain"))
    )
    pretrain(settings(local, tmp_path / "local", tmp_path / "none"))
    size = sum((store.folder / f"{name}.tiff").stat().st_size for name in NAMES) / len(NAMES)
    for workers in (0, 1):
        small = {"speed.slide_cache_gb": 2.5 * size / 1e9, "speed.num_workers": workers, "speed.open_slides": 64}
        before = len(store.requests("GET", "/plain/one.tiff"))
        pretrain(settings(found, tmp_path / str(workers), tmp_path / "small", **small))
        assert_same_bits(tmp_path / "local", tmp_path / str(workers))
        assert len(store.requests("GET", "/plain/one.tiff")) > before
    assert len(list((tmp_path / "small").glob("*.tiff"))) == 2
    double = {"speed.precision": "fp64", "training.max_steps": 3}
    pretrain(settings(local, tmp_path / "single", tmp_path / "none", **double))
    halves = settings(found, tmp_path / "two", tmp_path / "pair", **double, **{"training.batch_size_per_gpu": 2})
    assert exit_codes(fork_group(lambda: pretrain(halves), 2)) == [0, 0]
    assert_same_numbers(tmp_path / "single", tmp_path / "two")


def test_killed_at_random_moments_a_run_on_remote_slides_ends_with_the_same_bits(store: Store, tmp_path: Path) -> None:
    found = tiled(tmp_path / "r", store, f"{store.address}/plain")
    size = (store.folder / "one.tiff").stat().st_size
    long = {"training.max_steps": 30, "speed.num_workers": 1, "speed.slide_cache_gb": 2.5 * size / 1e9}
    pretrain(settings(found, tmp_path / "whole", tmp_path / "whole_cache", **long))
    cut, moments = settings(found, tmp_path / "cut", tmp_path / "cut_cache", **long), random.Random(0)
    for _ in range(2):
        assert kill_at_random([fork(lambda: pretrain(cut))], tmp_path / "cut" / "metrics.jsonl", moments)
    assert pretrain(cut).state == "finished"
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_a_slide_that_vanishes_is_left_out_tile_by_tile(store: Store, tmp_path: Path) -> None:
    found = tiled(tmp_path / "r", store, f"{store.address}/plain")
    moved = slide_list(
        tmp_path / "moved.csv",
        [(name, f"{store.address}/{'404' if name == 'two' else 'plain'}/{name}.tiff{SIGNED}") for name in NAMES],
    )
    lenient = {"training.max_bad_fraction": 0.7, "training.max_steps": 12, "slides": str(moved)}
    pretrain(settings(found, tmp_path / "run", tmp_path / "cache", **lenient))
    with (tmp_path / "run" / "quarantine.csv").open(newline="") as file:
        bad = list(csv.DictReader(file))
    assert bad and all(row["path"].startswith("two/") and "404" in row["reason"] for row in bad)
    assert "SECRET" not in (tmp_path / "run" / "quarantine.csv").read_text()
    assert last(tmp_path / "run")["step"] == 12
    assert len(store.requests("GET", "/404/two.tiff")) <= 2  # at the start and for the first of its tiles


def test_what_will_be_downloaded_is_said_and_a_cache_that_cannot_work_is_refused(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = tiled(tmp_path / "r", store, f"{store.address}/plain")
    cache, size = tmp_path / "cache", (store.folder / "one.tiff").stat().st_size
    assert "3 slides of 0.00 GB are on object stores" in " ".join(capsys.readouterr().out.split())  # of dino tile
    pretrain(settings(found, tmp_path / "run", cache, dry_run=True, **{"speed.slide_cache_gb": 2.5 * size / 1e9}))
    said = " ".join("".join(capsys.readouterr()).split())
    assert "3 slides of 0.00 GB are on object stores; 0.00 GB to download into" in said
    assert "again and again" in said and "speed.slide_cache_gb=" in said
    assert "open instead of" not in said
    many = {"speed.slide_cache_gb": 2.5 * size / 1e9, "speed.open_slides": 64}
    pretrain(settings(found, tmp_path / "run", cache, dry_run=True, **many))
    assert "each worker keeps 1 of these slides open instead of 64" in " ".join("".join(capsys.readouterr()).split())
    with pytest.raises(ConfigError, match="speed.slide_cache_gb of at least"):
        pretrain(settings(found, tmp_path / "run", cache, **{"speed.slide_cache_gb": 1.5 * size / 1e9}))
    assert not (tmp_path / "run").exists()


def test_a_worker_closes_its_slides_where_others_leave_no_room(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an evaluation, in which the main process has slides open beside those of its workers."""
    monkeypatch.setattr(remote_cache, "WAIT_SECONDS", 0.1)
    found, size = tiled(tmp_path / "r", store, f"{store.address}/plain"), (store.folder / "one.tiff").stat().st_size
    small = {"speed.slide_cache_gb": 2.5 * size / 1e9}
    dataset, alone = (
        build_level(settings(found, tmp_path / "run", tmp_path / name, **small)).dataset for name in ("cache", "alone")
    )
    firsts = dict(zip(dataset.ranges.slide_ids, dataset.ranges.starts.tolist(), strict=False))
    held = remote_cache.SlideCache(str(tmp_path / "cache"), small["speed.slide_cache_gb"])
    with held.local_path(parse_location(f"{store.address}/plain/three.tiff")):
        for name in ("one", "two", "one"):  # the second does not fit beside the other two
            assert torch.equal(dataset[firsts[name]].pixels, alone[firsts[name]].pixels)


def test_features_of_remote_slides_are_those_of_local_ones(store: Store, tmp_path: Path) -> None:
    local, found = (
        tiled(tmp_path / n, store, p) for n, p in (("l", str(store.folder)), ("r", f"{store.address}/busy"))
    )
    pretrain(settings(local, tmp_path / "run", tmp_path / "none", **{"training.max_steps": 1}))
    shutil.rmtree(tmp_path / "r" / "cache")
    for root in (local, found):
        options = ExtractConfig(what="regions", precision="fp32", slide_cache=str(tmp_path / "cache"), encoder="x")
        extract(tmp_path / "run", root, options)
    names = sorted(path.relative_to(local) for path in local.rglob("*.pt"))
    assert names and all((found / name).read_bytes() == (local / name).read_bytes() for name in names)
