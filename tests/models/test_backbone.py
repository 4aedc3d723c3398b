"""All tokens against timm's own forward pass, the cls-only block against the full one, drop-path multipliers."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from dino.errors import ConfigError
from dino.models.backbone import Backbone, BackboneSpec, Tokens, build_backbone, make_vit
from dino.models.blocks import attend

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


def timm_model(model: Backbone) -> Any:
    """timm's own model with the weights of ``model``, and nothing of this package in its forward pass."""
    vit = make_vit(model.spec).to(model.vit.cls_token.dtype)
    vit.load_state_dict(model.vit.state_dict())
    return vit.eval()


def assert_tokens(tokens: Tokens, expected: torch.Tensor, prefix: int, atol: float) -> None:
    """``expected`` is what timm's ``forward_features`` returns."""
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=0, atol=atol)
    torch.testing.assert_close(tokens.patches, expected[:, prefix:], rtol=0, atol=atol)
    if prefix > 1:
        torch.testing.assert_close(tokens.registers, expected[:, 1:prefix], rtol=0, atol=atol)
    else:
        assert tokens.registers is None


@pytest.mark.parametrize("arch", VARIANTS)
def test_equals_timm_at_native_size(arch: str) -> None:
    model = narrow(arch)
    vit = timm_model(model)
    assert_tokens(model(images()), vit.forward_features(images()), vit.num_prefix_tokens, atol=1e-12)


SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 2}
# DINOv2: registers, LayerScale, packed SwiGLU, patch size 14. DINOv3: rotary positions, with and without biases of
# queries and values, SwiGLU of two layers. RoPE-ViT: frequencies learned by each block, with and without a table.
FAMILIES = [
    "test_vit",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_ape_224",
]


def family(name: str, grid: int = 4) -> tuple[Backbone, Any]:
    """A small model of one of timm's families, as this package runs it and as timm does; no parameter is trivial."""
    patch = 14 if "patch14" in name else 16
    vit: Any = timm.create_model(name, img_size=grid * patch, num_classes=0, dynamic_img_size=True, **SMALL).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in vit.named_parameters():
            scale = 1.0 if "rope" in key else 0.3 if parameter.ndim < 2 else 0.1
            offset = 1.0 if parameter.ndim == 1 and "bias" not in key else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    spec = BackboneSpec(name, "patch", 3, (grid * patch, grid * patch), patch, "timm")
    return Backbone(spec, copy.deepcopy(vit)).eval(), vit


