"""``status.json`` tells the truth at any moment, whole, and the end of a run is one screen."""

import json
import threading
from pathlib import Path

import pytest
from tiny_runs import add_bad_files, config, metrics

from dino.api import pretrain
from dino.train.loop import Trainer


def test_status_is_right_and_whole_at_every_moment(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    add_bad_files(tiles)
    path, found, honest = tmp_path / "run" / "status.json", [], Trainer._step
    reads, over = [0], threading.Event()

    def step(self: Trainer, *args: object) -> object:
        found.append(json.loads(path.read_text()))
        return honest(self, *args)  # type: ignore[arg-type]

    def read_on() -> None:
        while not over.is_set():
            if path.exists():
                json.loads(path.read_text())  # would raise on half a file
                reads[0] += 1

    def read_and_tell() -> None:
        try:
            read_on()
        except ValueError:
            reads[0] = -1

    monkeypatch.setattr(Trainer, "_step", step)
    reader = threading.Thread(target=read_and_tell)
    reader.start()
    pretrain(config(tiles, tmp_path / "run", **{"training.max_bad_fraction": 0.5, "training.max_steps": 12}))
    over.set()
    reader.join()

    assert reads[0] > 12
    assert [status["step"] for status in found] == list(range(12))
    assert [status["last_checkpoint_step"] for status in found] == [step - step % 3 for step in range(12)]
    assert [status["last_checkpoint"] for status in found[:4]] == [None, None, None, "checkpoints/last.pt"]
    assert all(status["state"] == "running" and status["total_steps"] == 12 for status in found)
    assert found[0]["eta_seconds"] is None and all(status["eta_seconds"] >= 0 for status in found[1:])
    assert all({"bad_files", "warnings", "time", "run_id"} <= status.keys() for status in found)

    end = json.loads(path.read_text())
    assert end["state"] == "finished" and end["step"] == 12 and end["eta_seconds"] == 0 and end["bad_files"] == 2
    assert all("waited" in warning for warning in end["warnings"])  # for data, which a network so small does
    assert end["error"] is None and metrics(tmp_path / "run")[-1]["step"] == 12
    screen = capsys.readouterr().out
    assert screen.count("pretrain patch: finished") == 1 and end["verdict"]["word"].capitalize() in screen
    pretrain(config(tiles, tmp_path / "run", **{"training.max_bad_fraction": 0.5, "training.max_steps": 12}))
    assert capsys.readouterr().out.count("pretrain patch: finished") == 1
