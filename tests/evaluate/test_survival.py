"""Survival against lifelines and the definitions."""

import numpy as np
import pytest
import torch
from lifelines.utils import concordance_index

from dino.evaluate.survival import concordance, fit_cox, hazard_loss, hazard_risk, interval_ends


@pytest.mark.parametrize("seed", range(20))
def test_concordance_is_that_of_lifelines(seed):
    random = np.random.default_rng(seed)
    times = random.integers(1, 12, 40).astype(float)  # many equal times and risks
    events = random.random(40) < 0.6
    risk = random.integers(0, 6, 40).astype(float)
    expected = concordance_index(times, -risk, events)
    assert concordance(times, events, risk)(np.ones((1, 40)))[0] == pytest.approx(expected, abs=1e-12)


def test_weights_are_repetitions():
    random = np.random.default_rng(0)
    times, events, risk = random.integers(1, 9, 30).astype(float), random.random(30) < 0.5, random.normal(size=30)
    weights = random.integers(0, 4, (5, 30))
    found = concordance(times, events, risk)(weights.astype(float))
    for value, times_drawn in zip(found, weights, strict=True):
        rows = np.repeat(np.arange(30), times_drawn)
        assert value == pytest.approx(concordance_index(times[rows], -risk[rows], events[rows]), abs=1e-12)


def test_without_comparable_pairs_it_is_undefined():
    assert np.isnan(concordance(np.array([1.0, 2.0]), np.array([False, False]), np.array([1.0, 0.0]))(np.ones((1, 2))))


def test_cox_orders_cases_by_their_hazard():
    random = np.random.default_rng(1)
    features = random.normal(size=(200, 30))
    times = random.exponential(np.exp(-1.5 * features[:, 3]))
    risk = fit_cox(features[:100], times[:100], np.ones(100, bool), 0.1)(features[100:])
    assert concordance_index(times[100:], -risk) > 0.7


def test_cox_without_variance_predicts_equal_risks():
    risk = fit_cox(np.zeros((10, 3)), np.arange(1.0, 11), np.ones(10, bool), 0.1)
    assert np.array_equal(risk(np.ones((4, 3))), np.zeros(4))


def test_hazards_have_the_likelihood_of_the_definition():
    ends = interval_ends(np.array([1.0, 2, 3, 4, 9]), np.array([True, True, True, True, False]), 4)
    assert len(ends) == 3
    logits = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hazard = torch.sigmoid(logits)
    for interval, time in enumerate([0.5, *(ends + 1e-6)]):
        lived = (1 - hazard[:interval]).log().sum()
        torch.testing.assert_close(hazard_loss(logits, time, False, ends), -lived)
        torch.testing.assert_close(hazard_loss(logits, time, True, ends), -(lived + hazard[interval].log()))


def test_higher_hazards_are_a_higher_risk():
    low, high = torch.full((1, 4), -2.0), torch.full((1, 4), 1.0)
    assert hazard_risk(high) > hazard_risk(low)
