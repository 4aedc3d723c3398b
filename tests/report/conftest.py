"""A ROOT and two runs at a small size: tiles of 64 px at 2 µm/px, networks of two narrow blocks, two steps each."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dino import api
from dino.config.load import load_config
from dino.config.schema import ExtractConfig, PatchConfig, RegionConfig, TileConfig
from dino.slides import sample_slide

SMALL = {
    "model.out_dim": 32,
    "model.hidden_dim": 16,
    "model.bottleneck_dim": 8,
    "training.max_steps": 2,
    "training.warmup_epochs": 0,
    "training.batch_size_per_gpu": 8,
    "speed.device": "cpu",
    "speed.precision": "fp32",
    "speed.num_workers": 0,
    "logging.every_steps": 1,
    "logging.tensorboard": False,
    "logging.report": False,
}


@dataclass
class Chain:
    root: Path
    patch: Path
    region: Path


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("chain")
    chain = Chain(directory / "slides", directory / "patch", directory / "region")
    tiling = TileConfig(spacing_um=2.0, tile_size_px=64, overlap=0.5, region_size_px=256, region_overlap_cells=3,
                        num_workers=1, previews=False)  # fmt: skip
    api.tile([sample_slide()], chain.root, tiling)
    patch = {
        **SMALL,
        "data_dir": str(chain.root),
        "output_dir": str(chain.patch),
        "model.arch": "vit:dim=24,depth=2,heads=3",
        "aug.global_crops_size": 32,
        "aug.local_crops_size": 16,
        "aug.local_crops_number": 2,
        "aug.vertical_flip": 0.5,
    }
    api.pretrain(load_config(PatchConfig, overrides=patch))
    api.extract(str(chain.patch), chain.root, ExtractConfig(device="cpu", num_workers=1))
    region = {
        **SMALL,
        "data_dir": str(chain.root),
        "output_dir": str(chain.region),
        "model.arch": "vit:dim=24,depth=2,heads=2",
        "model.patch_size": 1,
    }
    api.pretrain(load_config(RegionConfig, overrides=region))
    return chain
