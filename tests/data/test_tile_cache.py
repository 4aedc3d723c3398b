"""Decoded tiles in memory: the same pixels, decoded once for all processes."""

import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.data import tile_cache as module
from dino.data.datasets import FolderTiles, TileDataset
from dino.data.images import decode
from dino.data.loader import DrawnBatches, Layout, load_batches
from dino.data.samplers import PermutationSampler
from dino.data.tile_cache import TileCache, free_memory, keep_decoded, tile_cache
from dino.errors import ConfigError, DataError

SIZES = [(8, 8), (5, 9), (1, 7), (8, 8)]


@pytest.fixture
def tiles(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"slide_{i}_0.png" for i in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each tile that any process decodes."""
    log = tmp_path / "decoded.txt"
    log.touch()

    def logged(path: Path) -> torch.Tensor:
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return decode(path)

    monkeypatch.setattr(module, "decode", logged)
    return log


def test_pixels_are_the_same_and_decoded_once(tiles: list[Path], decoded: Path) -> None:
    cache = TileCache(len(tiles), 10_000)
    for _ in range(3):
        assert all(torch.equal(cache(i, path), decode(path)) for i, path in enumerate(tiles))
    assert Counter(decoded.read_text().split()) == Counter(path.name for path in tiles)


def test_tiles_are_kept_by_path(tiles: list[Path], decoded: Path) -> None:
    read = keep_decoded(tiles, 10_000)
    for path in [*tiles, *reversed(tiles)]:
        assert torch.equal(read(path), decode(path))
    assert Counter(decoded.read_text().split()) == Counter(path.name for path in tiles)


def test_workers_share_decoded_tiles(tiles: list[Path], decoded: Path) -> None:
    def draw(shape: tuple[int, int], tissue: object, rng: object) -> dict[str, np.ndarray]:
        return {"box": np.array([[0, 0, *shape]])}

    root, names = tiles[0].parent, [path.name for path in tiles]
    datasets = TileDataset(FolderTiles(root, names)), TileDataset(FolderTiles(root, names, 1e-5))
    sampler = PermutationSampler(len(names), 0)
    plain, cached = (
        list(
            load_batches(
                DrawnBatches(s, sampler, draw, None, 4, 0), Layout(4), (0, 6), workers=2, prefetch=1, pin=False
            )
        )
        for s in datasets
    )
    assert all(torch.equal(a.inputs, b.inputs) and a.names == b.names for a, b in zip(plain, cached, strict=True))
    counts = Counter(decoded.read_text().split())  # two workers may begin with the same tile; none decodes it twice
    assert counts.keys() == set(names) and max(counts.values()) <= 2
    before = decoded.read_text()
    assert datasets[1][0].pixels.shape[0] == 3 and decoded.read_text() == before  # the parent has them, too


def test_tiles_beyond_the_budget_are_decoded_each_time(tiles: list[Path], decoded: Path) -> None:
    cache = TileCache(len(tiles), 3 * (8 * 8 + 5 * 9) + 5)
    for _ in range(3):
        assert all(torch.equal(cache(i, path), decode(path)) for i, path in enumerate(tiles))
    counts = Counter(decoded.read_text().split())
    assert [counts[path.name] for path in tiles] == [1, 1, 3, 3]


def test_files_that_change_or_vanish_are_decoded_again(tiles: list[Path]) -> None:
    cache = TileCache(len(tiles), 10_000)
    cache(0, tiles[0])
    before = tiles[0].stat()
    Image.new("RGB", (8, 8), "red").save(tiles[0])
    os.utime(tiles[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert torch.equal(cache(0, tiles[0]), decode(tiles[0]))
    tiles[0].unlink()
    with pytest.raises(DataError, match="cannot decode"):
        cache(0, tiles[0])


def test_a_process_without_access_to_the_memory_decodes(tiles: list[Path]) -> None:
    copy = pickle.loads(pickle.dumps(TileCache(len(tiles), 10_000)))
    assert torch.equal(copy(0, tiles[0]), decode(tiles[0]))


def test_more_memory_than_is_free_raises_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tile_cache(3, 0.0) is None and isinstance(tile_cache(3, 1e-4), TileCache)
    (tmp_path / "memory.max").write_text("5000000000\n")
    (tmp_path / "memory.current").write_text("4000000000\n")
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    assert free_memory() == 1_000_000_000
    with pytest.raises(ConfigError, match=r"at most the 1\.0 GB of memory that are free, found 2"):
        tile_cache(3, 2)
    with pytest.raises(ConfigError, match="found -1"):
        tile_cache(3, -1)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 1_000_000_000
