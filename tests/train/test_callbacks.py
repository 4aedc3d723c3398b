import math

import pytest
import torch

from dino import distributed
from dino.objectives.dino import DINO
from dino.train.callbacks import LINES, CollapseWatch, StarvationWatch, feature_rank
from dino.train.profiling import STARVING


def warnings(
    entropy: float, loss: float, lines: int = LINES, warmup: int = 0, rank: float = 20.0, samples: int = 64
) -> list[list[str]]:
    watch = CollapseWatch(DINO.warnings, warmup, samples)
    numbers = {"teacher_entropy_relative": entropy, "loss_relative": loss, "feature_rank": rank}
    return [watch({"step": step, **numbers}) for step in range(1, lines + 1)]


def test_each_sign_is_reported_once_and_only_when_it_lasts() -> None:
    for entropy, loss, words in [
        (0.001, 0.3, "raise model.teacher_temp"),
        (0.999, 0.999, "lower model.warmup_teacher_temp"),
        (0.6, 0.995, "raise optim.lr"),
    ]:
        found = warnings(entropy, loss, 3 * LINES)
        assert found[LINES - 1][0].count(words) == 1
        assert sum(map(len, found)) == 1


def test_a_low_feature_rank_is_a_sign_unless_there_are_few_samples() -> None:
    found = warnings(0.5, 0.8, 3 * LINES, rank=1.2)
    assert "feature_rank" in found[LINES - 1][0] and sum(map(len, found)) == 1
    assert not any(warnings(0.5, 0.8, 3 * LINES, rank=1.2, samples=4))
    assert not any(warnings(0.5, 0.8, 3 * LINES, rank=1.2, warmup=3 * LINES))


def test_feature_rank_is_that_of_the_first_samples_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_no_warning_in_a_healthy_run_or_during_warmup() -> None:
    assert not any(warnings(0.5, 0.8, 50))
    assert not any(warnings(0.999, 0.999, 50, warmup=50))


def test_a_sign_that_disappears_is_counted_from_zero() -> None:
    watch = CollapseWatch(DINO.warnings, 0)
    for step in range(5 * LINES):
        entropy = 0.5 if step % (LINES - 1) == 0 else 0.001
        assert not watch({"step": step + 1, "teacher_entropy_relative": entropy, "loss_relative": 0.5})


def test_starvation_is_reported_once_and_not_while_the_workers_start() -> None:
    watch = StarvationWatch(workers=0)
    assert watch({"data_wait": 0.9}) == []
    assert watch({"data_wait": STARVING}) == []
    (advice,) = watch({"data_wait": 0.3})
    assert "waited 30%" in advice and "speed.num_workers (0 now" in advice
    assert watch({"data_wait": 0.5}) == []
