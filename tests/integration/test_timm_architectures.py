"""Training starts from timm's other transformers: registers, LayerScale, SwiGLU, 14 px patches, rotary positions."""

from pathlib import Path

import pytest
import timm
import torch
from tiny_runs import config, last, metrics

from dino.api.exporting import export, info, load_backbone
from dino.api.pretraining import pretrain
from dino.config.schema import ExportConfig
from dino.errors import ConfigError


@pytest.mark.parametrize(
    ("arch", "patch_size", "exported_px"),
    [("vit_tiny_patch16_dinov3_qkvb", 16, 256), ("vit_small_patch14_reg4_dinov2", 14, 252)],
)
def test_a_model_of_timm_trains_resumes_and_is_exported(
    arch: str, patch_size: int, exported_px: int, tiles: Path, tmp_path: Path
) -> None:
    sizes = {
        "aug.global_crops_size": 2 * patch_size,
        "aug.local_crops_size": patch_size,
        "model.patch_size": patch_size,
    }
    first = {"model.arch": arch, "training.max_steps": 2, "optim.lr": 1e-3, **sizes}
    pretrain(config(tiles, tmp_path / "run", **first))
    assert len(metrics(tmp_path / "run")) == 2
    model = load_backbone(tmp_path / "run")
    before, after = timm.create_model(arch, num_classes=0), last(tmp_path / "run")["teacher"]
    assert {f"backbone.{name}" for name in before.state_dict()} == {
        name for name in after if name.startswith("backbone.")
    }

    # The training's own export and `dino export` choose the same size, at which timm gives the same features.
    export(str(tmp_path / "run"), tmp_path / "export", ExportConfig())
    x = torch.randn(1, 3, exported_px, exported_px, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        for folder in (tmp_path / "run" / "backbone", tmp_path / "export"):
            other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
            assert other.pretrained_cfg["input_size"] == (3, exported_px, exported_px)
            torch.testing.assert_close(other.forward_features(x)[:, 0], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(load_backbone(folder)(x), expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=f"multiple of the patch size {patch_size}, found 250"):
        export(str(tmp_path / "run"), tmp_path / "export", ExportConfig(tile_size_px=250))

    # Its weights are initial weights for the next run.
    again = {**first, "training.max_steps": 1, "model.init": str(tmp_path / "run")}
    pretrain(config(tiles, tmp_path / "again", **again))
    assert info(str(tmp_path / "again"))["arch"] == arch
