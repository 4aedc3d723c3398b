"""HIPT's aggregation over regions against the plain formula and torch's own layers, and on bags with a known signal."""

import numpy as np
import pytest
import torch
from torch import nn

from dino import randomness
from dino.config.schema import HiptConfig
from dino.evaluate.abmil import AttentionPooling, Moments, PiecewiseBag
from dino.evaluate.hipt import RegionTransformer
from dino.evaluate.outcomes import Classes
from dino.evaluate.pooling import LinearModel, cross_validate, inner_folds
from dino.evaluate.task import grouped_folds

CPU = torch.device("cpu")
SMALL = HiptConfig(hidden=12, attention=5, layers=2, heads=3)


class Array:
    """Instances in memory."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values.astype(np.float32)

    def __len__(self) -> int:
        return len(self.values)

    def read(self, rows: slice | np.ndarray, /) -> np.ndarray:
        return self.values[rows]


def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


def plain_formula(model: RegionTransformer, x: torch.Tensor, keeps: list[torch.Tensor]) -> torch.Tensor:
    """The network written out, one region and one head at a time.

    Args:
        model: Its weights.
        x: (N, D).
        keeps: The factors of dropout, in the order in which the network draws them.
    """
    factors = iter(keeps)

    def affine(layer: nn.Linear, one: torch.Tensor) -> torch.Tensor:
        return layer.weight @ one + layer.bias

    h = [affine(model.embed, (one - model.mean) / model.deviation).clamp(min=0) for one in x]
    h = [one * kept for one, kept in zip(h, next(factors), strict=True)]
    for layer in model.layers:
        parts = [affine(layer.qkv, one).split(12) for one in h]
        mixed = []
        for query, _, _ in parts:
            heads = []
            for head in range(3):
                own = slice(4 * head, 4 * head + 4)
                attention = torch.stack([query[own] @ key[own] / 2 for _, key, _ in parts]).exp()  # sqrt(4) = 2
                heads.append(
                    sum(a * value[own] for a, (_, _, value) in zip(attention, parts, strict=True)) / attention.sum()
                )
            mixed.append(affine(layer.proj, torch.cat(heads)))
        h = [norm(one + two * kept, layer.norm1) for one, two, kept in zip(h, mixed, next(factors), strict=True)]
        inner = [affine(layer.fc1, one).clamp(min=0) * kept for one, kept in zip(h, next(factors), strict=True)]
        outer = [affine(layer.fc2, one) * kept for one, kept in zip(inner, next(factors), strict=True)]
        h = [norm(one + two, layer.norm2) for one, two in zip(h, outer, strict=True)]
    scores = [affine(model.score, affine(model.tanh, one).tanh() * affine(model.gate, one).sigmoid())[0] for one in h]
    exponentials = torch.stack(scores).exp()
    z = sum(a * one for a, one in zip(exponentials / exponentials.sum(), h, strict=True))
    return affine(model.head, affine(model.rho, z).clamp(min=0) * next(factors))


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("piece", [4, 50])
def test_outputs_and_gradients_are_those_of_the_plain_formula(rate: float, piece: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 7, dtype=torch.float64, generator=generator)
    model = RegionTransformer(np.full(7, 0.1), np.full(7, 1.3), 3, SMALL, seed=1).double()
    weights = torch.randn(3, dtype=torch.float64, generator=generator)
    keeps: list[torch.Tensor] = []

    def dropout(values: torch.Tensor) -> torch.Tensor:
        keeps.append((torch.rand(values.shape, generator=generator) >= rate).double() / (1 - rate))
        return values * keeps[-1]

    gradients = []
    outputs = [
        model([lambda i=i: x[i : i + piece] for i in range(0, 9, piece)], dropout),
        plain_formula(model, x, keeps),
    ]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        model.zero_grad()
        (output @ weights).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_layers_are_those_of_torch() -> None:
    """``nn.TransformerEncoderLayer``, which HIPT's code uses."""
    model = RegionTransformer(np.zeros(7), np.ones(7), 2, SMALL, seed=0).double()
    x = torch.randn(1, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = found = x
    for layer in model.layers:
        theirs = nn.TransformerEncoderLayer(12, 3, 12, activation="relu", batch_first=True).double().eval()
        names = {"self_attn.in_proj_weight": layer.qkv.weight, "self_attn.in_proj_bias": layer.qkv.bias}
        for name, ours in {"self_attn.out_proj": layer.proj, "linear1": layer.fc1, "linear2": layer.fc2}.items():
            names |= {f"{name}.weight": ours.weight, f"{name}.bias": ours.bias}
        for name in ("norm1", "norm2"):
            names |= {f"{name}.{key}": value for key, value in getattr(layer, name).state_dict().items()}
        theirs.load_state_dict(names)
        expected, found = theirs(expected), layer(found[0], lambda values: values)[None]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def cohort(cases: int, regions: int, seed: int) -> tuple[list[str], list[PiecewiseBag]]:
    """Two classes: one in ten regions of the second is shifted."""
    generator = randomness.generator(seed, 0, "cohort")
    labels, bags = [], []
    for i in range(cases):
        values = generator.normal(size=(regions, 8))
        values[: round(0.1 * regions) * (i % 2), 0] += 5
        labels.append(f"class {i % 2}")
        bags.append(PiecewiseBag([Array(values)], 7))
    return labels, bags


def test_the_same_bits_come_out_again_whatever_the_global_generator_and_the_pieces() -> None:
    labels, bags = cohort(8, 20, 0)
    found = []
    for piece in (7, 100):
        torch.manual_seed(piece)
        parts = [PiecewiseBag(bag.slides, piece) for bag in bags]
        method = AttentionPooling(Classes(labels), parts, Moments(bags), SMALL, CPU, 3, RegionTransformer)
        found.append(method.predict(np.arange(6), np.arange(6, 8), 1))
    assert np.allclose(*found, rtol=1e-4)
    method = AttentionPooling(Classes(labels), bags, Moments(bags), SMALL, CPU, 3, RegionTransformer)
    assert np.array_equal(method.predict(np.arange(6), np.arange(6, 8), 1), found[0])


def test_a_tenth_of_the_regions_is_found() -> None:
    labels, bags = cohort(48, 20, 1)
    outcome, moments, groups = Classes(labels), Moments(bags), [str(i) for i in range(48)]
    folds = grouped_folds(labels, groups, 2, 0)
    inner = [inner_folds(fold, outcome, groups, 2, 0) for fold in folds]
    config = HiptConfig(hidden=24, attention=16, epochs=12, lr=2e-3)
    attention = AttentionPooling(outcome, bags, moments, config, CPU, 0, RegionTransformer)
    scored = [cross_validate(outcome, folds, inner, one) for one in (LinearModel(outcome, moments.means), attention)]
    mean, found = (float(one.statistics["auc"](np.ones((1, 48)))[0]) for one in scored)
    assert found > max(0.9, mean)
