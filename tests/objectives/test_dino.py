"""The loss against the paper's pairwise sum in float64, the centre against its own formula."""

import math

import pytest
import torch
from torch import Tensor

from dino.errors import ConfigError
from dino.objectives import pieces
from dino.objectives.cross_entropy import dino_loss
from dino.objectives.targets import Centre


def pairwise(student: Tensor, targets: Tensor, temp: float) -> Tensor:
    """Caron et al. 2021, algorithm 1 with multi-crop: the mean of H(teacher view, student view) over the pairs."""
    terms = []
    for t, target in enumerate(targets):
        for v, logits in enumerate(student):
            if v != t:
                terms.append(-(target * (logits / temp).log_softmax(-1)).sum(-1).mean())
    return torch.stack(terms).mean()


def example(views: int, teacher_views: int, batch: int = 4, prototypes: int = 33, scale: float = 1.0):
    generator = torch.Generator().manual_seed(views * 10 + teacher_views)
    student = torch.randn(views, batch, prototypes, generator=generator, dtype=torch.float64) * scale
    logits = torch.randn(teacher_views, batch, prototypes, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), (logits / 0.3).softmax(-1)


@pytest.mark.parametrize(("views", "teacher_views"), [(10, 2), (2, 2), (3, 1), (5, 4), (2, 1)])
@pytest.mark.parametrize("temp", [0.1, 1.0])
def test_value_and_gradient_equal_the_pairwise_sum_to_1e_12(views, teacher_views, temp):
    student, targets = example(views, teacher_views)
    expected = pairwise(student, targets, temp)
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    found = dino_loss(student, targets, temp)
    (gradient,) = torch.autograd.grad(3 * found, student)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert (gradient - expected_gradient).abs().max() < 1e-12


def test_two_and_eight_views_are_eighteen_pairs():
    # Uniform student and any targets: every pair gives ln K.
    loss = dino_loss(torch.zeros(10, 3, 50, dtype=torch.float64), torch.full((2, 3, 50), 1 / 50).double(), 0.1)
    assert float(loss) == pytest.approx(math.log(50), abs=1e-12)


def test_overwriting_gives_the_same_and_leaves_the_gradient_in_place_of_the_logits():
    student, targets = example(5, 2)
    expected = dino_loss(student, targets, 0.1)
    (wanted,) = torch.autograd.grad(2 * expected, student)
    logits = student.detach().clone().requires_grad_()
    passed_on = logits * 1  # as a head gives them
    found = dino_loss(passed_on, targets, 0.1, overwrite=True)
    assert torch.equal(found.detach(), expected.detach())
    assert torch.equal(2 * passed_on.detach(), wanted)
    (gradient,) = torch.autograd.grad(2 * found, logits)
    assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cached", [1, 70, 10_000])
def test_pieces_and_threads_do_not_change_the_result(monkeypatch, threads, cached):
    student, targets = example(4, 2, batch=7)
    expected = dino_loss(student, targets, 0.1)
    (wanted,) = torch.autograd.grad(expected, student)
    centre = Centre(33).double()
    spread, entropy = centre.targets(student.detach(), 0.3)
    before = torch.get_num_threads()
    monkeypatch.setattr(pieces, "CACHED_VALUES", cached)
    torch.set_num_threads(threads)
    try:
        found = dino_loss(student, targets, 0.1)
        assert torch.equal(torch.autograd.grad(found, student)[0], wanted)
        again = centre.targets(student.detach(), 0.3)
        assert torch.equal(again[0], spread) and torch.equal(again[1], entropy)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-14)


def test_autocast_leaves_the_precision_alone():
    student, targets = (tensor.float() for tensor in example(10, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = dino_loss(student, targets, 0.1)
    assert float(found.detach()) == float(dino_loss(student, targets, 0.1).detach())


def test_without_gradient_the_logits_stay():
    student, targets = example(4, 2)
    logits = student.detach().clone()
    assert torch.equal(dino_loss(logits, targets, 0.1, overwrite=True), dino_loss(student, targets, 0.1).detach())
    assert torch.equal(logits, student.detach())


def test_gradient_against_finite_differences():
    student, targets = example(4, 2, batch=2, prototypes=5)
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, targets, 0.5), (student,))


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_fp32_is_safe_for_large_logits(scale):
    student, targets = example(10, 2, scale=scale)
    expected = pairwise(student, targets, 0.04)
    single = student.detach().float().requires_grad_()
    loss = dino_loss(single, targets.float(), 0.04)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (gradient,) = torch.autograd.grad(expected, student)
    # A logit of 100 / 0.04 is itself rounded by 1e-4 in fp32.
    assert (single.grad - gradient).abs().max() < 1e-5 * max(1, scale / 10)


