"""Masked and spreading objectives against formulas written out in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dino.config.schema import ModelConfig, ObjectiveConfig
from dino.errors import ConfigError
from dino.models.backbone import Tokens
from dino.models.predictor import Predictor
from dino.objectives import Masked, Outputs
from dino.objectives.cross_entropy import masked_loss
from dino.objectives.ibot import IBOT
from dino.objectives.regression import Regression
from dino.objectives.spread import KDE, KoLeo, kde, koleo
from dino.objectives.targets import SinkhornKnopp

K = 12


def masks(batch: int = 3, tokens: int = 6, seed: int = 0) -> Tensor:
    """(B, G, N) with views that have no masked token."""
    mask = torch.rand(batch, 2, tokens, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[0, 1] = False
    return mask


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ibot(**changes: object) -> IBOT:
    settings = ModelConfig(out_dim=K, hidden_dim=8, bottleneck_dim=4)
    return IBOT(settings, ObjectiveConfig(ibot=1.0, **changes), lambda step: 0.07, seed=1).double()  # type: ignore[arg-type]


def test_ibot_is_the_mean_over_each_views_masked_tokens_and_all_views() -> None:
    mask = masks()
    masked = Masked.of(mask)
    count = int(mask.sum())
    student, teacher = random(count, K).requires_grad_(), random(count, K, seed=1)
    objective = ibot()
    objective.centre.center.copy_(random(1, K, seed=2))
    terms = objective(
        Outputs([], {"ibot": student.clone()}, masked),
        Outputs([], {"ibot": teacher.clone()}, masked),
        {"teacher_temp": 0.07},
    )
    (found,) = torch.autograd.grad(terms.losses["ibot"], student)

    written = student.detach().clone().requires_grad_()
    targets = F.softmax((teacher - objective.centre.center) / 0.07, dim=-1)
    rows = iter(range(count))
    total = torch.zeros((), dtype=torch.float64)
    for view in range(2):  # tokens are counted by view, sample and position
        for sample in range(3):
            losses = []
            for _ in range(int(mask[sample, view].sum())):
                row = next(rows)
                losses.append(-(targets[row] * F.log_softmax(written[row] / 0.1, dim=-1)).sum())
            if losses:
                total = total + torch.stack(losses).mean()
    total = total / 6
    (expected,) = torch.autograd.grad(total, written)
    assert terms.losses["ibot"].item() == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    entropy = (-(targets * targets.log()).sum(-1) * masked.weight).sum() / 0.5  # half of the views are masked
    assert float(terms.diagnostics["ibot_entropy"]) == pytest.approx(float(entropy), rel=1e-10)
    objective.step(torch.tensor(True))
    moved = 0.9 * random(1, K, seed=2) + 0.1 * teacher.mean(0, keepdim=True)
    torch.testing.assert_close(objective.centre.center, moved, rtol=1e-12, atol=1e-14)


def test_nothing_masked_costs_nothing_and_moves_nothing() -> None:
    masked = Masked.of(torch.zeros(2, 2, 4, dtype=torch.bool))
    student = torch.zeros(0, K, dtype=torch.float64, requires_grad=True)
    objective = ibot()
    terms = objective(
        Outputs([], {"ibot": student * 1}, masked),
        Outputs([], {"ibot": student.detach()}, masked),
        {"teacher_temp": 0.07},
    )
    terms.losses["ibot"].backward()
    objective.step(torch.tensor(True))
    assert float(terms.losses["ibot"]) == 0 and student.grad is not None and student.grad.shape == (0, K)
    assert float(terms.diagnostics["ibot_entropy"]) == 0
    assert torch.equal(objective.centre.center, torch.zeros(1, K, dtype=torch.float64))


@pytest.mark.parametrize("overwrite", [False, True])
def test_masked_loss_gradient_by_differences(overwrite: bool) -> None:
    weights = torch.rand(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets = F.softmax(random(5, K, seed=1), dim=-1)

    def loss(logits: Tensor) -> Tensor:
        return masked_loss(logits * 1, targets, weights, 0.1, overwrite=overwrite)

    assert torch.autograd.gradcheck(loss, random(5, K).div(4).requires_grad_(), rtol=1e-4)


def test_masked_tokens_are_gathered_in_the_order_of_the_masks() -> None:
    mask = masks()
    patches = random(4, 3, 6, 5)  # (V, B, N, D); the last two views are not global
    expected = torch.cat([patches[view, sample][mask[sample, view]] for view in range(2) for sample in range(3)])
    assert torch.equal(Masked.of(mask).gather(patches), expected)


def regressed(masked: Masked, predicted: Tensor, patches: Tensor) -> tuple[Tensor, float]:
    """Loss and diagnostic of given predictions (M, D) and the teacher's tokens (G, B, N, D)."""
    objective = Regression(ObjectiveConfig(regression=1.0), seed=0)
    teacher = Outputs([Tokens(patches[:, :, 0], None, patches)], {}, masked)
    terms = objective(Outputs([], {"regression": predicted}, masked), teacher, {})
    return terms.losses["regression"], float(terms.diagnostics["regression_variance"])


