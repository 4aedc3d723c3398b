"""Names and shapes of architectures; rules for positions against a bicubic kernel by hand and against known calls."""

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch.nn import functional as F

from dino.errors import ConfigError
from dino.models.backbone import BackboneSpec, build_backbone
from dino.models.spec import SHAPES, arch_of, resampling_matrix, shape_of


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' kernel (1981)."""
    t = abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def axis_by_hand(old: int, new: int, scale: float) -> np.ndarray:
    weights = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) / scale - 0.5
        for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(tap, 0), old - 1)] += cubic(at - tap)
    return weights


@pytest.mark.parametrize("new", [(16, 16), (6, 6), (16, 6)])
@pytest.mark.parametrize("rule", ["dino", "recomputed"])
def test_matrix_is_bicubic_by_hand(rule: str, new: tuple[int, int]) -> None:
    offset = 0.1 if rule == "dino" else 0.0
    rows, columns = (axis_by_hand(14, n, (n + offset) / 14) for n in new)
    matrix = resampling_matrix((14, 14), new, rule)
    np.testing.assert_allclose(matrix.numpy(), np.kron(rows, columns), atol=1e-12)


def test_rules_differ_where_they_should() -> None:
    given, recomputed = (resampling_matrix((14, 14), (16, 16), rule) for rule in ("dino", "recomputed"))
    assert (given - recomputed).abs().max() > 1e-3


@pytest.mark.parametrize("rule", ["dino", "recomputed", "timm"])
def test_native_size_is_the_identity(rule: str) -> None:
    assert torch.equal(resampling_matrix((3, 5), (3, 5), rule), torch.eye(15, dtype=torch.float64))


def backbone(rule: str, size: int = 14, dtype: torch.dtype = torch.float64):
    spec = BackboneSpec("vit:dim=24,depth=1,heads=2", "patch", 3, (size * 4, size * 4), 4, rule)
    return build_backbone(spec, 0).to(dtype)


@pytest.mark.parametrize("new", [(16, 16), (6, 6), (7, 11)])
def test_dino_rule_is_the_call_of_facebookresearch_dino(new: tuple[int, int]) -> None:
    model = backbone("dino")
    table = model.vit.pos_embed.detach()
    grid = table[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    scale = ((new[0] + 0.1) / 14, (new[1] + 0.1) / 14)
    expected = F.interpolate(grid, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    found = model.positions(new)
    torch.testing.assert_close(found[:, 1:], expected, rtol=0, atol=1e-14)
    assert torch.equal(found[:, :1], table[:, :1])


def test_timm_rule_is_timms() -> None:
    model = backbone("timm", dtype=torch.float32)
    expected = resample_abs_pos_embed(model.vit.pos_embed, new_size=[6, 9], old_size=[14, 14])
    torch.testing.assert_close(model.positions((6, 9)), expected, rtol=0, atol=1e-7)


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="dino, recomputed, timm"):
        resampling_matrix((14, 14), (6, 6), "bilinear")


def test_table_gets_its_gradient_at_every_size_and_matrices_survive_inference_mode() -> None:
    model = backbone("dino", size=4)
    x = torch.randn(2, 3, 24, 12, dtype=torch.float64)
    with torch.inference_mode():
        before = model(x).cls
    model(x).cls.square().sum().backward()
    assert (model.vit.pos_embed.grad[0].abs().sum(-1) > 0).all()
    with torch.no_grad():  # a trained table is seen at once: the matrix is kept, not its product
        model.vit.pos_embed.mul_(3)
    assert not torch.allclose(before, model(x).cls)


def test_positions_stay_exact_under_autocast() -> None:
    model = backbone("dino", dtype=torch.float32)
    plain = model.positions((16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.positions((16, 16)), plain)


NARROW = "vit:dim=24,depth=3,heads=2"
VARIANTS = [
    NARROW,
    NARROW + ",registers=3",
    NARROW + ",layer_scale=0.3",
    NARROW + ",registers=2,layer_scale=0.5,no_embed_class=1,mlp_ratio=2.0",
]


@pytest.mark.parametrize(
    ("arch", "dim", "depth", "heads"),
    [("vit_tiny", 192, 12, 3), ("vit_small", 384, 12, 6), ("vit_base", 768, 12, 12), ("vit_large", 1024, 24, 16)],
)
def test_named_shapes(arch: str, dim: int, depth: int, heads: int) -> None:
    shape = SHAPES[arch]
    assert (shape.dim, shape.depth, shape.heads) == (dim, depth, heads)
    assert arch_of(shape, "patch") == arch


@pytest.mark.parametrize("arch", VARIANTS)
def test_a_shape_is_found_again_from_its_name(arch: str) -> None:
    shape = shape_of(arch)
    assert shape is not None
    assert shape_of(arch_of(shape, "patch")) == shape


def test_spec_survives_plain_values() -> None:
    spec = BackboneSpec("vit_tiny", "patch", 3, (224, 96), 16, "timm")
    assert BackboneSpec.from_dict(spec.to_dict()) == spec
