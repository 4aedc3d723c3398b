import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dino.errors import ConfigError
from dino.train import run_folder
from dino.train.callbacks import Checkpoints
from dino.train.checkpoint import CheckpointFolder
from dino.train.run_folder import RunFolder


def log(path: Path, lines: list[dict], torn: str = "") -> RunFolder:
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return RunFolder(path)


LINES = [{"step": 0, "evaluation": {}}, {"step": 2, "loss": 1.0}, {"step": 2, "evaluation": {}}, {"step": 4, "loss": 2}]


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    folder = log(tmp_path, LINES, torn='{"step": 5, "lo')
    assert folder.cut_log(2) == [LINES[1]]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == LINES[:3]


def test_without_a_checkpoint_nothing_of_the_log_stays(tmp_path: Path) -> None:
    assert log(tmp_path, LINES).cut_log(0) == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_what_a_process_killed_at_once_left_does_not_make_a_folder_anothers(tmp_path: Path) -> None:
    for left in (".identity.json.77.tmp", ".lock.json.0a1b.tmp"):
        (tmp_path / left).write_text("{")
    folder = RunFolder(tmp_path)
    folder.check({"seed": 0})
    folder.claim({"seed": 0}, "seed: 0\n")
    assert {path.name for path in tmp_path.iterdir()} == {"identity.json", "config.yaml", ".lock.json.0a1b.tmp"}
    (tmp_path / "identity.json").unlink()
    with pytest.raises(ConfigError, match="other files"):
        folder.check({"seed": 0})


def test_the_log_is_on_disk_before_a_checkpoint_that_counts_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut takes what was not synced; a killed process never shows that."""
    order: list[str] = []
    honest = CheckpointFolder.save
    monkeypatch.setattr(run_folder, "sync", lambda path: order.append(path.name))
    monkeypatch.setattr(CheckpointFolder, "save", lambda *a: (order.append("checkpoint"), honest(*a))[1])
    folder = RunFolder(tmp_path)
    with folder.lock.held():
        folder.log({"step": 1, "loss": 1.0})
        saved = Checkpoints(CheckpointFolder(folder.checkpoints), lambda _: {"step": 1}, folder, 1, 0).save(
            SimpleNamespace(step=1)  # type: ignore[arg-type]
        )
    assert saved and order == ["metrics.jsonl", "checkpoint"]
