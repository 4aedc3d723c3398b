"""A run with two objectives: log, checkpoints, warnings, failure record and replay use whatever names they have."""

import json
from pathlib import Path

import pytest
import torch
from second_objective import Regression
from tiny_runs import Crash, assert_same_bits, config, crash_after, last, metrics
from typer.testing import CliRunner

from dino.api import pretrain, replay
from dino.cli.main import app
from dino.errors import TrainingFault
from dino.train import distill
from dino.train.callbacks import LINES


@pytest.fixture(autouse=True)
def two_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    build = distill.build_objectives
    monkeypatch.setattr(distill, "build_objectives", lambda *arguments: [*build(*arguments), Regression()])


def test_both_are_logged_saved_resumed_and_watched(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"training.max_steps": LINES + 4, "training.gradient_accumulation": 2, "training.batch_size_per_gpu": 2}
    pretrain(config(tiles, tmp_path / "whole", **long))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 5)
        pretrain(config(tiles, tmp_path / "cut", **long))
    pretrain(config(tiles, tmp_path / "cut", **long))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")

    for step, line in enumerate(metrics(tmp_path / "whole")):
        total = line["loss/dino"] + 0.5 * (line["loss/distance"] + line["loss/scale"])
        assert line["loss"] == pytest.approx(total, rel=1e-5) and line["steps_seen"] == step
        assert line["loss_relative"] == pytest.approx(line["loss/dino"] / torch.tensor(32.0).log().item(), rel=1e-6)
    saved = last(tmp_path / "whole")
    assert [sorted(state) for state in saved["objectives"]] == [["centre.center"], ["steps"]]
    assert saved["objectives"][1]["steps"] == LINES + 4 and "projection_head.weight" in saved["student"]
    warnings = json.loads((tmp_path / "whole" / "status.json").read_text())["warnings"]
    assert "the step count is shown" in warnings


def test_a_failed_step_is_recorded_and_replayed_with_all_losses(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Regression.forward

    def broken(self: Regression, *arguments: object) -> object:
        terms = honest(self, *arguments)  # type: ignore[arg-type]
        scale = float("nan") if self.steps == 4 else 1.0
        return terms._replace(losses={**terms.losses, "scale": terms.losses["scale"] * scale})

    monkeypatch.setattr(Regression, "forward", broken)
    with pytest.raises(TrainingFault, match="step 5"):
        pretrain(config(tiles, tmp_path / "run"))
    facts = json.loads((tmp_path / "run" / "failure" / "failure.json").read_text())
    (numbers,) = facts["processes"]
    assert {"loss", "loss/dino", "loss/distance", "loss/scale", "teacher_entropy", "grad_norm"} <= numbers.keys()

    found = replay(tmp_path / "run" / "failure")
    assert found.again and len(found.suspects) == 4
    assert all(sample.losses.keys() == {"dino", "distance", "scale"} for sample in found.samples)
    assert all(
        sample.losses["dino"] > 0 and sample.losses["scale"] != sample.losses["scale"] for sample in found.samples
    )
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["replay", str(tmp_path / "run" / "failure")])
    assert shown.exit_code == 0 and "loss/distance" in shown.output