def test_fp32_under_autocast_stays_fp32():
    student, targets = example(10, 2)
    plain = dino_loss(student.float(), targets.float(), 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dino_loss(student.float(), targets.float(), 0.04), plain)


def test_input_is_left_as_it_is():
    student, targets = example(3, 2)
    before = student.detach().clone(), targets.clone()
    dino_loss(student, targets, 0.1).backward()
    assert torch.equal(student, before[0]) and torch.equal(targets, before[1])


@pytest.mark.parametrize(("views", "teacher_views"), [(1, 1), (1, 2), (2, 0)])
def test_no_pair_no_loss(views, teacher_views):
    with pytest.raises(ConfigError, match="two different views"):
        dino_loss(torch.zeros(views, 1, 3), torch.zeros(teacher_views, 1, 3), 0.1)


# ------------------------------------------------------------------------------------------------ centre


def test_targets_are_centred_and_sharpened():
    centre = Centre(7).double()
    centre.center.copy_(torch.arange(7.0))
    logits = torch.randn(2, 3, 7, dtype=torch.float64) * 5
    weights = ((logits - torch.arange(7)) / 0.04 - ((logits - torch.arange(7)) / 0.04).amax(-1, keepdim=True)).exp()
    targets, entropy = centre.targets(logits, 0.04)
    assert torch.allclose(targets, weights / weights.sum(-1, keepdim=True), atol=1e-14)
    assert float(entropy.mean()) == pytest.approx(float(torch.special.entr(targets).sum(-1).mean()), rel=1e-12)


@pytest.mark.parametrize("splits", [[12], [4, 4, 4], [1, 2, 9]])
def test_centre_moves_once_per_step_by_the_mean_over_all_micro_batches(splits):
    centre = Centre(5, momentum=0.9).double()
    expected = torch.zeros(1, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        logits = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
        for part in logits.split(splits, dim=1):
            centre.observe(part)
        centre.step(torch.tensor(True))
        expected = 0.9 * expected + 0.1 * logits.reshape(24, 5).mean(0, keepdim=True)
    assert torch.allclose(centre.center, expected, atol=1e-14)


def test_a_non_finite_step_changes_nothing_and_is_forgotten():
    centre = Centre(4, momentum=0.5)
    centre.observe(torch.ones(2, 3, 4))
    centre.step(torch.tensor(True))
    assert torch.equal(centre.center, torch.full((1, 4), 0.5))
    centre.observe(torch.tensor([[[math.nan, math.inf, -math.inf, 1.0]]]))
    centre.step(torch.tensor(False))
    assert torch.equal(centre.center, torch.full((1, 4), 0.5))
    centre.observe(torch.ones(2, 3, 4))
    centre.step(torch.tensor(True))
    assert torch.equal(centre.center, torch.full((1, 4), 0.75))


def test_centre_averages_over_processes_by_how_much_each_has_seen(monkeypatch):
    ours, theirs = torch.randn(2, 4, 6), torch.randn(2, 8, 6)
    sums = torch.cat([theirs.flatten(0, 1).sum(0, keepdim=True), torch.tensor([[16.0]])], dim=1)
    monkeypatch.setattr("dino.distributed.mean_over_ranks", lambda tensor: (tensor + sums) / 2)
    centre = Centre(6, momentum=0.0)
    centre.observe(ours)
    centre.step(torch.tensor(True))
    assert torch.allclose(centre.center, torch.cat([ours, theirs], 1).flatten(0, 1).mean(0, keepdim=True), atol=1e-6)


def test_the_state_dict_holds_the_centre_alone():
    assert list(Centre(3).state_dict()) == ["center"]


def test_a_step_without_logits_leaves_the_centre_as_it_is():
    centre = Centre(3)
    centre.center.fill_(2.0)
    centre.step(torch.tensor(True))
    assert torch.equal(centre.center, torch.full((1, 3), 2.0))


@pytest.mark.parametrize(("logits", "nats"), [([9.0, -1.0, 0.0, 0.0], 0.0), ([0.5] * 4, math.log(4))])
def test_entropy_of_collapsed_teachers(logits, nats):
    _, entropy = Centre(4).targets(torch.tensor([[logits] * 3] * 2), 0.04)
    assert float(entropy.mean()) == pytest.approx(nats, abs=1e-6)


def test_entropy_is_in_full_precision_under_autocast():
    logits = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0))
    _, expected = Centre(100).targets(logits, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Centre(100).targets(logits, 0.1)[1], expected)
