"""Kinds of input: what differs between levels is one object, and a further level is a further entry."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from dino.errors import ConfigError
from dino.models.backbone import BackboneSpec, build_backbone
from dino.models.inputs import INPUTS, GridEmbed, GridInput, input_kind

SPEC = BackboneSpec("vit_tiny", "patch", 3, (224, 224), 16)


def test_an_export_is_for_the_largest_fitting_tile() -> None:
    images = input_kind("patch")
    for patch_size, expected in ((16, 256), (14, 252), (8, 256), (300, 300)):
        spec = BackboneSpec("vit_tiny", "patch", 3, (patch_size, patch_size), patch_size)
        assert images.export_size(spec, None, None) == (expected, expected)
    assert images.export_size(SPEC, 96, None) == (96, 96)
    for wrong, choices in ((100, "96 or 112"), (7, "16"), (-3, "16")):
        with pytest.raises(ConfigError, match=f"multiple of the patch size 16, found {wrong}: choose {choices}$"):
            images.export_size(SPEC, wrong, None)
    grids = input_kind("region")
    assert grids.export_size(SPEC, None, None) == (16, 16) and grids.export_size(SPEC, None, [8, 6]) == (8, 6)


class Scaled(GridEmbed):
    """A grid whose features are halved first."""

    def forward(self, grids: torch.Tensor) -> torch.Tensor:
        return super().forward(grids / 2)


class ScaledInput(GridInput):
    name, description, shape = "scaled", "scaled grids (level 3)", "scaled grids (B, D, h, w)"
    timm_arguments: ClassVar = {"embed_layer": Scaled}


def test_a_third_level_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INPUTS, "scaled", ScaledInput())
    arch = "vit:dim=24,depth=2,heads=2"
    model = build_backbone(BackboneSpec(arch, "scaled", 5, (4, 4), 1), 0)
    grids = build_backbone(BackboneSpec(arch, "region", 5, (4, 4), 1), 0)
    x = torch.randn(2, 5, 4, 6)
    assert torch.equal(model(x).cls, grids(x / 2).cls)
    with pytest.raises(ConfigError, match="expected scaled grids"):
        model(torch.randn(2, 4, 4, 4))
    with pytest.raises(ConfigError, match="level: expected patch or region or scaled, found 'slide'"):
        input_kind("slide")


def test_grids_are_embedded_cell_by_cell() -> None:
    embed = GridEmbed(img_size=4, in_chans=5, embed_dim=7)
    grids = torch.randn(2, 5, 4, 4)
    expected = nn.functional.gelu(torch.einsum("bchw,dc->bhwd", grids, embed.proj.weight) + embed.proj.bias)
    torch.testing.assert_close(embed(grids), expected.flatten(1, 2))
    with pytest.raises(ConfigError, match=r"expected grids of \(4, 4\) cells"):
        embed(torch.randn(2, 5, 4, 6))
    with pytest.raises(ConfigError, match="expected 1, found 2"):
        GridEmbed(patch_size=2)
