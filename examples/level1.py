"""Level 1 in Python: tile slides, pretrain a vision transformer on the tiles, and embed one tile.

    python examples/level1.py slides/*.svs --work out --pretrain training.nepochs=100

writes the tiles to out/slides and the run to out/patch. Run it again to continue after an interruption.
"""

import argparse
from pathlib import Path

import torch

import dino
from dino import api
from dino.config.load import load_config
from dino.config.schema import PatchConfig, TileConfig
from dino.data.images import decode, list_images


def main() -> None:
    """Tile, pretrain, and embed the first tile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="+", type=Path, help="slides, folders of slides, or a slides.csv")
    parser.add_argument("--work", type=Path, required=True, help="output folder")
    parser.add_argument("--tile", nargs="*", default=[], metavar="KEY=VALUE", help="settings of tiling")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the run")
    arguments = parser.parse_args()
    root, run = arguments.work / "slides", arguments.work / "patch"

    tiling = api.tile(arguments.slides, root, load_config(TileConfig, overrides=arguments.tile))
    print(f"{tiling.tiles} tiles, {tiling.regions} regions")

    config = load_config(PatchConfig, recipe="patch_pathology", overrides=arguments.pretrain)
    config.data_dir, config.output_dir = str(root), str(run)
    summary = api.pretrain(config)
    print(f"{summary.state} after {summary.steps} steps: {summary.numbers['verdict']['text']}")

    # The backbone maps normalised images, whose sides are multiples of the patch size, to the cls token.
    # The normalisation is recorded in the checkpoint.
    backbone = dino.load_backbone(run)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.transform.mean, backbone.transform.std))
    pixels = decode(list_images(root / "patch_256_pretraining")[0])  # (3, H, W) uint8
    with torch.inference_mode():
        features = backbone(((pixels / 255 - mean) / std)[None])  # (1, D)
    print(f"features {tuple(features.shape)}, norm {features.norm():.2f}")


if __name__ == "__main__":
    main()
