"""A step that is not finite leaves a record from which it can be done again."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import config
from typer.testing import CliRunner

from dino.api import pretrain, replay
from dino.cli.main import app
from dino.errors import CheckpointError, ConfigError, DataError, TrainingFault
from dino.lock import RunLock


def poison(grids: Path) -> str:
    """Values that are finite on disk and overflow in the first layer: what a broken extraction leaves."""
    bad = sorted(grids.glob("*.pt"))[5]
    torch.save(torch.full((36, 10), 3e38), bad)
    return f"{bad.name}#0"


def test_the_record_names_the_step_and_a_replay_finds_the_sample(grids: Path, tmp_path: Path) -> None:
    name = poison(grids)
    run = tmp_path / "run"
    with pytest.raises(TrainingFault, match="step"):
        pretrain(config(grids, run, **{"logging.save_every_steps": 1}))
    facts = json.loads((run / "failure" / "failure.json").read_text())
    record = torch.load(run / "failure" / "rank_0.pt", weights_only=True)
    assert name in record["names"] and len(record["names"]) == 4 and record["parameters"]["box"].shape[:2] == (4, 10)
    assert record["draws"].tolist() == list(range(4 * facts["step"] - 4, 4 * facts["step"]))
    assert facts["last_metrics"].get("step", 0) < facts["step"] and facts["values"]["lr"] >= 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    found = replay(run / "failure")
    assert found.again and found.step == facts["step"]
    assert [sample.name for sample in found.suspects] == [name]
    assert found.suspects[0].largest_input == pytest.approx(3e38)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["replay", str(run / "failure"), "speed.precision=fp64"])
    assert shown.exit_code == 0 and "is finite this time" in shown.output and name in shown.output


def test_a_fault_that_does_not_come_back_is_said_to(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that only breaks once, as by a fault of the hardware, in a run on micro-batches."""
    from dino.train import self_distillation

    calls, honest = [], self_distillation.dino_loss

    def broken(*args: object, **options: object) -> torch.Tensor:
        calls.append(1)
        return honest(*args, **options) * (float("nan") if len(calls) == 10 else 1.0)  # type: ignore[arg-type]

    halves = {"training.batch_size_per_gpu": 2, "training.gradient_accumulation": 2}
    with monkeypatch.context() as patch, pytest.raises(TrainingFault, match="step 5"):
        patch.setattr(self_distillation, "dino_loss", broken)
        pretrain(config(tiles, tmp_path / "run", **halves))
    found = replay(tmp_path / "run" / "failure")
    assert not found.again and not found.suspects and len(found.samples) == 4
    assert all(sample.loss > 0 for sample in found.samples)

    record = torch.load(tmp_path / "run" / "failure" / "rank_0.pt", weights_only=True)
    (tiles / record["names"][0]).write_bytes(b"torn")
    with pytest.raises(DataError, match="restore the data"):
        replay(tmp_path / "run" / "failure")


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="RUN/failure"):
        replay(tmp_path)
    (tmp_path / "failure.json").write_text('{"step": 3, "processes": [{}]}')
    with pytest.raises(CheckpointError, match="rank_0"):
        replay(tmp_path)


def test_a_folder_in_use_is_refused_and_left_alone(tiles: Path, tmp_path: Path) -> None:
    with RunLock(tmp_path / "run").held():
        with pytest.raises(ConfigError, match="to be free"):
            pretrain(config(tiles, tmp_path / "run"))
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock.json"]
    pretrain(config(tiles, tmp_path / "run", **{"training.max_steps": 1}))
    assert not (tmp_path / "run" / "lock.json").exists()
