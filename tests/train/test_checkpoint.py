import io
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dino.errors import CheckpointError
from dino.train.checkpoint import BEST, LAST, PREVIOUS, CheckpointFolder, check_archive


def content(step: int) -> dict:
    return {"format": "histodino/1", "step": step, "teacher": {"w": torch.full((64, 64), float(step))}}


def test_the_one_before_is_kept(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path)
    assert files.load() is None
    files.save(content(1))
    files.save(content(2))
    assert files.load()["step"] == 2
    assert torch.load(tmp_path / "previous.pt", weights_only=True)["step"] == 1


def test_kept_copies_do_not_change_with_the_last(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path)
    files.save(content(1))
    files.keep_last_as("best.pt")
    files.keep_last_as("best.pt")  # the same file once more
    files.save(content(2))
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 1
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt", "previous.pt"]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    files = CheckpointFolder(tmp_path)
    files.save(content(1))
    files.save(content(2))
    raw = bytearray((tmp_path / "last.pt").read_bytes())
    if damage == "flipped":
        raw[len(raw) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes({"torn": raw[: len(raw) // 2], "flipped": raw, "empty": b""}[damage])
    assert files.load()["step"] == 1


def test_nothing_whole_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="found none"):
        CheckpointFolder(tmp_path).load()


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CheckpointFolder(tmp_path).save(content(1))
    CheckpointFolder(tmp_path).save(content(2))
    (tmp_path / "last.pt").write_bytes(b"torn")
    files = CheckpointFolder(tmp_path)
    assert files.load()["step"] == 1

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            files.save(content(3))
    assert CheckpointFolder(tmp_path).load()["step"] == 1
    files.keep_last_as("best.pt")
    assert files.step_of("best.pt") == 1
    files.save(content(3))
    assert [CheckpointFolder(tmp_path).step_of(name) for name in ("last.pt", "previous.pt")] == [3, 1]
    files.save(content(4))
    assert [files.step_of(name) for name in ("last.pt", "previous.pt", "best.pt")] == [4, 3, 1]


def test_the_step_of_what_is_damaged_or_absent_is_not_known(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path)
    files.save(content(7))
    (tmp_path / "best.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-100])
    assert [files.step_of(name) for name in ("last.pt", "best.pt", "start.pt")] == [7, None, None]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    files = CheckpointFolder(tmp_path)
    files.save(content(1))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space"):
            files.save(content(2))
    assert files.load()["step"] == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_bytes_that_read_back_differently_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = CheckpointFolder(tmp_path)
    files.save(content(1))
    honest = torch.save

    def corrupting(obj: object, file: io.BufferedWriter) -> None:
        buffer = io.BytesIO()
        honest(obj, buffer)
        raw = bytearray(buffer.getvalue())
        raw[len(raw) // 2] ^= 1
        file.write(raw)

    monkeypatch.setattr(torch, "save", corrupting)
    with pytest.raises(CheckpointError, match="damaged"):
        files.save(content(2))
    assert files.load()["step"] == 1
    check_archive(tmp_path / "last.pt")


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_no_checkpoint_goes_before_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Whatever fails while the third is saved and made the best: the second stays the last, the first the best."""
    folder = CheckpointFolder(tmp_path)
    folder.save({"step": 1})
    folder.keep_last_as(BEST)
    folder.save({"step": 2})

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, suppress(OSError):
        patch.setattr(os, call, fail)
        if call == "link":  # a copy is made instead, which fails as well
            patch.setattr("shutil.copyfile", fail)
        folder.save({"step": 3})
        folder.keep_last_as(BEST)
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] == 2
    assert torch.load(tmp_path / BEST, weights_only=True)["step"] == 1
    assert not list(tmp_path.glob(".*"))
    folder.save({"step": 3})
    folder.keep_last_as(BEST)
    assert [torch.load(tmp_path / name, weights_only=True)["step"] for name in (PREVIOUS, LAST, BEST)] == [2, 3, 3]