@pytest.mark.parametrize("size", [(4, 4), (6, 3), (2, 5)])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_timm_for_every_supported_family(name: str, size: tuple[int, int]) -> None:
    model, vit = family(name)
    patch = model.spec.patch_size
    x = torch.randn(2, 3, size[0] * patch, size[1] * patch, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = vit.forward_features(x)
        assert expected.std() > 0.1
        assert_tokens(model(x), expected, vit.num_prefix_tokens, atol=1e-5)
        torch.testing.assert_close(model(x, cls_only=True).cls, expected[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_drop_path_multipliers_and_shows_its_attention(name: str) -> None:
    model, vit = family(name)
    model, vit = model.double(), vit.double()
    patch = model.spec.patch_size
    x = images(2, 4 * patch, 4 * patch)
    keep = masks(2, model.depth)
    weights: list[torch.Tensor] = []
    for index, block in enumerate(vit.blocks):
        block.drop_path1, block.drop_path2 = Given(keep[:, index, 0]), Given(keep[:, index, 1])
    # Softmax is not a module of timm's attention; its dropout after the softmax is, where the fused kernel is off.
    vit.blocks[-1].attn.fused_attn = False
    vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out))
    with torch.no_grad():
        expected = vit.forward_features(x)
        tolerance = 1e-9 if getattr(vit, "rope", None) is None else 1e-6  # timm computes learned rotations in fp32
        assert_tokens(model(x, keep=keep), expected, vit.num_prefix_tokens, atol=tolerance)
        weights.clear()
        for block in vit.blocks:
            block.drop_path1 = block.drop_path2 = nn.Identity()
        vit.forward_features(x)
        found = model.last_attention(x)
    prefix = vit.num_prefix_tokens
    torch.testing.assert_close(found, weights[0][:, :, 0, prefix:], rtol=0, atol=tolerance)
    rest = weights[0][:, :, 0, :prefix].sum(-1)
    torch.testing.assert_close(found.sum(-1), 1 - rest, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_small_patch16_rope_mixed_ape_224"])
def test_gradients_of_rotary_models_are_timms(name: str) -> None:
    model, vit = family(name)
    model, vit = model.double(), vit.double()
    with torch.inference_mode():  # the cached embedding must serve a training step afterwards
        model(images(2, 96, 48))
    for module, features in ((vit, lambda x: vit.forward_features(x)[:, 0]), (model, lambda x: model(x).cls)):
        module.zero_grad()
        features(images(2, 96, 48)).square().sum().backward()
    for key, parameter in vit.named_parameters():
        other = model.vit.get_parameter(key).grad
        torch.testing.assert_close(parameter.grad, other, rtol=1e-5, atol=1e-6, msg=key)


def test_parameters_keep_timms_names_and_order() -> None:
    """The state of an optimizer refers to parameters by their order."""
    for name in FAMILIES:
        model, vit = family(name)
        assert [key for key, _ in model.vit.named_parameters()] == [key for key, _ in vit.named_parameters()]
        assert list(model.vit.state_dict()) == list(vit.state_dict())


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384", "vit_medium_patch16_rope_reg1_gap_256"]
)
def test_unsupported_families_are_rejected_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not supported.*final norm"):
        make_vit(BackboneSpec(name, "patch", 3, (224, 224), 14 if "patch14" in name else 16))


@pytest.mark.parametrize("arch", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_cls_only_block_is_exact(arch: str, masked: bool) -> None:
    model, x = narrow(arch), images(3, 24, 8)
    keep = masks(3, model.depth) if masked else None
    assert model(x, cls_only=True)[1:] == (None, None)
    results = []
    for cls_only in (True, False):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        cls = model(leaf, keep=keep, cls_only=cls_only).cls
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
    vit = timm_model(model)
    for index, block in enumerate(vit.blocks):
        block.drop_path1, block.drop_path2 = Given(keep[:, index, 0]), Given(keep[:, index, 1])
    expected = vit.forward_features(x)[:, 0]
    torch.testing.assert_close(model(x, keep=keep).cls, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x, keep=torch.ones_like(keep)).cls, model(x).cls, rtol=0, atol=0)


def test_dropping_every_branch_leaves_the_cls_token_alone() -> None:
    model = narrow()
    expected = model.vit.norm(model.vit.cls_token[:, 0] + model.vit.pos_embed[:, 0])
    found = model(images(), keep=torch.zeros(2, 3, 2), cls_only=True).cls
    torch.testing.assert_close(found, expected.expand(2, -1), rtol=0, atol=1e-12)


def test_grids_are_embedded_cell_by_cell_row_major() -> None:
    model = narrow(level="region", side=6)
    grids = images(2, 6, 6, 5)
    vit = model.vit
    cell = nn.functional.gelu(grids[1, :, 2, 3] @ vit.patch_embed.proj.weight.T + vit.patch_embed.proj.bias)
    found = model.embed(grids)[1, 1 + 2 * 6 + 3]
    torch.testing.assert_close(found, cell + vit.pos_embed[0, 1 + 2 * 6 + 3], rtol=0, atol=1e-12)
    assert model(images(2, 4, 9, 5)).patches.shape == (2, 36, 24)


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
    one, other = (attend(query[:, :, :queries], key, value, 0.3, fused) for fused in (True, False))
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


def test_region_vit_is_hipts() -> None:
    model = build_backbone(BackboneSpec("hvit_xs", "region", 384, (14, 14), 1), 0)
    assert (model.embed_dim, model.depth, model.num_heads) == (192, 6, 6)
    assert model.vit.pos_embed.shape == (1, 197, 192)
    assert model(torch.randn(1, 384, 16, 16)).cls.shape == (1, 192)


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
def test_a_spec_that_does_not_fit_is_rejected(values: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(BackboneSpec(*values), 0)


def test_input_that_does_not_fit_is_rejected() -> None:
    model = narrow()
    with pytest.raises(ConfigError, match="must divide the image"):
        model(images(1, 18, 16))
    with pytest.raises(ConfigError, match="expected images"):
        model(images(1, channels=5))
