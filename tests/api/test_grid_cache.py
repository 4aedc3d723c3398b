"""Where packed grids lie, and what a device can hold of them."""

from pathlib import Path

import pytest
import torch

from dino.api import grid_cache
from dino.api.grid_cache import budget_on, grid_source
from dino.config.load import load_config
from dino.config.schema import RegionConfig
from dino.data.grid_files import GridEntry
from dino.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "grids").mkdir()
    for i in range(3):
        torch.save(torch.randn(16, 3), tmp_path / "grids" / f"slide_{i}_0.pt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "grids"


def opened(folder: Path, **settings: object) -> tuple[bool, bool]:
    """Whether samples are rows, and whether there are cells to be held."""
    config = load_config(RegionConfig, overrides={"speed.device": "cpu", **settings})
    source, cells = grid_source(folder, [GridEntry(path) for path in sorted(folder.glob("*.pt"))], config)
    return source(0, 0).pixels.ndim == 0, cells is not None


@pytest.mark.parametrize(("precision", "bytes_each"), [("bf16", 2), ("fp32", 4), ("fp64", 4)])
def test_grids_are_as_exact_as_the_run(folder: Path, precision: str, bytes_each: int) -> None:
    opened(folder, **{"speed.precision": precision})
    assert [path.stat().st_size for path in folder.rglob("*.bin")] == [3 * 16 * 3 * bytes_each]


def packed_files(root: Path) -> list[str]:
    return [str(path.parent.relative_to(root)) for path in root.rglob("*.bin")]


def test_grids_are_packed_beside_themselves(folder: Path) -> None:
    assert opened(folder) == (True, True)
    assert packed_files(folder.parent) == ["grids/.histodino"]


def test_a_folder_that_takes_nothing_is_packed_into_the_users_cache(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ".histodino").write_text("no folder can be made here, not even by root")
    assert opened(folder) == (True, True)
    assert "cannot be packed into" in capsys.readouterr().out
    (where,) = packed_files(folder.parent)
    assert where.startswith("user/histodino/grids-")
    assert opened(folder) == (True, True) and capsys.readouterr().out == ""  # found at once the second time


def test_without_any_place_files_are_read_one_by_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "full").write_text("")
    assert opened(folder, **{"speed.cache_dir": str(folder.parent / "full")}) == (False, False)
    assert "speed.cache_dir=FOLDER" in capsys.readouterr().out
    assert opened(folder, **{"speed.cache_dir": "none"}) == (False, False)
    assert opened(folder, dry_run=True) == (False, False)
    assert "warning" not in capsys.readouterr().out and packed_files(folder.parent) == []


def test_a_named_folder_keeps_grids_of_several_folders_apart(folder: Path) -> None:
    (folder / "more").mkdir()
    torch.save(torch.randn(16, 3), folder / "more" / "a.pt")
    for where in (folder, folder / "more"):
        assert opened(where, **{"speed.cache_dir": str(folder.parent / "fast")}) == (True, True)
    assert len(set(packed_files(folder.parent))) == 2


def test_memory_that_is_not_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"expected a GPU for speed\.gpu_cache=4"):
        opened(folder, **{"speed.gpu_cache": 4})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8_000_000_000, 80_000_000_000))
    gpu = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"at most the 8\.0 GB that are free on cuda:0, found 9"):
        budget_on(gpu, 9)
    assert (budget_on(gpu, 5), budget_on(gpu, None)) == (5e9, 2e9)
    assert grid_cache._held(torch.zeros(1).expand(10**9), gpu, 3) is None  # 4 GB
