"""Run folders: what is kept of a log, whose a folder is, and reading one that is missing, damaged or in use."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dino.config.load import load_config, to_yaml
from dino.config.schema import PatchConfig, RegionConfig
from dino.errors import CheckpointError, ConfigError
from dino.train import run_folder
from dino.train.callbacks import Checkpoints
from dino.train.checkpoint import CheckpointFolder
from dino.train.run_folder import RunFolder, RunReader


def log(path: Path, lines: list[dict], torn: str = "") -> RunFolder:
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return RunFolder(path)


LINES = [{"step": 0, "evaluation": {}}, {"step": 2, "loss": 1.0}, {"step": 2, "evaluation": {}}, {"step": 4, "loss": 2}]


def test_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    folder = log(tmp_path, LINES, torn='{"step": 5, "lo')
    assert folder.cut_log(2) == [LINES[1]]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == LINES[:3]


def test_log_is_emptied_without_a_checkpoint(tmp_path: Path) -> None:
    assert log(tmp_path, LINES).cut_log(0) == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_temporary_files_of_a_killed_process_do_not_count_as_other_files(tmp_path: Path) -> None:
    for left in (".identity.json.77.tmp", ".lock.json.0a1b.tmp"):
        (tmp_path / left).write_text("{")
    folder = RunFolder(tmp_path)
    folder.check({"seed": 0})
    folder.claim({"seed": 0}, "seed: 0\n")
    assert {path.name for path in tmp_path.iterdir()} == {"identity.json", "config.yaml", ".lock.json.0a1b.tmp"}
    (tmp_path / "identity.json").unlink()
    with pytest.raises(ConfigError, match="other files"):
        folder.check({"seed": 0})


def test_log_is_synced_before_the_checkpoint_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run needs the lines up to its checkpoint; a power cut would show a missing fsync, a kill does not."""
    order: list[str] = []
    original = CheckpointFolder.save
    monkeypatch.setattr(run_folder, "sync", lambda path: order.append(path.name))
    monkeypatch.setattr(CheckpointFolder, "save", lambda *a: (order.append("checkpoint"), original(*a))[1])
    folder = RunFolder(tmp_path)
    with folder.lock.held():
        folder.log({"step": 1, "loss": 1.0})
        saved = Checkpoints(CheckpointFolder(folder.checkpoints), lambda _: {"step": 1}, folder, 1, 0).save(
            SimpleNamespace(step=1)  # type: ignore[arg-type]
        )
    assert saved and order == ["metrics.jsonl", "checkpoint"]


@pytest.mark.parametrize(("level", "schema"), [("patch", PatchConfig), ("region", RegionConfig)])
def test_reader_returns_what_was_written(tmp_path: Path, level: str, schema: type) -> None:
    written = load_config(schema, overrides={"seed": 7, "optim.lr": 0.25})
    folder = RunFolder(tmp_path)
    folder.claim({"level": level, "seed": 7}, to_yaml(written))
    folder.update_status(state="running", step=3)
    for line in ({"step": 2, "loss": 1.5, "lr": 0.1}, {"step": 2, "evaluation": {}}, {"step": 3, "loss": float("nan")}):
        folder.log(line)
    reader = RunReader(tmp_path)
    assert reader.identity() == {"level": level, "seed": 7}
    assert reader.level() == level
    assert reader.config() == written
    assert reader.config({"seed": 8}).seed == 8
    assert [line["step"] for line in reader.log_lines()] == [2, 2, 3]
    assert reader.last_metrics() == {"step": 2, "loss": 1.5, "lr": 0.1}
    assert reader.status()["step"] == 3


def test_reader_of_a_run_in_use_and_of_one_that_is_complete(tmp_path: Path) -> None:
    folder, reader = RunFolder(tmp_path), RunReader(tmp_path)
    with folder.lock.held():
        folder.update_status(state="running")
        assert reader.is_running() and not reader.is_over()
    assert not reader.is_running()
    folder.update_status(state="early_stopped")
    assert reader.is_over() and reader.state() == "early_stopped"


def test_reader_chooses_the_best_checkpoint_if_there_is_one(tmp_path: Path) -> None:
    reader = RunReader(tmp_path)
    with pytest.raises(CheckpointError, match=r"best\.pt or checkpoints/last\.pt"):
        reader.checkpoint()
    with pytest.raises(CheckpointError, match="expected the initial weights"):
        reader.initial_checkpoint()
    reader.checkpoints.mkdir()
    for name in ("last.pt", "best.pt"):
        (reader.checkpoints / name).touch()
        assert reader.checkpoint() == reader.checkpoints / name


@pytest.mark.parametrize("content", [None, "", "[1, 2]", '{"state": ', "\x00"])
def test_reader_tolerates_missing_and_damaged_files(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        for name in ("status.json", "identity.json", "metrics.jsonl", "config.yaml"):
            (tmp_path / name).write_text(content)
    reader = RunReader(tmp_path)
    assert (reader.status(), reader.state(), reader.last_metrics()) == ({}, "", {})
    assert not reader.is_over() and not reader.is_running()
    for method in (reader.identity, reader.level, reader.config):
        with pytest.raises(ConfigError):
            method()
