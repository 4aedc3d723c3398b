import math

import pytest
import torch

from dino import distributed
from dino.train.callbacks import feature_rank
from dino.train.collapse import LINES, CollapseWatch


def said(
    entropy: float, loss: float, lines: int = LINES, settled_after: int = 0, rank: float = 20.0, samples: int = 64
) -> list[list[str]]:
    watch = CollapseWatch(settled_after, samples)
    numbers = {"teacher_entropy_relative": entropy, "loss_relative": loss, "feature_rank": rank}
    return [watch({"step": step, **numbers}) for step in range(1, lines + 1)]


def test_each_sign_is_said_once_and_only_when_it_lasts() -> None:
    for entropy, loss, words in [
        (0.001, 0.3, "raise model.teacher_temp"),
        (0.999, 0.999, "lower model.warmup_teacher_temp"),
        (0.6, 0.995, "raise optim.lr"),
    ]:
        found = said(entropy, loss, 3 * LINES)
        assert found[LINES - 1][0].count(words) == 1
        assert sum(map(len, found)) == 1


def test_features_of_one_direction_are_a_sign_unless_there_are_few_samples() -> None:
    found = said(0.5, 0.8, 3 * LINES, rank=1.2)
    assert "feature_rank" in found[LINES - 1][0] and sum(map(len, found)) == 1
    assert not any(said(0.5, 0.8, 3 * LINES, rank=1.2, samples=4))
    assert not any(said(0.5, 0.8, 3 * LINES, rank=1.2, settled_after=3 * LINES))


def test_the_features_rank_is_that_of_the_first_samples_whoever_drew_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six directions: the singular values of orthogonal rows are their lengths (Roy & Vetterli 2007, definition 1)."""
    rows = torch.zeros(100, 8)
    rows[:6, :6], rows[70:, 7] = torch.eye(6), 5.0  # what comes after the first 64 does not count
    assert feature_rank(rows[None, :64]) == pytest.approx(6.0)
    assert feature_rank(rows.unflatten(0, (2, 50))) == pytest.approx(6.0)
    halves = rows.unflatten(0, (5, 2, 10))  # 5 micro-batches of 2 processes with 10 samples each
    monkeypatch.setattr(distributed, "gather", lambda own: list(halves.transpose(0, 1)))
    assert feature_rank(halves[:, 0]) == pytest.approx(6.0)
    halves[0, 0, 0, 0] = torch.nan
    assert math.isnan(feature_rank(halves[:, 0]))


def test_a_healthy_run_and_a_warm_up_are_left_alone() -> None:
    assert not any(said(0.5, 0.8, 50))
    assert not any(said(0.999, 0.999, 50, settled_after=50))


def test_a_sign_that_goes_away_is_forgotten() -> None:
    watch = CollapseWatch(0)
    for step in range(5 * LINES):
        entropy = 0.5 if step % (LINES - 1) == 0 else 0.001
        assert not watch({"step": step + 1, "teacher_entropy_relative": entropy, "loss_relative": 0.5})
