"""A disk that fills up, vanishes or refuses: the run goes on where it can, and loses nothing that was safe."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from small_disks import fill
from tiny_runs import TINY_PATCH, assert_same_bits, config, last, metrics

from dino import files
from dino.api import pretrain
from dino.errors import CheckpointError, ConfigError
from dino.train.loop import Trainer


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict) -> None:
    """Call ``actions[n]`` just before step n + 1."""
    honest = Trainer._step

    def step(self: Trainer, *args: object) -> object:
        actions.get(self.step, lambda: None)()
        return honest(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_step", step)


def test_a_full_disk_is_endured_and_the_result_is_the_same(
    tiles: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = small_disk / "run"
    pretrain(config(tiles, tmp_path / "whole"))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, {4: lambda: fill(small_disk), 7: (small_disk / "filler").unlink})
        assert pretrain(config(tiles, run)).state == "finished"
    shown = capsys.readouterr().out.partition("pretrain patch: finished")[0]  # the summary recalls the warnings
    assert shown.count("last.pt: No space left") == 1 and shown.count("status.json: No space left") == 1
    assert any("No space left" in warning for warning in status(run)["warnings"])
    assert_same_bits(tmp_path / "whole", run)


def test_a_disk_that_stays_full_ends_the_run_clearly_and_keeps_the_last_good_checkpoint(
    tiles: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_disk / "run"
    pretrain(config(tiles, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="safe up to step 3: make room"):
        at_step(patch, {4: lambda: fill(small_disk)})
        pretrain(config(tiles, run))
    assert last(run)["step"] == 3
    (small_disk / "filler").unlink()
    assert pretrain(config(tiles, run)).state == "finished"
    assert_same_bits(tmp_path / "whole", run)
    assert not list(run.rglob("*.tmp"))


def test_no_room_from_the_start_is_one_clear_line(tiles: Path, small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises((ConfigError, CheckpointError), match=r"expected to write to .*disk"):
        pretrain(config(tiles, small_disk / "run"))


def test_a_read_only_disk_is_one_clear_line(tiles: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ConfigError, match="Read-only"):
        pretrain(config(tiles, small_disk / "run"))


def test_a_folder_that_vanishes_is_not_made_anew_elsewhere(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a mount is lost: writing under its mount point would fill another disk."""
    run, away = tmp_path / "run", tmp_path / "away"
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="safe up to step 3"):
        at_step(patch, {4: lambda: shutil.move(run, away)})
        pretrain(config(tiles, run))
    assert last(away)["step"] == 3 and not run.exists()


def test_a_run_whose_folder_was_taken_over_stops_and_writes_nothing(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="another process uses the folder now"):
        at_step(patch, {4: lambda: (run / "lock.json").write_text("another's")})
        pretrain(config(tiles, run))
    assert last(run)["step"] == 3 and status(run)["state"] == "running"
    assert (run / "lock.json").read_text() == "another's"


@pytest.mark.parametrize("call", ["fsync", "replace", "link", "open"])
def test_the_writer_survives_each_of_its_system_calls(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Each call fails throughout one step in which a checkpoint is due; the run ends as if it had not."""
    honest = getattr(os, call)

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    pretrain(config(tiles, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        at_step(
            patch, {5: lambda: patch.setattr(files.os, call, fail), 6: lambda: patch.setattr(files.os, call, honest)}
        )
        pretrain(config(tiles, tmp_path / "run"))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == TINY_PATCH["training.max_steps"]


def test_a_tracker_that_fails_does_not_end_the_run(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dino.api import run

    def broken(step: int, numbers: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(run, "build_trackers", lambda *_, **__: (broken,))
    assert pretrain(config(tiles, tmp_path / "run")).state == "finished"
    assert [w for w in status(tmp_path / "run")["warnings"] if "no route" in w]
