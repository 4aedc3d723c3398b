import pytest
import torch
from scipy import stats

from dino.evaluate.verdict import RANDOM
from dino.train.evaluator import PairedFeatures, evaluate_run


def paired(noise: float, rounds: int = 6, count: int = 20) -> PairedFeatures:
    """Two views of each sample, in rounds with the samples in another order."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(count, 8, generator=generator)
    samples = torch.stack([torch.randperm(count, generator=generator) for _ in range(rounds)])
    shift = torch.randn(rounds, 2, count, 8, generator=generator)
    return PairedFeatures(directions[samples][:, None] + noise * shift, samples)


def test_error_of_a_difference_is_that_of_a_paired_t_test_of_the_means_of_the_samples():
    better, worse = paired(0.5), paired(0.9)
    first, second = (
        [found.hits()[found.samples == sample].mean().item() for sample in range(20)] for found in (better, worse)
    )
    difference = (better.hits() - worse.hits()).mean().item()
    assert difference > 0.1
    expected = stats.ttest_rel(first, second)
    assert difference / better.error_of_difference(worse) == pytest.approx(expected.statistic)


def test_a_query_is_compared_with_the_views_of_its_own_round():
    found = paired(0.9)
    unit = torch.nn.functional.normalize(found.features, dim=-1)  # (R, 2, N, D)
    nearest = torch.cdist(unit[:, 0], unit[:, 1]).argmin(2)
    assert torch.equal(found.hits(), (nearest == torch.arange(20)).double())


def test_few_samples_are_judged_by_all_their_views():
    found, numbers = evaluate_run(paired(0.5), {RANDOM: paired(0.9)}, entropy=0.5, loss=0.8, evaluator=None)
    assert found.word == "learning" and "(120 queries of 20 samples, " in found.text
    assert numbers["comparison"]["samples"] == 20
    assert numbers["own_place_teacher"] == pytest.approx(paired(0.5).hits().mean().item())


def test_features_that_are_not_finite_are_a_collapse():
    broken = paired(0.5)
    broken.features[0, 0, 0, 0] = torch.nan
    found, _ = evaluate_run(broken, {RANDOM: paired(0.9)}, entropy=0.5, loss=0.8, evaluator=None)
    assert found.word == "collapsed"
