"""A run that is killed, at chosen and at random moments, ends as one that was never interrupted."""

import json
import random
from pathlib import Path

import pytest
import torch
from forked import KILLED, Point, die_at, exit_codes, fork, kill_at_random
from tiny_runs import Crash, add_bad_files, assert_same_bits, config, crash_after, last, with_evaluation

from dino.api import measuring, pretrain
from dino.config.schema import PatchConfig, RegionConfig
from dino.train.loop import Trainer

SCORES = {2: 0.3, 4: 0.2, 6: 0.5, 8: 0.5, 10: 0.4, 12: 0.1}  # the best at step 6; three misses end the run at 12
MOMENTS = [
    Point(0, "os.rename", "identity.json"),
    Point(0, "torn", "start.pt"),
    Point(0, "open", "metrics.jsonl"),
    Point(1, "open", "metrics.jsonl"),  # after the line on the start weights
    Point(2, "os.link", "best.pt"),  # last.pt is written, and best.pt is not
    Point(5, "open", "metrics.jsonl"),  # after an evaluation, before a checkpoint
    Point(6, "torn", "last.pt"),
    Point(6, "os.link", "previous.pt"),
    Point(6, "os.rename", "best.pt"),  # best.pt is that of step 2
    Point(9, "os.rename", "last.pt"),
    Point(12, "open", "last.pt"),  # the run is to stop early, and does not know it any more
    Point(12, "open", "model.safetensors"),  # it is saved, and about to be exported
    Point(12, "os.rename", "config.json"),
    Point(12, "os.rename", "status.json"),  # the final state
]


def settings(data: Path, output: Path, **changes: object) -> PatchConfig | RegionConfig:
    lively = {"training.max_steps": 20, "training.max_bad_fraction": 0.5, "optim.lr": 0.5}
    return config(data, output, **{**with_evaluation(data), **lively, **changes})


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores by the step, so that the best one and the end of the run are known."""
    steps: list[Trainer] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: (steps.append(self), fit(self)))
    score = lambda *_: {"knn_3_accuracy": SCORES.get(steps[-1].step, 0.1)}  # noqa: E731
    monkeypatch.setattr(measuring, "table_scores", score)


def killed_at(point: Point, run: PatchConfig | RegionConfig) -> None:
    def work() -> None:
        die_at(point)
        pretrain(run)

    assert exit_codes([fork(work)]) == [KILLED], f"the run never came to {point}"


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_killed_at_chosen_moments_a_judged_run_ends_with_the_same_bits(
    level: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = request.getfixturevalue(level)
    add_bad_files(data)
    whole, cut = settings(data, tmp_path / "whole"), settings(data, tmp_path / "cut")
    assert pretrain(whole).state == "early_stopped"
    for point in MOMENTS:
        killed_at(point, cut)
    summary = pretrain(cut)
    assert summary.state == "early_stopped" and summary.steps == 12
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    assert torch.load(tmp_path / "cut" / "checkpoints" / "best.pt", weights_only=True)["step"] == 6
    ends = [json.loads((tmp_path / run / "status.json").read_text()) for run in ("whole", "cut")]
    assert all(ends[0][key] == ends[1][key] for key in ("state", "step", "verdict", "floor", "bad_files"))
    files = [{path.relative_to(tmp_path / run) for path in (tmp_path / run).rglob("*")} for run in ("whole", "cut")]
    assert files[0] == files[1]


def test_killed_at_random_moments_a_judged_run_ends_with_the_same_bits(tiles: Path, tmp_path: Path) -> None:
    """Three kills at moments that nobody chose; workers decode, and the judge looks for neighbours."""
    add_bad_files(tiles)
    long = {"training.max_steps": 40, "evaluate.early_stopping_patience": 0}
    pretrain(settings(tiles, tmp_path / "whole", **long))
    cut = settings(tiles, tmp_path / "cut", **long, **{"speed.num_workers": 1})
    moments = random.Random(0)
    for _ in range(3):
        assert kill_at_random([fork(lambda: pretrain(cut))], tmp_path / "cut" / "metrics.jsonl", moments)
    assert pretrain(cut).state == "finished"
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("before", [{"evaluate.labels": None}, {"evaluate.k": [1]}])
def test_a_judge_that_is_added_or_changed_on_the_way_counts_anew(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 7)
        pretrain(settings(tiles, tmp_path / "run", **before, **{"training.max_steps": 8}))
    pretrain(settings(tiles, tmp_path / "run", **{"training.max_steps": 8}))
    judge = last(tmp_path / "run")["state"]["callbacks"]["Judge"]
    assert judge["tracked"] == "knn_3_accuracy" and judge["best_step"] == 8 - 2 * judge["misses"]
