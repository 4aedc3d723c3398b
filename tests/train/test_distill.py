import copy

import pytest
import torch

from dino.models.backbone import BackboneSpec, build_backbone
from dino.models.head import DINOHead
from dino.train.distill import DINO, Network, SelfDistillation

K = 16


def model(out_dim: int = K) -> SelfDistillation:
    backbone = build_backbone(BackboneSpec("vit:dim=32,depth=2,heads=2", "patch", 3, (32, 32), 16), seed=0)
    student = Network(backbone, {"head": DINOHead(32, out_dim, 24, 8, seed=1)}).double()
    return SelfDistillation(student, copy.deepcopy(student), [DINO(out_dim, 0.1, 0.9).double()], torch.device("cpu"))


def views(batch: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 32), (3, 16)]
    return [torch.randn(v, batch, 3, s, s, generator=generator, dtype=torch.float64) for v, s in sizes]


def test_logits_come_in_the_order_of_the_views() -> None:
    network = model().student
    groups = views()
    logits = network(groups)["head"]
    assert logits.shape == (5, 3, K)
    alone = network([groups[1][2:3, 1:2]])["head"]
    assert torch.allclose(logits[4, 1], alone[0, 0], rtol=1e-10)


def test_drop_path_multipliers_reach_their_view_and_sample() -> None:
    network = model().student
    groups = views()
    keep = torch.ones(3, 5, 2, 2, dtype=torch.float64)
    keep[1, 3] = 0  # sample 1 of view 3 skips every branch
    changed = (network(groups, keep)["head"] - network(groups)["head"]).abs().amax(-1) > 1e-9  # (V, B)
    expected = torch.zeros(5, 3, dtype=torch.bool)
    expected[3, 1] = True
    assert torch.equal(changed, expected)


def test_teacher_is_the_moving_average_and_gets_no_gradient() -> None:
    both = model()
    loss, _, features = both.accumulate(views(), None, 0.04, share=1.0, last=True)
    assert loss.requires_grad is False and features.shape == (3, 32)
    assert torch.allclose(features, both.teacher.backbone(views()[0][0]).cls, rtol=1e-10)
    assert all(p.grad is None for p in both.teacher.parameters())
    assert all(p.grad is not None for p in both.student.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in both.student.parameters():
            parameter.add_(0.1)
    before = [p.clone() for p in both.teacher.parameters()]
    both.update_teacher(0.99, torch.tensor(True))
    for old, new, student in zip(before, both.teacher.parameters(), both.student.parameters(), strict=True):
        assert torch.allclose(new, 0.99 * old + 0.01 * student, rtol=1e-12)


def test_a_step_that_is_not_finite_moves_neither_teacher_nor_centre() -> None:
    both = model()
    both.accumulate(views(), None, 0.04, share=1.0, last=True)
    with torch.no_grad():
        for parameter in both.student.parameters():
            parameter.add_(0.1)
    before = copy.deepcopy((both.teacher.state_dict(), both.objectives[0].state_dict()))
    both.update_teacher(0.9, torch.tensor(False))
    for old, new in zip(before, (both.teacher.state_dict(), both.objectives[0].state_dict()), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_accumulated_gradients_and_centre_equal_those_of_the_whole_batch() -> None:
    whole, parts = model(), model()
    groups = views(batch=4)
    whole.accumulate(groups, None, 0.04, share=1.0, last=True)
    for first in (0, 2):
        parts.accumulate([g[:, first : first + 2] for g in groups], None, 0.04, share=0.5, last=first == 2)
    pairs = zip(whole.student.named_parameters(), parts.student.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-12) for (_, a), b in pairs if a.grad is not None)
    for both in (whole, parts):
        both.update_teacher(0.99, torch.tensor(True))
    assert torch.allclose(whole.objectives[0].centre.center, parts.objectives[0].centre.center, rtol=1e-12)


def test_freezing_drops_the_gradients_of_the_last_layer_alone() -> None:
    both = model()
    both.accumulate(views(), None, 0.04, share=1.0, last=True)
    both.freeze_last_layer()
    without = {name for name, p in both.student.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {"head.last_layer.weight_v"}


def test_names_are_those_of_dino_and_load_back() -> None:
    both = model()
    state = both.teacher.published_state()
    assert {"backbone.cls_token", "backbone.blocks.0.attn.qkv.weight", "head.last_layer.weight_v"} <= set(state)
    assert not any(".vit." in name for name in state)
    other = model()
    with torch.no_grad():
        next(other.teacher.parameters()).add_(1)
    other.teacher.load_published(state)
    assert all(torch.equal(a, b) for a, b in zip(both.teacher.parameters(), other.teacher.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.teacher.load_published({k: v for k, v in state.items() if "cls_token" not in k})
