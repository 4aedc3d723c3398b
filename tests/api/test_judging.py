"""How often a run is evaluated if nothing else is said."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dino.api import judging
from dino.train.optimizer import Length


def interval(rows: int, samples: int = 2560, epochs: float = 100, every: int = 0) -> int:
    """Of a run with batches of 64, two crops of 96 px and six of 48 px in patches of 16 px, with rows of 256 px."""
    crops = SimpleNamespace(sizes=[96, 48], groups=[2, 6])
    level = SimpleNamespace(crops=crops, spec=SimpleNamespace(patch_size=16))
    config = SimpleNamespace(evaluate=SimpleNamespace(every_steps=every))
    run = SimpleNamespace(level=level, config=config, length=Length.of(samples, 64, epochs, None))
    return judging._interval(cast(Any, run), rows * 256)


def test_few_rows_are_scored_once_an_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    assert interval(100) == 40 and interval(1) == 40
    assert "of the time" not in capsys.readouterr().out


def test_many_rows_are_scored_as_often_as_a_twentieth_of_the_time_allows(capsys: pytest.CaptureFixture[str]) -> None:
    """A sample of training: 2 x 36 + 6 x 9 tokens three times and 2 x 36 once; a row: 256 tokens twice."""
    a_step = 64 * (3 * (2 * 36 + 6 * 9) + 2 * 36)
    for rows in (500, 1000, 2000):
        every = interval(rows)
        assert 2 * 256 * rows <= 0.05 * every * a_step and 2 * 256 * rows > 0.05 * (every - 1) * a_step
    assert "of the time" not in capsys.readouterr().out


def test_a_run_is_scored_at_least_four_times_and_what_it_costs_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert interval(2000, epochs=8) == 8 * 40 // 4
    assert "evaluations every 80 steps take about 44% of the time of training" in capsys.readouterr().out
    assert interval(2000, epochs=2) == 40  # of an epoch at the shortest
    assert interval(2000, every=10) == 10  # what is set counts
    assert "evaluations every 10 steps" in capsys.readouterr().out


def test_two_global_crops_of_one_size_are_what_the_teacher_sees() -> None:
    """Region grids have sizes of two sides, in cells."""
    crops = SimpleNamespace(sizes=[(14, 14), (6, 6)], groups=[2, 8])
    level = SimpleNamespace(crops=crops, spec=SimpleNamespace(patch_size=1))
    config = SimpleNamespace(evaluate=SimpleNamespace(every_steps=0))
    run = SimpleNamespace(level=level, config=config, length=Length.of(1000, 10, 100, None))
    a_step = 10 * (3 * (2 * 196 + 8 * 36) + 2 * 196)
    assert judging._interval(cast(Any, run), 1000 * 256) == -(-2 * 1000 * 256 // (a_step * 0.05))
