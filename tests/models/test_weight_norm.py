"""The scaled linear layer against torch's own weight normalisation, and against numerical derivatives."""

import pytest
import torch
from torch.nn import functional as F

from dino.models import weight_norm
from dino.models.weight_norm import WeightNormLinear


def layer(rows: int = 30, dim: int = 8) -> WeightNormLinear:
    generator = torch.Generator().manual_seed(0)
    made = WeightNormLinear(dim, rows).double()
    with torch.no_grad():
        made.weight_v.copy_(torch.randn(rows, dim, generator=generator))
        made.weight_g.copy_(0.5 + torch.rand(rows, 1, generator=generator))
    return made


@pytest.mark.parametrize("rows_at_a_time", [7, 30, 4096])
def test_values_and_all_gradients_equal_torchs(monkeypatch, rows_at_a_time):
    monkeypatch.setattr(weight_norm, "ROWS", rows_at_a_time)
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
    assert torch.autograd.gradcheck(weight_norm._WeightNormLinear.apply, (x, ours.weight_g, ours.weight_v))


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
