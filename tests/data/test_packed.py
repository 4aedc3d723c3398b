"""Packed grids: the same samples as from the files, packed once, and again after any change of the files."""

import errno
import fcntl
import os
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.config.load import load_config
from dino.config.schema import RegionConfig
from dino.data import packed
from dino.data.datasets import BadSample, GridDataset
from dino.data.grids import GridEntry, survey
from dino.data.packed import GridFiles, PackedGrids, find_packed, gpu_budget, grid_dtype, pack, prepare_grids
from dino.errors import ConfigError, DataError

GENERATOR = torch.Generator().manual_seed(0)


def save(folder: Path, *tensors: object) -> list[Path]:
    paths = [folder / f"slide_{i}_0.pt" for i in range(len(tensors))]
    for path, tensor in zip(paths, tensors, strict=True):
        torch.save(tensor, path)
    return paths


def files_in(
    folder: Path, order: str = "yx", shape: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32
) -> GridFiles:
    return GridFiles(folder, [GridEntry(path, shape=shape) for path in sorted(folder.glob("*.pt"))], order, dtype)


def both(folder: Path, files: GridFiles, fraction: float = 0.0) -> tuple[GridDataset, GridDataset, PackedGrids]:
    """The dataset that reads files, and the one that reads the packed grids."""
    grids = pack(folder / "cache", files, fraction)
    plain = GridDataset(files, survey(folder, files.entries, max_bad_fraction=fraction))
    return plain, GridDataset(files, grids.survey, grids), grids


def outcome(dataset: GridDataset, index: int) -> tuple:
    try:
        sample = dataset[index]
    except BadSample as error:
        return error.name, str(error)
    return sample.name, sample.slide_id, sample.shape, sample.pixels.float().tolist()


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize("order", ["yx", "xy"])
def test_samples_equal_those_of_the_files(tmp_path: Path, order: str) -> None:
    save(tmp_path, numbers(24, 3), numbers(5, 24, 3), numbers(24, 3).double(), numbers(24, 3).half())
    plain, fast, grids = both(tmp_path, files_in(tmp_path, order, (4, 6)))
    assert len(plain) == len(fast) == 8 and plain.fingerprint == fast.fingerprint and plain.slide_ids == fast.slide_ids
    assert [outcome(plain, d) for d in range(8)] == [outcome(fast, d) for d in range(8)]
    rows = GridDataset(files_in(tmp_path, order, (4, 6)), grids.survey, grids, by_row=True)
    assert all(torch.equal(grids.cells[rows[d].pixels], fast[d].pixels) for d in range(8))


def test_each_region_of_a_file_is_a_sample(tmp_path: Path) -> None:
    slide = numbers(3, 16, 5)
    save(tmp_path, slide)
    for source in both(tmp_path, files_in(tmp_path))[:2]:
        found = {sample.name: sample.pixels for sample in (source[d] for d in range(3))}
        assert (source.dim, source.height, source.width) == (5, 4, 4)
        assert all(torch.equal(found[f"slide_0_0.pt#{m}"], slide[m]) for m in range(3))


@pytest.mark.parametrize(
    ("tensors", "dtype"),
    [
        ((numbers(16, 3).half(), numbers(16, 3).half().float()), torch.float16),
        ((numbers(16, 3).bfloat16(), 1e30 * numbers(16, 3).bfloat16()), torch.bfloat16),
        ((numbers(16, 3).half(), numbers(16, 3)), torch.float32),
        ((numbers(16, 3).half(), numbers(16, 3).bfloat16() * 2**-20), torch.float32),
    ],
)
def test_half_precision_is_used_only_where_it_is_exact(
    tmp_path: Path, tensors: Sequence[torch.Tensor], dtype: torch.dtype
) -> None:
    save(tmp_path, *tensors)
    plain, fast, grids = both(tmp_path, files_in(tmp_path))
    assert grids.dtype == grids.cells.dtype == dtype
    assert [outcome(plain, d) for d in range(2)] == [outcome(fast, d) for d in range(2)]
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1 and not list((tmp_path / "cache").glob(".*"))


def test_rounded_samples_equal_those_of_the_files_and_are_packed_separately(tmp_path: Path) -> None:
    tensors = numbers(16, 3), numbers(2, 16, 3).double(), 1e-6 * numbers(16, 3)
    save(tmp_path, *tensors)
    files = files_in(tmp_path, dtype=torch.bfloat16)
    plain, fast, grids = both(tmp_path, files)
    assert grids.dtype == plain[0].pixels.dtype == torch.bfloat16
    assert [outcome(plain, d) for d in range(4)] == [outcome(fast, d) for d in range(4)]
    exact = torch.cat([t.float().view(-1, 16, 3) for t in tensors])
    assert torch.equal(grids.cells, exact.bfloat16()) and not torch.equal(grids.cells.float(), exact)
    assert find_packed(tmp_path / "cache", files_in(tmp_path), 0.0) is None
    assert torch.equal(pack(tmp_path / "cache", files_in(tmp_path), 0.0).cells, exact)