def test_regression_is_the_smooth_distance_to_the_normed_tokens_at_the_masked_places() -> None:
    mask = masks()
    masked = Masked.of(mask)
    predicted = random(int(mask.sum()), 5).mul(2).requires_grad_()
    patches = random(2, 3, 6, 5, seed=1).mul(3).add(1)
    loss, variance = regressed(masked, predicted, patches)
    (found,) = torch.autograd.grad(loss, predicted)

    rows = iter(range(len(predicted)))
    total, spread = torch.zeros((), dtype=torch.float64), 0.0
    for view in range(2):
        for sample in range(3):
            losses, targets = [], []
            for place in mask[sample, view].nonzero()[:, 0].tolist():
                token = patches[view, sample, place]
                target = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
                distance = (predicted[next(rows)] - target).abs()
                losses.append(torch.where(distance < 1, distance.square() / 2, distance - 0.5).mean())
                targets.append(target)
            if losses:
                total = total + torch.stack(losses).mean() / 6
                spread += float(torch.stack(targets).var(0, unbiased=False).mean()) / 6
    (expected,) = torch.autograd.grad(total, predicted)
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert variance == pytest.approx(spread / 0.5, abs=1e-4)  # half of the views are masked; the norm has an epsilon

    # Tokens that are not masked, such as cells without tissue, do not count.
    there = patches.clone().masked_fill_(~masked.mask[..., None], torch.nan)
    assert regressed(masked, predicted, there) == (loss, variance)
    same = patches[:, :, :1].expand_as(patches)
    assert regressed(masked, predicted, same)[1] == pytest.approx(0, abs=1e-4)  # collapsed


def test_regression_of_nothing_is_zero() -> None:
    masked = Masked.of(torch.zeros(2, 2, 4, dtype=torch.bool))
    predictor, patches = Predictor(6, 6, depth=1).double(), random(2, 2, 4, 6).requires_grad_()
    loss, variance = regressed(masked, predictor(*masked.gather_views(patches)), patches.detach())
    loss.backward()
    assert float(loss) == 0 == variance and torch.equal(patches.grad, torch.zeros_like(patches))  # type: ignore[arg-type]
    assert all(p.grad is not None and not p.grad.any() for p in predictor.parameters())


def test_the_predictor_is_a_transformer_on_the_masked_views() -> None:
    """Attention, MLP and norms written out, view by view."""
    mask, patches = masks(), random(4, 3, 6, 5)  # the last two views are not global
    masked = Masked.of(mask)
    predictor = Predictor(5, 8, depth=2, seed=1).double()
    weights = {name: 5 * value for name, value in predictor.state_dict().items()}
    predictor.load_state_dict(weights)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    expected = []
    for view in range(2):
        for sample in range(3):
            x = linear(patches[view, sample], "embed")
            for block in ("blocks.0", "blocks.1"):
                query, key, value = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").split(8, -1)
                x = x + linear((query @ key.T / 8**0.5).softmax(-1) @ value, f"{block}.attn.proj")
                x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
            expected.append(linear(norm(x, "norm"), "proj")[mask[sample, view]])
    torch.testing.assert_close(predictor(*masked.gather_views(patches)), torch.cat(expected), rtol=1e-10, atol=1e-12)


def test_gradient_of_regression_by_differences() -> None:
    masked, teacher = Masked.of(masks(2, 3)), random(2, 2, 3, 4, seed=1)
    predictor = Predictor(4, 4, depth=1).double()

    def loss(patches: Tensor) -> Tensor:
        return regressed(masked, Regression.project(predictor, [Tokens(patches, None, patches)], masked), teacher)[0]

    assert torch.autograd.gradcheck(loss, random(2, 2, 3, 4).requires_grad_())


