"""The scripts in examples/, run as a reader would run them, at tiny sizes, on the sample slide of the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SLIDE = ROOT / "dino" / "slides" / "sample" / "CMU-1-Small-Region.svs"
TINY = [
    "model.out_dim=32",
    "model.hidden_dim=16",
    "model.bottleneck_dim=8",
    "training.max_steps=2",
    "training.warmup_epochs=0",
    "training.batch_size_per_gpu=4",
    "speed.device=cpu",
    "speed.precision=fp32",
    "speed.num_workers=0",
    "logging.tensorboard=false",
]


def _run(*words: str | Path) -> str:
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_both_levels(tmp_path):
    crops = ["model.arch=vit_tiny", "aug.global_crops_size=32", "aug.local_crops_size=16", "aug.local_crops_number=2"]
    tiles = [
        "tile_size_px=64",
        "spacing_um=2",
        "region_size_px=256",
        "region_overlap_cells=3",
        "num_workers=1",
        "previews=false",
    ]
    extraction = ["device=cpu", "precision=fp32", "num_workers=0"]

    said = _run(
        ROOT / "examples" / "level1.py", SLIDE, "--work", tmp_path, "--tile", *tiles, "--pretrain", *TINY, *crops
    )
    assert "finished after 2 steps" in said
    assert "features (1, 192)" in said

    said = _run(ROOT / "examples" / "level2.py", "--work", tmp_path, "--extract", *extraction, "--pretrain", *TINY)
    assert "finished after 2 steps" in said
    assert "grid (192, 4, 4) to features (1, 192)" in said
    assert json.loads((tmp_path / "region" / "status.json").read_text())["state"] == "finished"