def test_packed_grids_are_opened_without_reading_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, numbers(16, 3), numbers(16, 3))
    expected = pack(tmp_path / "cache", files_in(tmp_path), 0.0)
    monkeypatch.setattr(torch, "load", None)
    found = pack(tmp_path / "cache", files_in(tmp_path), 0.0)
    assert torch.equal(found.cells, expected.cells) and found.survey == expected.survey
    assert "cells" not in pickle.loads(pickle.dumps(found)).__dict__


def rewrite(path: Path) -> None:
    """Other values in a file of the same size; the clock of a file system may be coarse."""
    before = path.stat()
    torch.save(torch.load(path, weights_only=True) + 1, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize("change", ["values", "more", "fewer", "order", "shape", "damage"])
def test_grids_are_packed_again_after_a_change(tmp_path: Path, change: str) -> None:
    paths = save(tmp_path, numbers(24, 3), numbers(24, 3))
    old = pack(tmp_path / "cache", files_in(tmp_path, shape=(4, 6)), 0.0)
    held = old.cells.clone()
    files = files_in(tmp_path, "xy" if change == "order" else "yx", (6, 4) if change == "shape" else (4, 6))
    if change == "values":
        rewrite(paths[1])
    elif change == "more":
        torch.save(numbers(24, 3), tmp_path / "new.pt")
    elif change == "fewer":
        paths[0].unlink()
    elif change == "damage":
        old.path.write_bytes(old.path.read_bytes()[:-4])
    if change in {"values", "more", "fewer"}:
        files = files_in(tmp_path, shape=(4, 6))
    assert find_packed(tmp_path / "cache", files, 0.0) is None
    plain, fast, new = both(tmp_path, files)
    assert [outcome(plain, d) for d in range(len(plain))] == [outcome(fast, d) for d in range(len(plain))]
    assert list((tmp_path / "cache").glob("*.bin")) == [new.path]
    assert change == "damage" or torch.equal(old.cells, held)  # a run that has it mapped goes on with it


def test_bad_samples_have_the_same_name_and_reason(tmp_path: Path) -> None:
    hole = numbers(2, 16, 3)
    hole[1, 4, 1] = float("inf")
    contents = [numbers(16, 3), numbers(16, 3).long(), hole, numbers(15, 3), {"a": numbers(16, 3)}, numbers(16)]
    paths = save(tmp_path, *contents, torch.full((16, 3), float("nan")))
    paths[5].write_bytes(b"PK torn")
    plain, fast, grids = both(tmp_path, files_in(tmp_path), 0.6)
    found = [outcome(plain, d) for d in range(8)]
    assert found == [outcome(fast, d) for d in range(8)]
    assert sum(len(one) == 2 for one in found) == len(grids.bad) == 6
    for _ in range(2):  # the second time from the index
        with pytest.raises(DataError, match=r"slide_1_0.*3 more such files.*max_bad_fraction=0\.5"):
            pack(tmp_path / "cache", files_in(tmp_path), 0.5)


def test_folders_of_different_grids_raise_errors(tmp_path: Path) -> None:
    save(tmp_path, numbers(16, 3), numbers(16, 4))
    with pytest.raises(DataError, match="one D and one shape"):
        pack(tmp_path / "cache", files_in(tmp_path), 0.0)
    assert not list((tmp_path / "cache").glob("grids*"))


def test_later_changes_of_the_files_have_no_effect(tmp_path: Path) -> None:
    paths = save(tmp_path, numbers(16, 3), numbers(16, 3), torch.full((16, 3), float("nan")))
    _, fast, _ = both(tmp_path, files_in(tmp_path), 0.5)
    before = [outcome(fast, d) for d in range(3)]
    rewrite(paths[0])
    paths[1].unlink()
    assert [outcome(fast, d) for d in range(3)] == before
    torch.save(numbers(16, 3), paths[2])  # mended, but what was packed of it is zeros
    assert [one[1] for one in (outcome(fast, d) for d in range(3)) if len(one) == 2] == [
        f"expected {paths[2]} as it was when the grids were packed, found another file; start the command again"
    ]


def test_one_of_several_processes_packs_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, numbers(16, 3))
    begun, honest, results = [], packed._pack, []

    def slowly(*args: object) -> PackedGrids:
        begun.append(args)
        waiting.wait(10)
        return honest(*args)  # type: ignore[arg-type]

    waiting = threading.Event()
    monkeypatch.setattr(packed, "_pack", slowly)
    monkeypatch.setattr(packed.progress, "say", lambda line: waiting.set())  # printed by the one that waits
    work = lambda: results.append(pack(tmp_path / "cache", files_in(tmp_path), 0.0))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(begun) == 1 and waiting.is_set() and torch.equal(results[0].cells, results[1].cells)


