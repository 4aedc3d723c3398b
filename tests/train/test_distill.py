import copy
from collections.abc import Sequence

import pytest
import torch
from second_objective import Regression
from torch import Tensor

from dino.config.schema import ModelConfig
from dino.models.backbone import BackboneSpec, build_backbone
from dino.objectives import Inputs, Objective
from dino.objectives.cross_entropy import dino_loss
from dino.objectives.dino import DINO
from dino.objectives.targets import Centre
from dino.train.distill import Accumulated, Network, SelfDistillation

K = 16
VALUES = {"teacher_temp": 0.04}


def dino(out_dim: int = K) -> DINO:
    return DINO(ModelConfig(out_dim=out_dim, hidden_dim=24, bottleneck_dim=8), lambda step: 0.04 + step, seed=1)


def model(objectives: Sequence[Objective] = ()) -> SelfDistillation:
    backbone = build_backbone(BackboneSpec("vit:dim=32,depth=2,heads=2", "patch", 3, (32, 32), 16), seed=0)
    objectives = objectives or [dino()]
    student = Network(backbone, objectives).double()
    return SelfDistillation(student, copy.deepcopy(student), [o.double() for o in objectives], torch.device("cpu"))


def accumulate(both: SelfDistillation, groups: list[Tensor], fraction: float = 1.0, last: bool = True) -> Accumulated:
    return both.accumulate(Inputs(groups), VALUES, fraction=fraction, last=last)


def views(batch: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 32), (3, 16)]
    return [torch.randn(v, batch, 3, s, s, generator=generator, dtype=torch.float64) for v, s in sizes]


def test_logits_are_in_the_order_of_the_views() -> None:
    network = model().student
    groups = views()
    outputs = network(groups)
    assert outputs.logits["dino"].shape == (5, 3, K)
    assert [group.cls.shape for group in outputs.tokens] == [(2, 3, 32), (3, 3, 32)]
    alone = network([groups[1][2:3, 1:2]])
    assert torch.allclose(outputs.logits["dino"][4, 1], alone.logits["dino"][0, 0], rtol=1e-10)
    assert torch.allclose(outputs.tokens[1].cls[2, 1], alone.tokens[0].cls[0, 0], rtol=1e-10)


def test_drop_path_multipliers_reach_their_view_and_sample() -> None:
    network = model().student
    groups = views()
    keep = torch.ones(3, 5, 2, 2, dtype=torch.float64)
    keep[1, 3] = 0  # sample 1 of view 3 skips every branch
    kept, whole = network(groups, keep).logits["dino"], network(groups).logits["dino"]
    expected = torch.zeros(5, 3, dtype=torch.bool)
    expected[3, 1] = True
    assert torch.equal((kept - whole).abs().amax(-1) > 1e-9, expected)  # (V, B)


def test_teacher_is_the_moving_average_and_gets_no_gradient() -> None:
    both = model()
    found = accumulate(both, views())
    assert found.loss.requires_grad is False and found.features.shape == (3, 32)
    assert torch.allclose(found.features, both.teacher.backbone(views()[0][0]).cls, rtol=1e-10)
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
    accumulate(both, views())
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
    accumulate(whole, groups)
    for first in (0, 2):
        accumulate(parts, [g[:, first : first + 2] for g in groups], 0.5, last=first == 2)
    pairs = zip(whole.student.named_parameters(), parts.student.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-12) for (_, a), b in pairs if a.grad is not None)
    for both in (whole, parts):
        both.update_teacher(0.99, torch.tensor(True))
    centres = [both.objectives[0].state_dict()["centre.center"] for both in (whole, parts)]
    assert torch.allclose(*centres, rtol=1e-12)


def test_the_objective_is_the_loss_of_both_networks_logits() -> None:
    both = model()
    groups = views()
    with torch.no_grad():
        student, teacher = both.student(groups).logits["dino"], both.teacher(groups[:1]).logits["dino"]
    targets, entropy = Centre(K, 0.9).double().targets(teacher, 0.04)
    found = accumulate(both, groups, 0.25)
    assert torch.equal(found.loss, 0.25 * dino_loss(student, targets, 0.1))
    assert found.losses.keys() == {"dino"} and torch.equal(found.losses["dino"], found.loss)
    assert torch.equal(found.diagnostics["teacher_entropy"], 0.25 * entropy.mean())
    assert both.scheduled(3) == {"teacher_temp": 3.04}
    numbers = dino(2).log_values({"loss/dino": 1.0, "teacher_entropy": 0.5})
    assert numbers == pytest.approx(
        {"loss_relative": 1.0 / 0.6931471805599453, "teacher_entropy_relative": 0.5 / 0.6931471805599453}
    )


def test_objectives_add_up_with_their_weights_and_have_heads_of_their_own() -> None:
    alone, both = model(), model([dino(), Regression()])
    names = [name for name, _ in both.student.named_parameters()]
    assert [name for name, _ in alone.student.named_parameters()] == [n for n in names if "projection" not in n]
    assert names[-1] == "projection_head.weight"
    with torch.no_grad():
        both.student.get_parameter("projection_head.weight").add_(0.1)  # else both networks project alike
    first, found = accumulate(alone, views()), accumulate(both, views())
    assert found.losses.keys() == {"dino", "distance", "scale"} and found.diagnostics.keys() == {
        "teacher_entropy",
        "steps_seen",
    }
    assert torch.allclose(found.losses["dino"], first.loss, rtol=1e-12)
    assert found.losses["distance"] > 0
    expected = first.loss + 0.5 * (found.losses["distance"] + found.losses["scale"])
    assert torch.allclose(found.loss, expected, rtol=1e-12)
    assert both.student.get_parameter("projection_head.weight").grad is not None
    assert all(p.grad is None for p in both.teacher.parameters())


def test_freezing_drops_the_gradients_of_the_last_layer_alone() -> None:
    both = model()
    accumulate(both, views())
    both.freeze_last_layer()
    without = {name for name, p in both.student.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {"head.last_layer.weight_v"}


def test_freezing_the_backbone_leaves_the_heads() -> None:
    both = model()
    accumulate(both, views())
    both.freeze_backbone()
    with_gradient = {name for name, p in both.student.named_parameters() if p.grad is not None}
    assert with_gradient and all(name.startswith("head.") for name in with_gradient)


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
