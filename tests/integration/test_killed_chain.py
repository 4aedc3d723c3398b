"""Tiling and extraction killed by SIGKILL and run again: whole files only, in the end those of a run never killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from kill_points import __file__ as program
from kill_points import visible
from painted_slide import noise, write_slide
from tiny_models import save_checkpoint

from dino.api.extracting import extract
from dino.api.tiling import tile
from dino.config.schema import ExtractConfig, TileConfig

TILING = {"tile_size_px": 64, "region_size_px": 256, "num_workers": 1}
WORDS = [f"{key}={value}" for key, value in TILING.items()]
FEW, MANY = 3, 20


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        write_slide(tmp_path / "slides" / f"{name}.tiff", [noise(517, 391, seed)])
    write_slide(tmp_path / "slides" / "glass.tiff", [np.full((300, 300, 3), 245, np.uint8)])
    return tmp_path / "slides"


@pytest.fixture
def root(slides: Path, tmp_path: Path) -> Path:
    tile([slides], tmp_path / "root", TileConfig(**TILING, previews=False))
    return tmp_path / "root"


def assert_survives(root: Path, points: int, *words: str) -> None:
    """Kill ``dino WORD...`` at so many moments, each time on a copy of ``root``."""
    command = [sys.executable, program, str(root), str(points), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("killed before") == points


@pytest.mark.parametrize(
    ("storage", "points"),
    [
        ("jpeg", FEW),
        pytest.param("jpeg", MANY, marks=pytest.mark.slow),
        pytest.param("tar", MANY, marks=pytest.mark.slow),
        pytest.param("parquet", MANY, marks=pytest.mark.slow),
    ],
)
def test_tiling(slides: Path, tmp_path: Path, storage: str, points: int) -> None:
    (tmp_path / "empty").mkdir()
    assert_survives(tmp_path / "empty", points, "tile", str(slides), "{root}", f"storage={storage}", *WORDS)


@pytest.mark.parametrize("points", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_extraction(root: Path, tmp_path: Path, points: int) -> None:
    model = save_checkpoint(tmp_path / "patch.pt")
    assert_survives(root, points, "extract", str(model), "{root}", "device=cpu", "precision=fp32", "num_workers=1")


@pytest.mark.parametrize("points", [FEW, pytest.param(MANY // 2, marks=pytest.mark.slow)])
def test_extraction_of_slide_files(root: Path, tmp_path: Path, points: int) -> None:
    config = ExtractConfig(device="cpu", precision="fp32", num_workers=1)
    extract(str(save_checkpoint(tmp_path / "patch.pt")), root, config)
    model = save_checkpoint(tmp_path / "region.pt", "region", 16)
    assert_survives(root, points, "extract", str(model), "{root}", "device=cpu", "precision=fp32", "num_workers=1")


def children(pid: int) -> list[int]:
    """Processes that any thread of a process started."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs /proc with children")
def test_workers_end_with_the_tiling_that_was_killed(slides: Path, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dino", "tile", str(slides), str(out), *WORDS, "num_workers=2", "previews=false"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / ".partial").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and workers
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = visible(root)
    assert all(before[name] == content for name, content in visible(out).items())
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert visible(out) == before