@pytest.mark.parametrize("locks", [True, False])
def test_temporary_files_are_removed_only_under_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    save(tmp_path, numbers(16, 3))
    (tmp_path / "cache").mkdir()
    unfinished = tmp_path / "cache" / ".grids-0.bin.1.tmp"
    unfinished.touch()
    _, fast, _ = both(tmp_path, files_in(tmp_path))
    assert len(outcome(fast, 0)) == 4
    assert unfinished.exists() != locks  # without locks it may be another process's, at work


def test_too_small_a_disk_raises_an_error_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, numbers(16, 3))
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: packed.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match=r"are needed, 0\.0 GB are free"):
        pack(tmp_path / "cache", files_in(tmp_path), 0.0)
    assert find_packed(tmp_path / "cache", files_in(tmp_path), 0.0) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"key": 3}', b"\xff\xfe", b"null"])
def test_grids_are_packed_again_if_the_index_is_damaged(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, numbers(16, 3))
    pack(tmp_path / "cache", files_in(tmp_path), 0.0)
    (tmp_path / "cache" / "grids.json").write_bytes(content)
    assert find_packed(tmp_path / "cache", files_in(tmp_path), 0.0) is None
    assert np.isfinite(pack(tmp_path / "cache", files_in(tmp_path), 0.0).cells.numpy()).all()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "grids").mkdir()
    for i in range(3):
        torch.save(torch.randn(16, 3), tmp_path / "grids" / f"slide_{i}_0.pt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "grids"


def opened(folder: Path, **settings: object) -> tuple[bool, bool]:
    """Whether samples are rows, and whether the crops are to hold the cells."""
    config = load_config(RegionConfig, overrides={"speed.device": "cpu", **settings})
    files = files_in(folder, dtype=grid_dtype(config.speed))
    survey, grids, cells = prepare_grids(files, config.speed, 0.0, may_write=not config.dry_run)
    return GridDataset(files, survey, grids, by_row=cells is not None)[0].pixels.ndim == 0, cells is not None


@pytest.mark.parametrize(("precision", "bytes_each"), [("bf16", 2), ("fp32", 4), ("fp64", 4)])
def test_packed_grids_have_the_precision_of_the_run(
    folder: Path, precision: str, bytes_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino.precision.cpu_has_bf16", lambda: True)
    opened(folder, **{"speed.precision": precision})
    assert [path.stat().st_size for path in folder.rglob("*.bin")] == [3 * 16 * 3 * bytes_each]


def test_grids_are_not_rounded_for_a_cpu_that_computes_bf16_runs_in_fp32(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino.precision.cpu_has_bf16", lambda: False)
    opened(folder, **{"speed.precision": "bf16"})
    assert [path.stat().st_size for path in folder.rglob("*.bin")] == [3 * 16 * 3 * 4]


def packed_files(root: Path) -> list[str]:
    return [str(path.parent.relative_to(root)) for path in root.rglob("*.bin")]


def test_grids_are_packed_into_their_own_folder(folder: Path) -> None:
    assert opened(folder) == (True, True)
    assert packed_files(folder.parent) == ["grids/.histodino"]


def test_grids_of_a_read_only_folder_are_packed_into_the_user_cache(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ".histodino").write_text("no folder can be made here, not even by root")
    assert opened(folder) == (True, True)
    assert "cannot be packed into" in capsys.readouterr().out
    (where,) = packed_files(folder.parent)
    assert where.startswith("user/histodino/grids-")
    assert opened(folder) == (True, True) and "pack" not in capsys.readouterr().out  # found the second time


def test_without_a_cache_folder_files_are_read_one_by_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "full").write_text("")
    assert opened(folder, **{"speed.cache_dir": str(folder.parent / "full")}) == (False, False)
    assert "speed.cache_dir=FOLDER" in capsys.readouterr().out
    assert opened(folder, **{"speed.cache_dir": "none"}) == (False, False)
    assert opened(folder, dry_run=True) == (False, False)
    assert "warning" not in capsys.readouterr().out and packed_files(folder.parent) == []


def test_grids_of_several_folders_are_packed_separately_in_one_cache_folder(folder: Path) -> None:
    (folder / "more").mkdir()
    torch.save(torch.randn(16, 3), folder / "more" / "a.pt")
    for where in (folder, folder / "more"):
        assert opened(where, **{"speed.cache_dir": str(folder.parent / "fast")}) == (True, True)
    assert len(set(packed_files(folder.parent))) == 2


def test_more_gpu_memory_than_is_free_raises_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"expected a GPU for speed\.gpu_cache=4"):
        opened(folder, **{"speed.gpu_cache": 4})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8_000_000_000, 80_000_000_000))
    gpu = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"at most the 8\.0 GB that are free on cuda:0, found 9"):
        gpu_budget(gpu, 9)
    assert (gpu_budget(gpu, 5), gpu_budget(gpu, None)) == (5e9, 2e9)
    assert packed._cells_on(gpu, torch.zeros(1).expand(10**9), 3) is None  # 4 GB