def test_the_predictor_is_given_by_its_seed_and_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    first, again, other = (Predictor(6, 6, depth=1, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert [Predictor(4, width, 1).blocks[0].attn.num_heads for width in (8, 96, 128, 200)] == [1, 1, 2, 2]  # type: ignore[union-attr]


def published_sinkhorn(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """The algorithm as the papers print it, on (N, K), with all matrices written out."""
    q = (logits / temp).exp().T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * prototypes
        q /= q.sum(0, keepdim=True) * samples
    return (q * samples).T


def test_sinkhorn_is_the_published_algorithm_over_all_micro_batches() -> None:
    logits = random(14, K).div(4)
    expected = published_sinkhorn(logits, 0.05)
    parts = [logits[:4].clone().view(2, 2, K), logits[4:4].clone(), logits[4:].clone().view(2, 5, K)]
    targets = SinkhornKnopp()
    targets.prepare(parts, 0.05)
    found = torch.cat([part.flatten(0, -2) for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(found.sum(-1), torch.ones(14, dtype=torch.float64))
    _, entropies = targets.targets(found, 0.05)
    torch.testing.assert_close(entropies, -(expected * expected.log()).sum(-1))


def test_sinkhorn_does_not_overflow_where_logits_are_large() -> None:
    logits = random(6, K).float() * 20
    targets = SinkhornKnopp()
    targets.prepare([logits], 1.0)
    assert torch.isfinite(logits).all()


def unit(groups: Tensor) -> Tensor:
    return F.normalize(groups, dim=-1)


def test_koleo_is_the_logarithm_of_the_nearest_distance() -> None:
    x = random(2, 5, 7).requires_grad_()
    (found,) = torch.autograd.grad(koleo(unit(x)), x)
    total = torch.zeros((), dtype=torch.float64)
    for group in unit(x):
        for i in range(5):
            distances = torch.stack([(group[i] - group[j]).square().sum().sqrt() for j in range(5) if j != i])
            total = total - (distances.min() + 1e-8).log() / 10
    (expected,) = torch.autograd.grad(total, x)
    assert float(koleo(unit(x))) == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_koleo_takes_no_copy_of_an_image_for_its_neighbour() -> None:
    x = random(1, 4, 7)
    x[0, 1] = x[0, 0] * (1 + 1e-9)
    x.requires_grad_()
    loss = koleo(unit(x))
    loss.backward()
    assert torch.isfinite(loss) and float(loss) < 1 and x.grad is not None and float(x.grad.abs().max()) < 10
    same = torch.ones(1, 3, 7, dtype=torch.float64, requires_grad=True)  # no sample has a neighbour
    koleo(unit(same)).backward()
    assert float(koleo(unit(same))) == 0 and same.grad is not None and torch.isfinite(same.grad).all()


def test_kde_is_the_logarithm_of_the_kernel_density_and_its_descent_spreads() -> None:
    x = random(2, 5, 7).add(1.0).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for group in unit(x):
        for i in range(5):
            kernels = torch.stack([(10 * group[i] @ group[j]).exp() for j in range(5) if j != i])
            total = total + kernels.mean().log() / 10
    (expected,) = torch.autograd.grad(total, x)
    (found,) = torch.autograd.grad(kde(unit(x), 10.0), x)
    assert float(kde(unit(x), 10.0)) == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    def mean_cosine(y: Tensor) -> float:
        return float((unit(y) @ unit(y).transpose(1, 2)).sum() - 10) / 40

    assert mean_cosine(x - 0.1 * found) < mean_cosine(x)


@pytest.mark.parametrize(
    "make", [lambda size, batch: KoLeo(0.1, size, batch), lambda size, batch: KDE(0.1, 10.0, size, batch)]
)
def test_spreading_terms_compare_groups_of_consecutive_samples(make) -> None:
    cls = random(3, 8, 6)

    def loss(rows: slice, batch: int) -> float:
        tokens = [Tokens(cls[:, rows])]
        terms = make(4, batch)(Outputs(tokens, {}), Outputs(tokens, {}), {})
        (value,) = terms.losses.values()
        return float(value)

    assert loss(slice(0, 8), 8) == pytest.approx((loss(slice(0, 4), 4) + loss(slice(4, 8), 4)) / 2, rel=1e-12)
    with pytest.raises(ConfigError, match="nearest is 4"):
        make(4, 1)


def test_bad_settings_of_the_predictor_are_refused() -> None:
    for changes in ({"predictor_width": 0}, {"predictor_depth": 0}):
        with pytest.raises(ConfigError, match="of at least 1, found 0"):
            Regression(ObjectiveConfig(regression=1.0, **changes), seed=0)


def test_bad_settings_of_ibot_are_refused() -> None:
    for changes in (
        {"ibot_head": "both"},
        {"targets": "softmax"},
        {"ibot_out_dim": 7},
        {"ibot_head": "separate", "ibot_out_dim": 1},
    ):
        with pytest.raises(ConfigError):
            ibot(**changes)
    assert ibot(ibot_head="separate", ibot_out_dim=7).centre.center.shape == (1, 7)
    assert ibot().head == "head" and ibot(ibot_head="separate").head == "ibot_head"
