"""The forward pass against timm's own, the cls-only block against the full one, and drop-path masks from outside."""

import copy

import pytest
import timm
import torch
from torch import nn

from dino.errors import ConfigError
from dino.models.backbone import Backbone, BackboneSpec, build_backbone
from dino.models.blocks import mix
from dino.models.spec import SHAPES, arch_of, shape_of

ALL = frozenset({"cls", "patches"})
NARROW = "vit:dim=24,depth=3,heads=2"
VARIANTS = [
    NARROW,
    NARROW + ",registers=3",
    NARROW + ",layer_scale=0.3",
    NARROW + ",registers=2,layer_scale=0.5,no_embed_class=1,mlp_ratio=2.0",
]


def narrow(arch: str = NARROW, level: str = "patch", side: int = 16) -> Backbone:
    patch, dim = (4, 3) if level == "patch" else (1, 5)
    return build_backbone(BackboneSpec(arch, level, dim, (side, side), patch), 0).double()


def images(batch: int = 2, height: int = 16, width: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1)).double()


def masks(batch: int, depth: int) -> torch.Tensor:
    drawn = torch.rand(batch, depth, 2, generator=torch.Generator().manual_seed(2))
    return (drawn > 0.3).double() / 0.7


@pytest.mark.parametrize("arch", VARIANTS)
def test_equals_timm_at_native_size(arch: str) -> None:
    model = narrow(arch)
    expected = model.vit.forward_features(images())
    tokens = model(images(), need=ALL)
    prefix = model.vit.num_prefix_tokens
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens.patches, expected[:, prefix:], rtol=0, atol=1e-12)
    if prefix > 1:
        torch.testing.assert_close(tokens.registers, expected[:, 1:prefix], rtol=0, atol=1e-12)
    else:
        assert tokens.registers is None


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_equals_timm_for_models_made_by_timm(name: str) -> None:
    vit = timm.create_model(name, img_size=64, num_classes=0, dynamic_img_size=True).eval()
    spec = BackboneSpec(name, "patch", 3, (64, 64), 16, "timm")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(Backbone(spec, vit)(x).cls, vit.forward_features(x)[:, 0], rtol=0, atol=2e-5)
    x = torch.randn(2, 3, 96, 32)  # timm's rule for positions, too
    torch.testing.assert_close(Backbone(spec, vit)(x).cls, vit.forward_features(x)[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("arch", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_cls_only_block_is_exact(arch: str, masked: bool) -> None:
    model, x = narrow(arch), images(3, 24, 8)
    keep = masks(3, model.depth) if masked else None
    results = []
    for need in (frozenset({"cls"}), ALL):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        cls = model(leaf, need=need, keep=keep).cls
        (cls * torch.arange(cls.numel()).reshape(cls.shape)).sum().backward()
        results.append((cls, leaf.grad, {name: p.grad for name, p in model.named_parameters()}))
    (short, short_x, short_grads), (full, full_x, full_grads) = results
    torch.testing.assert_close(short, full, rtol=0, atol=1e-12)
    torch.testing.assert_close(short_x, full_x, rtol=1e-9, atol=1e-11)
    for name, gradient in full_grads.items():
        torch.testing.assert_close(short_grads[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


class Given(nn.Module):
    """Stands where timm draws its drop-path masks."""

    def __init__(self, multipliers: torch.Tensor) -> None:
        super().__init__()
        self.multipliers = multipliers

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        return branch * self.multipliers.reshape(-1, 1, 1)


@pytest.mark.parametrize("arch", VARIANTS[1:3])
def test_keep_is_timms_drop_path_with_given_masks(arch: str) -> None:
    model, x = narrow(arch), images(4)
    keep = masks(4, model.depth)
    vit = copy.deepcopy(model.vit)
    for index, block in enumerate(vit.blocks):
        block.drop_path1, block.drop_path2 = Given(keep[:, index, 0]), Given(keep[:, index, 1])
    expected = vit.forward_features(x)[:, 0]
    torch.testing.assert_close(model(x, keep=keep).cls, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x, keep=torch.ones_like(keep)).cls, model(x).cls, rtol=0, atol=0)


def test_dropping_every_branch_leaves_the_cls_token_alone() -> None:
    model = narrow()
    expected = model.vit.norm(model.vit.cls_token[:, 0] + model.vit.pos_embed[:, 0])
    found = model(images(), keep=torch.zeros(2, 3, 2)).cls
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=0, atol=1e-12)


def test_grids_are_embedded_cell_by_cell_row_major() -> None:
    model = narrow(level="region", side=6)
    grids = images(2, 6, 6, 5)
    vit = model.vit
    cell = nn.functional.gelu(grids[1, :, 2, 3] @ vit.patch_embed.proj.weight.T + vit.patch_embed.proj.bias)
    found = model.embed(grids)[1, 1 + 2 * 6 + 3]
    torch.testing.assert_close(found, cell + vit.pos_embed[0, 1 + 2 * 6 + 3], rtol=0, atol=1e-12)
    assert model(images(2, 4, 9, 5), need=ALL).patches.shape == (2, 36, 24)


def test_last_attention_is_the_softmax_of_the_cls_row() -> None:
    model = narrow(NARROW + ",registers=2")
    x = model.embed(images())
    for block in model.vit.blocks[:-1]:
        x = block(x)
    attn = model.vit.blocks[-1].attn
    qkv = attn.qkv(model.vit.blocks[-1].norm1(x)).reshape(2, -1, 3, 2, 12)  # (B, N, 3, heads, d)
    scores = torch.einsum("bhd,bnhd->bhn", qkv[:, 0, 0], qkv[:, :, 1]) / 12**0.5
    expected = scores.softmax(-1)[..., 3:]
    torch.testing.assert_close(model.last_attention(images()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 9])
def test_fused_and_written_out_attention_agree(queries: int) -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 6, dtype=torch.float64)
    one, other = (mix(query[:, :, :queries], key, value, 0.3, fused) for fused in (True, False))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_bf16_autocast_stays_near() -> None:
    model = narrow().float()
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x).cls
    torch.testing.assert_close(found.float(), model(x).cls, rtol=0, atol=0.05)


def test_start_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    spec = BackboneSpec(NARROW, "patch", 3, (16, 16), 4)
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    first, second, other = build_backbone(spec, 0), build_backbone(spec, 0), build_backbone(spec, 1)
    assert torch.equal(torch.randn(4), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.vit.cls_token, other.vit.cls_token)


def test_start_is_dinos() -> None:
    vit = build_backbone(BackboneSpec("vit:dim=96,depth=2,heads=2,layer_scale=0.1", "patch", 3, (64, 64), 4), 0).vit
    for tensor in (vit.pos_embed, vit.blocks[0].attn.qkv.weight, vit.blocks[1].mlp.fc2.weight):
        assert abs(tensor.std().item() - 0.02) < 6e-4
    assert vit.cls_token.abs().sum() > 0
    assert vit.blocks[0].attn.qkv.bias.abs().sum() == 0
    assert (vit.blocks[0].ls1.gamma == 0.1).all()
    assert vit.patch_embed.proj.weight.abs().max() <= 48**-0.5
    assert vit.norm.eps == vit.blocks[0].norm1.eps == 1e-6


@pytest.mark.parametrize(
    ("arch", "dim", "depth", "heads"),
    [("vit_tiny", 192, 12, 3), ("vit_small", 384, 12, 6), ("vit_base", 768, 12, 12), ("vit_large", 1024, 24, 16)],
)
def test_named_shapes(arch: str, dim: int, depth: int, heads: int) -> None:
    shape = SHAPES[arch]
    assert (shape.dim, shape.depth, shape.heads) == (dim, depth, heads)
    assert arch_of(shape, "patch") == arch


def test_region_vit_is_hipts() -> None:
    model = build_backbone(BackboneSpec("hvit_xs", "region", 384, (14, 14), 1), 0)
    assert (model.embed_dim, model.depth, model.num_heads) == (192, 6, 6)
    assert model.vit.pos_embed.shape == (1, 197, 192)
    assert model(torch.randn(1, 384, 16, 16)).cls.shape == (1, 192)


@pytest.mark.parametrize("arch", VARIANTS)
def test_a_shape_is_found_again_from_its_name(arch: str) -> None:
    shape = shape_of(arch)
    assert shape is not None
    assert shape_of(arch_of(shape, "patch")) == shape


def test_spec_survives_plain_values() -> None:
    spec = BackboneSpec("vit_tiny", "patch", 3, (224, 96), 16, "timm")
    assert BackboneSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("vit_smal", "patch", 3, (32, 32), 16), "vit_small"),
        (("resnet18", "patch", 3, (32, 32), 16), "not supported"),
        (("vit_base_patch16_siglip_224", "patch", 3, (32, 32), 16), "cls token"),
        (("hvit_xs", "patch", 3, (32, 32), 16), "feature grids"),
        (("test_vit", "region", 3, (8, 8), 1), "level 2 takes"),
        (("test_vit", "patch", 3, (32, 32), 8), "model.patch_size=16"),
        (("vit_tiny", "patch", 3, (100, 96), 16), "divide"),
        (("vit_tiny", "tile", 3, (96, 96), 16), "patch or region"),
        (("vit_tiny", "region", 3, (8, 8), 2), "one cell"),
        (("vit:dim=64,depth=2,heads=3", "patch", 3, (32, 32), 16), "heads must divide"),
        (("vit:dim=64,width=2", "patch", 3, (32, 32), 16), "vit:dim=64,depth=2,heads=2"),
    ],
)
def test_what_does_not_fit_is_refused(values: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneSpec(*values), 0)


def test_input_that_does_not_fit_is_refused() -> None:
    model = narrow()
    with pytest.raises(ConfigError, match="must divide the image"):
        model(images(1, 18, 16))
    with pytest.raises(ConfigError, match="expected images"):
        model(images(1, channels=5))
    with pytest.raises(ConfigError, match="whole, unmasked"):
        model(images(1), valid=torch.ones(1, 16))
