"""Published state dicts of Meta and of transformers give the features of the published code, and those of timm."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from published import (
    State,
    as_transformers,
    chunked,
    dinov2,
    dinov2_tokens,
    dinov3,
    dinov3_tokens,
)
from safetensors.torch import save_file
from timm.models.eva import checkpoint_filter_fn as timm_dinov3
from timm.models.vision_transformer import checkpoint_filter_fn as timm_dinov2
from torch import Tensor

from dino.api.exporting import export, info
from dino.config.schema import ExportConfig
from dino.errors import CheckpointError
from dino.models.weights import LoadedBackbone, load_backbone_file

Published = tuple[State, Callable[[State, Tensor, int], Tensor], int]

MODELS: dict[str, Callable[[], Published]] = {
    "DINOv2": lambda: (dinov2(128, 3, side=5), dinov2_tokens, 2),
    "DINOv2 with registers": lambda: (dinov2(128, 3, side=5, registers=4), dinov2_tokens, 2),
    "DINOv2 with SwiGLU": lambda: (dinov2(128, 2, side=5, registers=4, swiglu=88), dinov2_tokens, 2),
    "DINOv3": lambda: (dinov3(192, 12, heads=3), dinov3_tokens, 3),
    "DINOv3 with SwiGLU": lambda: (dinov3(384, 12, heads=6, swiglu=1536), dinov3_tokens, 6),
}
LAYOUTS: dict[str, Callable[[State], dict]] = {
    "bare": lambda state: state,
    "teacher": lambda state: {
        "teacher": {
            **{f"backbone.{name}": tensor for name, tensor in state.items()},
            "dino_head.mlp.0.weight": torch.zeros(2, 2),
            "ibot_head.last_layer.weight_g": torch.zeros(2, 1),
        }
    },
    "chunked": lambda state: chunked(state, 2),
    "transformers": as_transformers,
}


def saved(state: dict, folder: Path) -> Path:
    torch.save(state, folder / "published.pth")
    return folder / "published.pth"


def pixels(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def same_features(loaded: LoadedBackbone, tokens: Callable[[Tensor], Tensor], sizes: list[tuple[int, int]]) -> None:
    for size in sizes:
        x = pixels(*size)
        expected, found = tokens(x), loaded.backbone(x)
        registers = 0 if found.registers is None else found.registers.shape[1]
        torch.testing.assert_close(found.cls, expected[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.patches, expected[:, 1 + registers :], rtol=0, atol=1e-5)
        if registers:
            torch.testing.assert_close(found.registers, expected[:, 1 : 1 + registers], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "layout"),
    [(model, layout) for model in MODELS for layout in ("bare", "transformers")]
    + [("DINOv2 with registers", "teacher"), ("DINOv2 with SwiGLU", "chunked"), ("DINOv3", "teacher")],
)
def test_features_are_those_of_the_published_code(model: str, layout: str, tmp_path: Path) -> None:
    state, tokens, heads = MODELS[model]()
    loaded = load_backbone_file(saved(LAYOUTS[layout](state), tmp_path))
    patch = loaded.backbone.spec.patch_size
    assert loaded.report.layout == model.split(maxsplit=1)[0] and loaded.report.missing == []
    sizes = [(5 * patch, 5 * patch), (7 * patch, 3 * patch), (8 * patch, 8 * patch)]
    expected = state if layout != "transformers" or "storage_tokens" not in state else without_key_bias(state)
    same_features(loaded, lambda x: tokens(expected, x, heads), sizes)
    torch.testing.assert_close(loaded.mask_token, state["mask_token"], rtol=0, atol=0)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_of_transformers_is_read(file: str, prefix: str, tmp_path: Path) -> None:
    state = dinov2(128, 2, side=5, registers=4)
    published = {name: tensor.contiguous() for name, tensor in as_transformers(state).items()}
    save_file(published, tmp_path / file) if file.endswith("tensors") else torch.save(published, tmp_path / file)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2_with_registers", "hidden_size": 128}')
    loaded = load_backbone_file(f"{prefix}{tmp_path}")
    same_features(loaded, lambda x: dinov2_tokens(state, x, 2), [(70, 70), (98, 42)])
    assert loaded.report.layout == "DINOv2"


def test_a_folder_with_another_config_or_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a config of timm or transformers"):
        load_backbone_file(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(CheckpointError, match=r"no such checkpoint: .*model\.safetensors"):
        load_backbone_file(tmp_path)


def without_key_bias(state: State) -> State:
    return {
        name: tensor * state[f"{name}_mask"] if name.endswith("qkv.bias") else tensor for name, tensor in state.items()
    }


@pytest.mark.parametrize("registers", [0, 4])
def test_features_of_dinov2_are_those_of_timm(registers: int, tmp_path: Path) -> None:
    state = dinov2(384, 12, side=8, registers=registers)
    loaded = load_backbone_file(saved(state, tmp_path))
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    spec = loaded.backbone.spec
    assert (spec.arch, spec.img_size, spec.patch_size) == (name, (112, 112), 14)
    vit = timm.create_model(name, num_classes=0, img_size=112, dynamic_img_size=True).eval()
    vit.load_state_dict(timm_dinov2(dict(state), vit))
    # Without registers, the published code resizes the table by another rule than timm does.
    sizes = [(112, 112)] + [(84, 140)] * bool(registers)
    same_features(loaded, vit.forward_features, sizes)


def test_features_of_dinov3_are_those_of_timm(tmp_path: Path) -> None:
    state = dinov3(192, 12, heads=3)
    loaded = load_backbone_file(saved(state, tmp_path))
    assert loaded.backbone.spec.arch == "vit_tiny_patch16_dinov3_qkvb"
    vit = timm.create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0).eval()
    vit.load_state_dict(timm_dinov3(dict(state), vit))
    same_features(loaded, vit.forward_features, [(256, 256), (96, 48)])


def test_the_published_sizes_are_found_by_name() -> None:
    """Names and shapes from Meta's own settings; on the meta device, where they take no memory."""
    from dino.models.layouts import backbone_tensors
    from dino.models.recognition import published_name

    def shrunk(state: State, depth: int) -> State:
        """As many blocks as the model has, of tensors without values."""
        blocks = {name: tensor for name, tensor in state.items() if name.startswith("blocks.0.")}
        many = {name.replace(".0.", f".{index}.", 1): x for name, x in blocks.items() for index in range(depth)}
        return {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")} | many

    expected = {
        "vit_base_patch14_dinov2": (dinov2(768, 1, 37), 12),
        "vit_large_patch14_reg4_dinov2": (dinov2(1024, 1, 37, registers=4), 24),
        "vit_giant_patch14_reg4_dinov2": (dinov2(1536, 1, 37, registers=4, swiglu=4096), 40),
        "vit_base_patch16_dinov3_qkvb": (dinov3(768, 1, 12), 12),
        "vit_huge_plus_patch16_dinov3_qkvb": (dinov3(1280, 1, 20, swiglu=5120), 32),
    }
    for name, (state, depth) in expected.items():
        assert published_name(backbone_tensors(shrunk(state, depth), "teacher", "x")) == name


def test_rotary_positions_of_another_kind_are_refused(tmp_path: Path) -> None:
    state = dinov3(192, 12, heads=3)
    periods = state["rope_embed.periods"]
    rounded = load_backbone_file(saved({**state, "rope_embed.periods": periods.bfloat16()}, tmp_path))
    assert rounded.backbone.spec.arch == "vit_tiny_patch16_dinov3_qkvb"
    with pytest.raises(CheckpointError, match=r"positions of another base"):
        load_backbone_file(saved({**state, "rope_embed.periods": periods**1.1}, tmp_path))
    unmasked = {name: tensor for name, tensor in state.items() if not name.endswith("bias_mask")}
    with pytest.raises(CheckpointError, match=r"without a bias for keys, found one in blocks\.0"):
        load_backbone_file(saved(unmasked, tmp_path))
    untrained = {name: x * torch.nan if name.endswith("bias_mask") else x for name, x in state.items()}
    with pytest.raises(CheckpointError, match=r"without a bias for keys"):
        load_backbone_file(saved(untrained, tmp_path))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: dinov3(192, 3, heads=3), r"DINOv3 model of dim 192 and 3 blocks.*vit_tiny_patch16_dinov3_qkvb"),
        (
            lambda: {"downsample_layers.0.0.weight": torch.zeros(96, 3, 4, 4)},
            r"not a supported ViT.*DINOv3.*Dinov2Model",
        ),
        (lambda: {**dinov2(128, 1, 5), "blocks.0.attn.q_norm.weight": torch.ones(64)}, r"unexpected blocks\.0\.attn"),
    ],
)
def test_other_families_are_refused_with_those_that_are_supported(
    state: Callable[[], State], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_backbone_file(saved(state(), tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["DINOv2", "DINOv2 with SwiGLU", "DINOv3"])
def test_an_export_gives_the_published_features_in_timm(model: str, tmp_path: Path) -> None:
    state, tokens, heads = MODELS[model]()
    file = saved(state, tmp_path)
    assert info(str(file))["kind"] == "external"
    side = 126 if "DINOv2" in model else 128
    folder = export(str(file), tmp_path / "export", ExportConfig(tile_size_px=side))
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    x = pixels(side, side)
    with torch.no_grad():
        torch.testing.assert_close(vit.forward_features(x)[:, 0], tokens(state, x, heads)[:, 0], rtol=0, atol=1e-5)
