"""Attention-based multiple-instance learning against the plain formula, and on bags with a known signal."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.config.schema import AbmilConfig
from dino.evaluate.abmil import AttentionPooling, GatedAttention, Moments, PiecewiseBag
from dino.evaluate.outcomes import Classes, Numbers, Survival
from dino.evaluate.pooling import LinearModel, cross_validate, inner_folds
from dino.evaluate.task import grouped_folds

CPU = torch.device("cpu")
SMALL = AbmilConfig(hidden=32, attention=16)


class Array:
    """Instances in memory."""

    def __init__(self, values):
        self.values = values.astype(np.float32)

    def __len__(self):
        return len(self.values)

    def read(self, rows):
        return self.values[rows]


def plain_formula(model, x):
    """Equations 7 and 9 of Ilse et al. 2018, written out for one instance after the other."""
    x = (x - model.mean) / model.deviation
    h = [torch.clamp(model.embed.weight @ one + model.embed.bias, min=0) for one in x]
    scores = []
    for one in h:
        tanh = torch.tanh(model.tanh.weight @ one + model.tanh.bias)
        gate = 1 / (1 + torch.exp(-(model.gate.weight @ one + model.gate.bias)))
        scores.append(model.score.weight[0] @ (tanh * gate) + model.score.bias[0])
    exponentials = torch.stack(scores).exp()
    z = sum(a * one for a, one in zip(exponentials / exponentials.sum(), h, strict=True))
    return model.head.weight @ z + model.head.bias


@pytest.mark.parametrize("piece", [7, 50])
def test_outputs_and_gradients_are_those_of_the_plain_formula(piece):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, dtype=torch.float64, generator=generator)
    model = GatedAttention(np.full(12, 0.1), np.full(12, 1.3), 3, SMALL, seed=1).double()
    weights = torch.randn(3, dtype=torch.float64, generator=generator)
    gradients = []
    pieces = [lambda i=i: x[i : i + piece] for i in range(0, 50, piece)]
    outputs = [model(pieces), plain_formula(model, x)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        model.zero_grad()
        (output @ weights).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
        assert ours.abs().max() > 0 or ours.numel() == 1  # the bias of the score has no gradient


def test_every_piece_is_read_once_without_gradients_and_twice_with():
    read = []
    model = GatedAttention(np.zeros(4), np.ones(4), 2, SMALL, seed=0)
    pieces = [lambda i=i: read.append(i) or torch.ones(3, 4) for i in range(3)]
    model(pieces).sum().backward()
    assert sorted(read) == [0, 0, 1, 1, 2, 2]
    with torch.no_grad():
        model(pieces)
    assert sorted(read) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_pieces_are_the_drawn_instances_of_all_slides():
    random = np.random.default_rng(0)
    for _ in range(20):
        slides = [random.normal(size=(int(n), 2)).astype(np.float32) for n in random.integers(1, 9, 3)]
        every = np.concatenate(slides)
        bag = PiecewiseBag([Array(slide) for slide in slides], 3)
        drawn = np.sort(random.choice(len(bag), random.integers(1, len(bag) + 1), replace=False))
        for rows, pieces in ((slice(None), bag.pieces()), (drawn, bag.pieces(drawn))):
            read = [piece().numpy() for piece in pieces]
            assert np.array_equal(np.concatenate(read), every[rows]) and max(map(len, read)) <= 3


def test_a_part_of_the_instances_is_drawn_in_each_epoch():
    labels, bags = cohort(12, 0.5, 1.0, tiles=30)
    outcome, moments, rows = Classes(labels), Moments(bags), (np.arange(8), np.arange(8, 12))
    every, some, again = (
        AttentionPooling(outcome, bags, moments, AbmilConfig(hidden=8, attention=4, tiles=tiles), CPU, 0).errors(*rows)
        for tiles in (30, 10, 10)
    )
    assert np.array_equal(some, again) and not np.array_equal(some, every)


def test_moments_weigh_every_case_alike():
    random = np.random.default_rng(0)
    bags = [random.normal(i, 1 + i, (10 * (i + 1), 5)).astype(np.float32) for i in range(3)]
    moments = Moments([PiecewiseBag([Array(bag[:4]), Array(bag[4:])], 3) for bag in bags])
    assert np.allclose(moments.means, [bag.mean(0, np.float64) for bag in bags])
    mean, deviation = moments.of(np.array([0, 2]))
    repeated = np.concatenate([np.tile(bags[0], (3, 1)), bags[2]]).astype(np.float64)
    assert np.allclose(mean, repeated.mean(0)) and np.allclose(deviation, repeated.std(0))


def test_constant_features_are_not_divided_by_zero():
    moments = Moments([PiecewiseBag([Array(np.full((4, 2), 3.3))], 8)] * 2)
    assert moments.of(np.arange(2))[1].tolist() == [1, 1]


def cohort(cases, share, shift, tiles=200, dim=16, seed=0):
    """Bags of two classes: a share of the tiles of the second class is shifted; every slide has a tint of its own."""
    random = np.random.default_rng(seed)
    labels, bags = [], []
    for i in range(cases):
        values = random.normal(size=(tiles, dim)) + 0.3 * random.normal(size=dim)
        values[: round(share * tiles) * (i % 2), 0] += shift
        labels.append(f"class {i % 2}")
        bags.append(PiecewiseBag([Array(values)], 1000))
    return labels, bags


def scores(outcome, bags, config=SMALL, folds=4, seed=0):
    """Values of the primary statistic: of mean pooling, and of attention."""
    groups = [str(i) for i in range(len(bags))]
    splits = grouped_folds(outcome.strata(), groups, folds, 0)
    inner = [inner_folds(fold, outcome, groups, 2, 0) for fold in splits]
    moments = Moments(bags)
    methods = LinearModel(outcome, moments.means), AttentionPooling(outcome, bags, moments, config, CPU, seed)
    scored = [cross_validate(outcome, splits, inner, method) for method in methods]
    return [{name: float(one(np.ones((1, len(bags))))[0]) for name, one in each.statistics.items()} for each in scored]


def test_attention_finds_two_percent_of_the_tiles():
    labels, bags = cohort(80, 0.02, 8.0, tiles=100, dim=8)
    mean, attention = scores(Classes(labels), bags, AbmilConfig(hidden=32, attention=16, epochs=16, lr=2e-3), folds=2)
    assert attention["auc"] > 0.9 and attention["auc"] > mean["auc"] + 0.15


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_attention_beats_the_mean_on_few_tiles_and_ties_on_all(seed):
    labels, bags = cohort(80, 0.02, 6.0, seed=seed)
    mean, attention = scores(Classes(labels), bags)
    assert attention["auc"] > max(0.8, mean["auc"] + 0.1)
    labels, bags = cohort(80, 1.0, 1.0, seed=seed)
    mean, attention = scores(Classes(labels), bags)
    assert min(mean["auc"], attention["auc"]) > 0.85 and abs(attention["auc"] - mean["auc"]) < 0.05


def test_numbers_and_times_are_predicted():
    random = np.random.default_rng(2)
    signal = random.normal(size=60)
    bags = [PiecewiseBag([Array(random.normal(size=(20, 6)) + np.eye(6)[0] * one)], 100) for one in signal]
    config = AbmilConfig(hidden=32, attention=16, epochs=8, lr=3e-3)
    for found in scores(Numbers(100 + 10 * signal), bags, config, folds=2):
        assert found["pearson"] > 0.8 and found["r2"] > 0.5 and found["mae"] < 6
    times = random.exponential(np.exp(-2 * signal))
    for found in scores(Survival(times, random.random(60) < 0.8), bags, config, folds=2):
        assert found["c_index"] > 0.7


def predictions():
    labels, bags = cohort(12, 0.5, 1.0, tiles=30)
    return AttentionPooling(Classes(labels), bags, Moments(bags), SMALL, CPU, 5).predict(
        np.arange(8), np.arange(8, 12), 2
    )


@pytest.mark.slow
def test_another_process_predicts_the_same_bits():
    """Also with another state of torch's global generator."""
    program = "import test_abmil, torch; torch.manual_seed(9); print(test_abmil.predictions().tobytes().hex())"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    other = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert other.stdout.strip() == predictions().tobytes().hex()


