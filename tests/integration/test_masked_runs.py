"""Runs with every part of the objective: the same on one process and two, and exact through a crash and a replay."""

from pathlib import Path

import pytest
import torch
from forked import run_group
from tiny_runs import Crash, assert_same_bits, assert_same_numbers, config, crash_after, last, metrics

from dino.api import load_backbone, pretrain, replay
from dino.errors import ConfigError, TrainingFault
from dino.objectives import ibot

PARTS = {
    "objective.ibot": 1.0,
    "objective.regression": 1.0,
    "objective.predictor_width": 16,
    "objective.predictor_depth": 1,
    "objective.koleo": 0.1,
    "objective.kde": 0.05,
    "objective.spread_group": 2,
    "objective.mask_ratio": [0.25, 0.5],
    "model.patch_size": 8,
}
OPTIMIZER = {
    "optim.layer_decay": 0.7,
    "optim.patch_embed_lr_factor": 0.2,
    "optim.weight_decay_on": "all",
    "optim.beta2": 0.99,
    "optim.lr_scaling": "sqrt",
    "training.freeze_backbone": 0.1,
}
LOSSES = {"loss/dino", "loss/ibot", "loss/regression", "loss/koleo", "loss/kde"}


def parts(level: str, **changes: object) -> dict[str, object]:
    own = {"model.patch_size": 1} if level == "grids" else {}
    return {**PARTS, **own, **changes}


@pytest.mark.parametrize("level", ["tiles", "grids"])
@pytest.mark.parametrize("targets", ["centring", "sinkhorn"])
def test_processes_and_micro_batches_do_not_matter(
    level: str, targets: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = request.getfixturevalue(level)
    own = parts(level, **{"objective.targets": targets, "objective.ibot_head": "separate", "speed.precision": "fp64"})
    pretrain(config(data, tmp_path / "one", **own))
    halves = {"training.batch_size_per_gpu": 2}
    pretrain(config(data, tmp_path / "halves", **own, **halves, **{"training.gradient_accumulation": 2}))
    assert_same_numbers(tmp_path / "one", tmp_path / "halves")
    if targets == "sinkhorn" or level == "tiles":
        run_group(lambda: pretrain(config(data, tmp_path / "two", **own, **halves)))
        assert_same_numbers(tmp_path / "one", tmp_path / "two")
    assert all(line.keys() >= LOSSES for line in metrics(tmp_path / "one"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_crash_changes_no_bit(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    own = parts("tiles", **OPTIMIZER)
    pretrain(config(tiles, tmp_path / "whole", **own))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 5)
        pretrain(config(tiles, tmp_path / "cut", **own))
    pretrain(config(tiles, tmp_path / "cut", **own, **{"speed.num_workers": workers}))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    saved = last(tmp_path / "whole")
    assert saved["student"]["backbone.mask_token"].abs().max() > 0
    assert [sorted(state) for state in saved["objectives"]] == [["centre.center"], ["centre.center"], [], [], []]


def test_a_failed_step_is_replayed_sample_by_sample(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = ibot.masked_loss, []

    def broken(*arguments: object, **options: object) -> torch.Tensor:
        calls.append(1)
        return honest(*arguments, **options) * (float("nan") if len(calls) == 5 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(ibot, "masked_loss", broken)
    with pytest.raises(TrainingFault, match="step 5"):
        pretrain(config(tiles, tmp_path / "run", **parts("tiles")))
    found = replay(tmp_path / "run" / "failure")
    assert not found.again and len(found.samples) == 4
    assert all(sample.losses.keys() == {"dino", "ibot", "regression"} for sample in found.samples)
    # Each sample has one masked view.
    assert all(sample.is_finite and min(sample.losses.values()) > 0 for sample in found.samples)


def test_regression_alone_trains_on_squares(tiles: Path, tmp_path: Path) -> None:
    alone = {"objective.dino": 0.0, "objective.ibot": 0.0, "objective.koleo": 0.0, "objective.kde": 0.0}
    squares = {"objective.mask_shape": "squares", "objective.mask_probability": 1.0, "objective.mask_ratio": [0.4, 0.4]}
    pretrain(config(tiles, tmp_path / "run", **parts("tiles", **alone, **squares, **{"optim.lr": 0.5})))
    lines = metrics(tmp_path / "run")
    assert {name for name in lines[0] if "loss" in name or "variance" in name} == {"loss", "regression_variance"}
    assert lines[-1]["loss"] < lines[0]["loss"] and all(0 < line["regression_variance"] < 1 for line in lines)


def test_other_parts_are_another_run_and_none_is_no_run(tiles: Path, tmp_path: Path) -> None:
    pretrain(config(tiles, tmp_path / "run", **parts("tiles")))
    with pytest.raises(ConfigError, match=r"objective.koleo 0.1 -> 0.2"):
        pretrain(config(tiles, tmp_path / "run", **parts("tiles", **{"objective.koleo": 0.2})))
    with pytest.raises(ConfigError, match="weight above 0"):
        pretrain(config(tiles, tmp_path / "none", **{"objective.dino": 0.0}))
    with pytest.raises(ConfigError, match="the nearest is 16"):
        pretrain(config(tiles, tmp_path / "odd", **{"objective.koleo": 0.1}))


def test_the_teacher_is_loaded_exported_and_started_from(
    tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pretrain(config(tiles, tmp_path / "run", **parts("tiles", **{"objective.ibot_head": "separate"})))
    image = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    direct = load_backbone(tmp_path / "run")(image)
    exported = load_backbone(tmp_path / "run" / "backbone")(image)
    assert torch.allclose(direct, exported, atol=1e-5)
    next_run = parts("tiles", **{"model.init": str(tmp_path / "run"), "training.max_steps": 1})
    pretrain(config(tiles, tmp_path / "next", **next_run))
    assert "mask token kept; heads start anew, those of the source are not used" in capsys.readouterr().out
    start = torch.load(tmp_path / "next" / "checkpoints" / "start.pt", weights_only=True)["teacher"]
    for name in ("backbone.cls_token", "backbone.mask_token"):
        assert torch.equal(start[name], last(tmp_path / "run")["teacher"][name])
