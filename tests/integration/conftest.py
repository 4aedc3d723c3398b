"""Data of tiny runs."""

from pathlib import Path

import pytest
from tiny_runs import make_grids, make_tiles


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    return make_tiles(tmp_path / "tiles")


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    return make_grids(tmp_path / "grids")
