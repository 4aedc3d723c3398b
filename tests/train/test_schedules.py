import numpy as np
import pytest

from dino.errors import ConfigError
from dino.train.schedules import Cosine, Length, Ramp


def published_cosine(base: float, final: float, total: int, warmup: int) -> np.ndarray:
    """The schedule of the DINO paper's code, written out over whole arrays."""
    rising = np.linspace(0, base, warmup)
    places = np.arange(total - warmup)
    falling = final + 0.5 * (base - final) * (1 + np.cos(np.pi * places / len(places)))
    return np.concatenate([rising, falling])


@pytest.mark.parametrize(("total", "warmup"), [(100, 0), (100, 10), (37, 5)])
def test_cosine_equals_the_published_schedule(total: int, warmup: int) -> None:
    schedule = Cosine(5e-4, 1e-6, total, warmup)
    assert np.allclose([schedule(i) for i in range(total)], published_cosine(5e-4, 1e-6, total, warmup), rtol=1e-12)


def test_ramp_is_linear_then_constant() -> None:
    ramp = Ramp(0.04, 0.07, 30)
    assert np.allclose([ramp(i) for i in range(30)], 0.04 + 0.03 * np.arange(30) / 30)
    assert ramp(30) == ramp(1000) == 0.07
    assert Ramp(0.04, 0.07, 0)(0) == 0.07


def test_epochs_become_steps_once() -> None:
    length = Length.of(samples=1000, global_batch=64, epochs=10, max_steps=None)
    assert length.total == round(10 * 1000 / 64) == 156
    assert length.steps(1.5) == round(1.5 * 1000 / 64)
    assert length.steps(99) == length.total
    assert length.epoch(156) == pytest.approx(9.984)
    assert Length.of(1000, 64, 10, max_steps=7).total == 7


def test_too_little_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="63 samples for a global batch of 64"):
        Length.of(63, 64, 10, None)
    with pytest.raises(ConfigError, match="at least one step"):
        Length.of(1000, 64, 0.01, None)
