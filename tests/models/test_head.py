"""DINO's head and its last layer against torch's own weight normalisation and numerical derivatives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from dino.models import head as head_module
from dino.models.head import DINOHead, WeightNormLinear


def test_equals_torchs_weight_norm() -> None:
    head = DINOHead(12, 30, hidden_dim=16, bottleneck_dim=8, norm_last_layer=False).double()
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    last = parametrizations.weight_norm(nn.Linear(8, 30, bias=False).double())
    last.parametrizations.weight.original0.data.copy_(head.last_layer.weight_g)
    last.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v)
    x = torch.randn(5, 12, dtype=torch.float64)
    hidden = head.mlp(x)
    expected = last(hidden / hidden.norm(dim=-1, keepdim=True))
    found = head(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradient = last.parametrizations.weight.original1.grad
    torch.testing.assert_close(head.last_layer.weight_v.grad, gradient, rtol=0, atol=1e-10)


def test_start_and_names_are_dinos() -> None:
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    head, again, other = (DINOHead(64, 500, 128, 32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.randn(3), expected)
    names = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(head.state_dict()) == [*names, "last_layer.weight_g", "last_layer.weight_v"]
    assert head.last_layer.weight_g.shape == (500, 1) and head.last_layer.weight_v.shape == (500, 32)
    assert not head.last_layer.weight_g.requires_grad and (head.last_layer.weight_g == 1).all()
    assert abs(head.mlp[2].weight.std().item() - 0.02) < 6e-4 and head.mlp[2].bias.abs().sum() == 0
    assert abs(head.last_layer.weight_v.std().item() - (3 * 32) ** -0.5) < 2e-3
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(head.last_layer.weight_v, other.last_layer.weight_v)


def test_logits_are_fp32_under_autocast() -> None:
    head = DINOHead(12, 30, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(torch.randn(4, 12))
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_batch_norm_sits_after_the_hidden_layers(norm_last_layer: bool) -> None:
    head = DINOHead(12, 30, 16, 8, use_bn=True, norm_last_layer=norm_last_layer)
    assert [type(layer).__name__ for layer in head.mlp] == [*["Linear", "BatchNorm1d", "GELU"] * 2, "Linear"]
    assert head.last_layer.weight_g.requires_grad is not norm_last_layer
    head(torch.randn(4, 12)).sum().backward()


def layer(rows: int = 30, dim: int = 8) -> WeightNormLinear:
    generator = torch.Generator().manual_seed(0)
    made = WeightNormLinear(dim, rows).double()
    with torch.no_grad():
        made.weight_v.copy_(torch.randn(rows, dim, generator=generator))
        made.weight_g.copy_(0.5 + torch.rand(rows, 1, generator=generator))
    return made


@pytest.mark.parametrize("rows_at_a_time", [7, 30, 4096])
def test_values_and_all_gradients_equal_torchs(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(head_module, "ROWS", rows_at_a_time)
    ours = layer()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    inputs = [x, ours.weight_g, ours.weight_v]
    expected = F.linear(x, torch._weight_norm(ours.weight_v, ours.weight_g, 0))
    found = ours(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_gradients_are_the_numerical_ones():
    ours = layer(6, 3)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head_module._WeightNormLinear.apply, (x, ours.weight_g, ours.weight_v))


def test_a_fixed_length_has_no_gradient_and_a_row_of_zeros_gives_zeros():
    ours = layer()
    ours.weight_g.requires_grad_(False)
    with torch.no_grad():
        ours.weight_v[3] = 0
    found = ours(torch.randn(5, 8, dtype=torch.float64))
    found.sum().backward()
    assert ours.weight_g.grad is None
    assert (found[:, 3] == 0).all() and ours.weight_v.grad.isfinite().all()


def test_the_incoming_gradient_is_left_as_it_is():
    ours = layer()
    upstream = torch.randn(5, 30, dtype=torch.float64)
    before = upstream.clone()
    ours(torch.randn(5, 8, dtype=torch.float64)).backward(upstream)
    assert torch.equal(upstream, before)
