"""Data of tiny runs, and a disk to fill."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import make_grids, make_tiles


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    return make_tiles(tmp_path / "tiles")


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    return make_grids(tmp_path / "grids")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
