"""Level 2 in Python: extract feature grids, pretrain a region transformer on them, and compute one vector per slide.

    python examples/level2.py --work out --pretrain training.nepochs=100

continues examples/level1.py in the same folder. It writes the features to out/slides and the run to out/region.
"""

import argparse
from pathlib import Path

import h5py
import numpy as np
import torch

import dino
from dino import api
from dino.config.load import load_config
from dino.config.schema import ExtractConfig, RegionConfig
from dino.data.grids import read_grid


def main() -> None:
    """Extract grids, pretrain, extract slide features, and embed one region."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="output folder of level1.py")
    parser.add_argument("--extract", nargs="*", default=[], metavar="KEY=VALUE", help="settings of both extractions")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the run")
    arguments = parser.parse_args()
    root, patch, region = (arguments.work / name for name in ("slides", "patch", "region"))
    extraction = load_config(ExtractConfig, overrides=arguments.extract)

    api.extract(str(patch), root, extraction)

    config = load_config(RegionConfig, recipe="region", overrides=arguments.pretrain)
    config.data_dir, config.output_dir = str(root), str(region)
    summary = api.pretrain(config)
    print(f"{summary.state} after {summary.steps} steps: {summary.numbers['verdict']['text']}")

    api.extract(str(region), root, extraction)
    for path in sorted((root / "slide_features").glob("*.h5")):
        with h5py.File(path) as file:
            features, vector = (np.asarray(file[name]) for name in ("features", "slide_embedding"))
        print(f"{path.stem}: features {features.shape}, slide embedding {vector.shape}")

    # One region without `extract`: its grid of tile features through the region transformer.
    grid = read_grid(sorted((root / "region_4096_pretraining").glob("*.pt"))[0])  # (D, h, w)
    with torch.inference_mode():
        features = dino.load_backbone(region)(grid[None])  # (1, 192)
    print(f"grid {tuple(grid.shape)} to features {tuple(features.shape)}")


if __name__ == "__main__":
    main()
