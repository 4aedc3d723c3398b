import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from dino.config.schema import OptimConfig
from dino.errors import ConfigError
from dino.models.backbone import build_backbone
from dino.models.spec import BackboneSpec
from dino.train.optimizer import (
    Cosine,
    Length,
    Ramp,
    build_optimizer,
    clip_gradients,
    gated_step,
    parameter_groups,
    scaled_lr,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def fill_gradients(module: nn.Module, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_only_matrices_decay() -> None:
    decayed, fixed = parameter_groups(network(), OptimConfig())
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 6), (3, 5)]
    assert all(p.ndim == 1 for p in fixed["params"]) and fixed["weight_decay"] == 0


def student(depth: int = 3) -> nn.Module:
    module = nn.Module()
    module.backbone = build_backbone(BackboneSpec(f"vit:dim=8,depth={depth},heads=2", "patch", 3, (32, 32), 16), seed=0)
    module.backbone.add_mask_token()
    module.head = nn.Linear(8, 4)
    return module


def test_layer_decay_is_that_of_timm() -> None:
    """timm implements it by itself; the patch embedding's factor comes on top, and the final norm is not a block's."""
    module, optim = student(), OptimConfig(layer_decay=0.7, patch_embed_lr_factor=0.2)
    groups = parameter_groups(module, optim)
    factors = {id(parameter): group["lr_factor"] for group in groups for parameter in group["params"]}
    found = {name: factors[id(parameter)] for name, parameter in module.named_parameters()}

    published = copy.deepcopy(module.backbone.vit)
    published.reset_classifier(4)  # timm counts the head as a layer
    names = {id(parameter): name for name, parameter in published.named_parameters()}
    for group in param_groups_layer_decay(published, layer_decay=0.7):
        for name in (names[id(parameter)] for parameter in group["params"]):
            if not name.startswith(("norm.", "head.")):
                factor = 0.2 if name.startswith("patch_embed.") else 1.0
                assert found[f"backbone.vit.{name}"] == pytest.approx(group["lr_scale"] * factor), name
    assert found["backbone.mask_token"] == pytest.approx(0.7**4)
    assert found["head.weight"] == found["backbone.vit.norm.weight"] == 1


def test_the_step_scales_the_learning_rate_of_each_group() -> None:
    module, optim = student().double(), OptimConfig(layer_decay=0.5, beta2=0.99)
    fill_gradients(module)
    optimizer = build_optimizer(optim, module)
    before = copy.deepcopy(module)
    gated_step(optimizer, 0.01, 0.0, torch.tensor(True))
    assert all(group["betas"] == (0.9, 0.99) for group in optimizer.param_groups)
    # The first step of Adam moves every weight by the learning rate, whatever its gradient.
    for block, factor in enumerate((0.125, 0.25, 0.5)):
        name = f"backbone.vit.blocks.{block}.mlp.fc1.weight"
        moved = (module.get_parameter(name) - before.get_parameter(name)).abs()
        assert torch.allclose(moved, torch.full_like(moved, 0.01 * factor), rtol=1e-4)


def test_weight_decay_on_all() -> None:
    (group,) = parameter_groups(student(), OptimConfig(weight_decay_on="all"))
    assert group["decays"] and len(group["params"]) == len(list(student().parameters()))


def test_groups_of_an_old_checkpoint_have_no_factors() -> None:
    module = student().double()
    optimizer = build_optimizer(OptimConfig(), module)
    assert [group["decays"] for group in optimizer.param_groups] == [True, False]
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["lr_factor"]
    optimizer.load_state_dict(state)
    fill_gradients(module)
    gated_step(optimizer, 0.01, 0.1, torch.tensor(True))
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 0.004 * 64 / 256), ("sqrt", 0.004 * (64 / 1024) ** 0.5)])
def test_learning_rate_follows_the_global_batch(scaling: str, expected: float) -> None:
    assert scaled_lr(OptimConfig(lr=0.004, lr_scaling=scaling), 64) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_decay": 0.0}, "expected optim.layer_decay above 0 and at most 1, found 0.0"),
        ({"patch_embed_lr_factor": 1.5}, "expected optim.patch_embed_lr_factor above 0 and at most 1, found 1.5"),
        ({"weight_decay_on": "matrices"}, "expected optim.weight_decay_on weights or all, found 'matrices'"),
        ({"beta2": 1.0}, "expected optim.beta2 between 0 and 1, found 1.0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_optimizer(OptimConfig(**settings), student())


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(ConfigError, match="linear or sqrt, found 'cubic'"):
        scaled_lr(OptimConfig(lr_scaling="cubic"), 64)


@pytest.mark.parametrize("mode", ["per_parameter", "global"])
def test_clipping_follows_its_formula(mode: str) -> None:
    module = network()
    fill_gradients(module, 3.0)
    before = [p.grad.clone() for p in module.parameters()]
    total = torch.cat([g.flatten() for g in before]).norm()
    norm, finite = clip_gradients(module.parameters(), 2.0, mode)
    assert norm == pytest.approx(float(total), rel=1e-12) and bool(finite)
    for old, parameter in zip(before, module.parameters(), strict=True):
        own = total if mode == "global" else old.norm()
        assert torch.allclose(parameter.grad, old * min(1.0, 2.0 / (float(own) + 1e-6)), rtol=1e-12, atol=0)


def test_no_clipping_at_zero() -> None:
    module = network()
    fill_gradients(module, 100.0)
    before = [p.grad.clone() for p in module.parameters()]
    clip_gradients(module.parameters(), 0.0, "global")
    assert all(torch.equal(old, p.grad) for old, p in zip(before, module.parameters(), strict=True))


def test_adamw_step_equals_its_formula() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in double precision; biases do not decay."""
    module = network()
    weight = module[0].weight.detach().clone()
    fill_gradients(module)
    gradient = module[0].weight.grad.clone()
    optimizer = build_optimizer(OptimConfig(), module)
    gated_step(optimizer, 0.01, 0.1, torch.tensor(True))
    first, second = 0.1 * gradient / (1 - 0.9), 0.001 * gradient**2 / (1 - 0.999)
    expected = weight * (1 - 0.01 * 0.1) - 0.01 * first / (second.sqrt() + 1e-8)
    assert torch.allclose(module[0].weight, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    module = network()
    optimizer = build_optimizer(OptimConfig(name=name), module)
    fill_gradients(module)
    gated_step(optimizer, 0.1, 0.1, torch.tensor(True))
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    fill_gradients(module)
    module[2].weight.grad[0, 0] = float("nan")
    _, finite = clip_gradients(module.parameters(), 3.0, "per_parameter")
    gated_step(optimizer, 0.1, 0.1, finite)
    assert not finite
    assert all(torch.equal(weights[k], v) for k, v in module.state_dict().items())
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[k], state[index][k]) for k in values if isinstance(values[k], torch.Tensor))


def test_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="adamw or sgd, found 'lion'"):
        build_optimizer(OptimConfig(name="lion"), network())


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
