"""Runs that start from files of Meta's layout."""

from pathlib import Path

import pytest
import torch
import yaml
from published import dinov2, dinov2_tokens
from tiny_runs import Crash, assert_same_bits, config, crash_after, last
from typer.testing import CliRunner

from dino.api import export, load_backbone, pretrain
from dino.cli.main import app
from dino.config.schema import ExportConfig
from dino.errors import ConfigError

SETTINGS = {
    "model.arch": "vit:dim=64,depth=2,heads=1,registers=4,layer_scale=1e-05,no_embed_class=1",
    "model.patch_size": 14,
    "model.pos_resample": "timm",
    "aug.global_crops_size": 28,
    "aug.local_crops_size": 14,
    "objective.ibot": 1.0,
    "objective.mask_ratio": [0.25, 0.5],
    "training.max_steps": 4,
    "optim.lr": 1e-3,
}


def test_a_run_from_a_published_file_resumes_exactly_and_is_exported(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    state = dinov2(64, 2, side=4, registers=4)
    torch.save(state, tmp_path / "meta.pth")
    settings = {**SETTINGS, "model.init": str(tmp_path / "meta.pth")}
    pretrain(config(tiles, tmp_path / "whole", **settings))
    shown = capsys.readouterr().out
    assert "mask token kept; heads start anew" in shown and "reg_token" in shown and "by the rule" not in shown
    start = torch.load(tmp_path / "whole" / "checkpoints" / "start.pt", weights_only=True)["teacher"]
    assert torch.equal(start["backbone.mask_token"], state["mask_token"])
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 3)
        pretrain(config(tiles, tmp_path / "cut", **settings))
    pretrain(config(tiles, tmp_path / "cut", **settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")

    x = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dinov2_tokens(state, x, heads=1)[:, 0]
        torch.testing.assert_close(load_backbone(tmp_path / "meta.pth")(x), expected, rtol=0, atol=1e-5)
        trained = load_backbone(tmp_path / "whole")(x)
        folder = export(str(tmp_path / "whole"), tmp_path / "export", ExportConfig(tile_size_px=42))
        torch.testing.assert_close(load_backbone(folder)(x), trained, rtol=0, atol=1e-5)
    ended = last(tmp_path / "whole")
    assert ended["step"] == 4 and not torch.equal(ended["student"]["backbone.mask_token"], state["mask_token"])


def test_all_settings_that_do_not_fit_are_named_at_once_and_fit(tiles: Path, tmp_path: Path) -> None:
    torch.save(dinov2(64, 2, side=4, registers=4), tmp_path / "meta.pth")
    settings = {"model.init": str(tmp_path / "meta.pth"), "training.max_steps": 1}
    with pytest.raises(ConfigError, match="settings that fit model.init=.*patches of 14 px.*add ") as caught:
        pretrain(config(tiles, tmp_path / "run", **settings))
    advised = dict(word.split("=", 1) for word in str(caught.value).rpartition("add ")[2].split())
    assert {"model.arch", "model.patch_size", "model.pos_resample"} < advised.keys()
    assert (advised["aug.global_crops_size"], advised["aug.local_crops_size"]) == ("28", "14")
    assert pretrain(config(tiles, tmp_path / "run", **settings, **advised)).state == "finished"


def test_the_command_takes_what_is_not_given_from_the_weights(tiles: Path, tmp_path: Path) -> None:
    torch.save(dinov2(64, 2, side=4, registers=4), tmp_path / "meta.pth")
    short = ["training.max_steps=1", "training.batch_size_per_gpu=4", "training.warmup_epochs=0", "speed.device=cpu"]
    short += ["model.out_dim=32", "model.hidden_dim=24", "speed.num_workers=0", "training.freeze_last_layer=0"]
    words = ["pretrain", "patch", str(tiles), str(tmp_path / "run"), f"model.init={tmp_path / 'meta.pth'}", *short]
    for _ in range(2):  # the second time it is finished
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        said = " ".join(done.output.split())
        assert "meta.pth sets model.arch=vit:dim=64,depth=2,heads=1" in said
        assert said.count("meta.pth: vit:") == 1 and "no recorded normalization" not in said
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["model"]["patch_size"] == 14 and resolved["aug"]["local_crops_size"] == 98
    assert resolved["aug"]["global_crops_size"] == 224 and resolved["model"]["pos_resample"] == "timm"
    words[3] = str(tmp_path / "other")
    refused = CliRunner().invoke(app, [*words, "model.patch_size=16"])
    assert refused.exit_code == 2 and "model.patch_size=14" in refused.output


def test_the_nearest_sizes_of_a_crop_are_named(tiles: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.patch_size=14, found 96; the nearest are 84 and 98"):
        sizes = {"model.patch_size": 14, "aug.global_crops_size": 224, "aug.local_crops_size": 96}
        pretrain(config(tiles, tmp_path / "run", **sizes))
