import argparse
from pathlib import Path

import pytest
import torch

from dino.data.grids import open_grids, read_grid
from dino.errors import ConfigError, DataError


def coordinates(height: int, width: int) -> torch.Tensor:
    """Row-major ``[h*w x 2]`` rows whose values are their own (y, x)."""
    return torch.tensor([[y, x] for y in range(height) for x in range(width)], dtype=torch.float32)


def test_rows_are_row_major(tmp_path: Path) -> None:
    torch.save(coordinates(4, 6), tmp_path / "a.pt")
    grid = read_grid(tmp_path / "a.pt", shape=(4, 6))
    assert grid.shape == (2, 4, 6) and grid.is_contiguous()
    assert all(grid[:, y, x].tolist() == [y, x] for y in range(4) for x in range(6))


def test_column_major_rows_are_transposed(tmp_path: Path) -> None:
    rows = torch.tensor([[y, x] for x in range(6) for y in range(4)], dtype=torch.float16)
    torch.save(rows, tmp_path / "a.pt")
    grid = read_grid(tmp_path / "a.pt", "xy", (4, 6))
    assert grid.dtype == torch.float32
    assert all(grid[:, y, x].tolist() == [y, x] for y in range(4) for x in range(6))


def test_one_region_of_several_is_read(tmp_path: Path) -> None:
    slide = torch.randn(3, 16, 5)  # HIPT: regions x cells x D
    torch.save(slide, tmp_path / "slide.pt")
    assert torch.equal(read_grid(tmp_path / "slide.pt", region=1), slide[1].reshape(4, 4, 5).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.randn(15, 3), "square number"),
        (torch.randn(9, 3), "at least 4 x 4"),
        (torch.randn(16), "expected a float tensor"),
        (torch.zeros(16, 3, dtype=torch.long), "expected a float tensor"),
        ({"features": torch.randn(16, 3)}, "expected a float tensor"),
        (argparse.Namespace(x=1), "would run code"),
        (torch.full((16, 3), float("nan")), "finite"),
        (torch.randn(0, 3), "empty"),
    ],
)
def test_files_that_are_not_grids_raise_data_errors(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(DataError, match=message):
        read_grid(tmp_path / "bad.pt")


def test_damaged_file_and_unknown_order_raise_errors(tmp_path: Path) -> None:
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(DataError, match=r"torn\.pt"):
        open_grids(tmp_path / "torn.pt")
    torch.save(torch.randn(16, 3), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="zy"):
        read_grid(tmp_path / "a.pt", "zy")
