"""A step that is not finite leaves a record from which it can be done again."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from forked import exit_codes, fork_group
from tiny_runs import config, last, with_evaluation
from typer.testing import CliRunner

from dino import distributed
from dino.api import pretrain, replay
from dino.cli.main import app
from dino.errors import CheckpointError, ConfigError, DataError, TrainingFault
from dino.lock import RunLock
from dino.train import loop
from dino.train.loop import Trainer


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
    from dino.objectives import dino as objective

    calls, honest = [], objective.dino_loss

    def broken(*args: object, **options: object) -> torch.Tensor:
        calls.append(1)
        return honest(*args, **options) * (float("nan") if len(calls) == 10 else 1.0)  # type: ignore[arg-type]

    halves = {"training.batch_size_per_gpu": 2, "training.gradient_accumulation": 2}
    with monkeypatch.context() as patch, pytest.raises(TrainingFault, match="step 5"):
        patch.setattr(objective, "dino_loss", broken)
        pretrain(config(tiles, tmp_path / "run", **halves))
    found = replay(tmp_path / "run" / "failure")
    assert not found.again and not found.suspects and len(found.samples) == 4
    assert all(sample.loss > 0 for sample in found.samples)

    record = torch.load(tmp_path / "run" / "failure" / "rank_0.pt", weights_only=True)
    (tiles / record["names"][0]).write_bytes(b"torn")
    with pytest.raises(DataError, match="restore the data"):
        replay(tmp_path / "run" / "failure")


def test_samples_that_overflow_on_one_process_stop_all_and_each_leaves_its_record(grids: Path, tmp_path: Path) -> None:
    name, run = poison(grids), tmp_path / "run"
    shared = config(grids, run, **{"logging.save_every_steps": 1, "training.batch_size_per_gpu": 2})
    assert exit_codes(fork_group(lambda: pretrain(shared), 2)) == [1, 1]  # 1: a fault; none waits for the other

    facts = json.loads((run / "failure" / "failure.json").read_text())
    records = [torch.load(run / "failure" / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert sorted(path.name for path in (run / "failure").iterdir()) == ["failure.json", "rank_0.pt", "rank_1.pt"]
    with_it = [name in record["names"] for record in records]
    assert sorted(with_it) == [False, True]
    assert [not math.isfinite(process["loss"]) for process in facts["processes"]] == with_it
    drawn = [draw for record in records for draw in record["draws"].tolist()]
    assert drawn == list(range(4 * facts["step"] - 4, 4 * facts["step"]))
    assert last(run)["step"] == facts["step"] - 1
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and status["last_checkpoint_step"] == facts["step"] - 1

    found = replay(run / "failure")
    assert found.again and [sample.name for sample in found.suspects] == [name]


def bits(trainer: Trainer) -> list[torch.Tensor]:
    """Everything that a step may change: networks, centre, optimizer."""
    state = trainer.optimizer.state_dict()["state"]
    optimizer = [value for moments in state.values() for value in moments.values()]
    return copy.deepcopy([*trainer.model.state_dict().values(), *optimizer])


def test_a_gradient_that_is_not_finite_on_one_process_changes_no_bit_on_any(grids: Path, tmp_path: Path) -> None:
    """As by a fault of one machine, after the gradients were averaged; in the middle of a run."""
    broken_step = 5
    shared = config(grids, tmp_path / "run", **{"training.batch_size_per_gpu": 2})

    def work() -> None:
        changed: dict[int, bool] = {}
        step, clip = Trainer._step, loop.clip_gradients

        def watched(self: Trainer, *arguments: object) -> object:
            before = bits(self)
            report = step(self, *arguments)  # type: ignore[arg-type]
            changed[self.step] = not all(map(torch.equal, before, bits(self))) or len(before) != len(bits(self))
            return report

        def broken(parameters: object, *arguments: object) -> object:
            parameters = list(parameters)  # type: ignore[call-overload]
            if len(changed) == broken_step - 1 and distributed.rank() == 1:
                parameters[3].grad.flatten()[0] = torch.nan
            return clip(parameters, *arguments)  # type: ignore[arg-type]

        Trainer._step, loop.clip_gradients = watched, broken  # type: ignore[assignment,method-assign]
        with pytest.raises(TrainingFault, match=f"step {broken_step}"):
            pretrain(shared)
        (tmp_path / f"{distributed.rank()}.json").write_text(json.dumps(changed))

    assert exit_codes(fork_group(work, 2)) == [0, 0]
    for rank in (0, 1):
        changed = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [changed[str(step)] for step in (3, 4, broken_step)] == [True, True, False]
    assert last(tmp_path / "run")["step"] == 3  # where the checkpoint before it was


def test_a_labelled_file_that_one_process_cannot_read_ends_all(
    tiles: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    labels = with_evaluation(tiles)
    sorted((tmp_path / "tiles_labelled").iterdir())[1].write_bytes(b"torn")  # a row of the second process
    shared = config(tiles, tmp_path / "run", **labels, **{"training.batch_size_per_gpu": 2})
    assert exit_codes(fork_group(lambda: pretrain(shared), 2)) == [1, 1]
    assert capfd.readouterr().err.count("DataError: cannot decode") == 2


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="RUN/failure"):
        replay(tmp_path)
    (tmp_path / "failure.json").write_text('{"step": 3, "processes": [{}]}')
    with pytest.raises(CheckpointError, match="rank_0"):
        replay(tmp_path)


def test_a_folder_in_use_is_refused_and_left_alone(tiles: Path, tmp_path: Path) -> None:
    with RunLock(tmp_path / "run").held():
        with pytest.raises(ConfigError, match="is in use by PID"):
            pretrain(config(tiles, tmp_path / "run"))
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock.json"]
    pretrain(config(tiles, tmp_path / "run", **{"training.max_steps": 1}))
    assert not (tmp_path / "run" / "lock.json").exists()