def test_fewer_epochs_are_the_beginning_of_more():
    labels, bags = cohort(12, 0.5, 1.0, tiles=30)
    outcome, moments = Classes(labels), Moments(bags)
    train, test = np.arange(8), np.arange(8, 12)
    short, long = (
        AttentionPooling(outcome, bags, moments, AbmilConfig(hidden=8, attention=4, epochs=epochs), CPU, 0)
        for epochs in (2, 6)
    )
    assert np.array_equal(short.predict(train, test, 1), long.predict(train, test, 1))
    assert np.array_equal(short.errors(train, test), long.errors(train, test)[:2])


LARGE = """
import resource, sys
from pathlib import Path
import h5py, numpy as np
from test_abmil import AbmilConfig, AttentionPooling, CPU, Classes, Moments, PiecewiseBag
from dino.data.bags import open_bag

paths = [Path(sys.argv[1]) / f"s{i}.h5" for i in range(2)]
for i, path in enumerate(paths):
    values = np.random.default_rng(i).normal(size=(1000, 1024)).astype(np.float16)
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", (100_000, 1024), np.float16)
        for start in range(0, 100_000, 1000):
            features[start : start + 1000] = values
bags = [PiecewiseBag([open_bag(path)], AbmilConfig().piece) for path in paths]
method = AttentionPooling(Classes(["x", "y"]), bags, Moments(bags), AbmilConfig(epochs=1), CPU, 0)
assert np.isfinite(method.predict(np.arange(2), np.arange(2), 0)).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)  # GB
"""


@pytest.mark.slow
def test_bags_of_a_hundred_thousand_tiles_are_trained_on_in_little_memory(tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    env = {**os.environ, "PYTHONPATH": paths}
    program = [sys.executable, "-c", LARGE, str(tmp_path)]
    assert float(subprocess.run(program, check=True, capture_output=True, text=True, env=env).stdout) < 2
