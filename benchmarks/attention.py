"""`python -m benchmarks.attention OUTPUT.json`: peak memory of `dino attention` on a slide of 100,000 x 100,000 px.

The slide is at 0.5 µm/px: 390 x 390 tiles of 256 px with 16 x 16 tokens, six heads at both levels. Pixels are made up,
and the networks are replaced by means of pixels, so that it takes minutes; what is kept and written is as for a slide.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino.config.schema import AttentionConfig
from dino.extraction.attention import AttentionModels
from dino.extraction.pyramid import write_pyramid
from dino.models.backbone import BackboneSpec
from dino.models.transforms import Transform
from dino.models.weights import LoadedBackbone, LoadReport

SIDE_PX, TILE_PX, TOKENS, HEADS, DIM, REGION = 100_000, 256, 16, 6, 384, 16


class Means(nn.Module):
    """Replacement of a backbone, whose attention is the mean of every token."""

    num_heads, embed_dim = HEADS, DIM

    def __init__(self, level: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.spec = BackboneSpec(f"vit:dim={DIM},depth=1,heads={HEADS}", level, 3, (TOKENS, TOKENS), 1)

    def last_attention(self, x: Tensor) -> Tensor:
        """``(B, heads, N)``, of tiles of any size with 16 x 16 tokens, or of grids of 16 x 16 cells."""
        means = nn.functional.adaptive_avg_pool2d(x[:, :1], TOKENS).flatten(1).abs() + 1.0
        return torch.stack([means * (1 + head) for head in range(HEADS)], 1)


class Pixels:
    """Replacement of a reader: each tile has one grey level. Small tiles, which are pooled to as many tokens."""

    def __init__(self, cells: int) -> None:
        self.path, self.spacing_um = Path("made-up"), 0.5
        clamped = lambda x, y: (x, y)  # noqa: E731
        self.lattice = SimpleNamespace(rows=cells, columns=cells, step_lv0=TILE_PX, clamped=clamped)

    def read_cell(self, x: int, y: int) -> np.ndarray:
        """``(32, 32, 3)`` uint8."""
        return np.full((2 * TOKENS, 2 * TOKENS, 3), (x + 7 * y) // TILE_PX % 251, np.uint8)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--side-px", type=int, default=SIDE_PX)
    arguments = parser.parse_args()
    cells = arguments.side_px // TILE_PX
    places = [(row, column) for row in range(cells) for column in range(cells)]
    features = dict(zip(places, np.zeros((len(places), DIM), np.float32), strict=True))
    result: dict[str, Any] = {
        "computer": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "side_px": arguments.side_px,
        "peak_mb_before": _peak_mb(),
    }
    config = AttentionConfig(device="cpu", precision="fp32", stride=8, num_workers=0)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        networks = AttentionModels(_loaded("patch"), _loaded("region"), config, torch.device("cpu"), Path(folder))
        maps = networks.maps(Pixels(cells), places, features)  # type: ignore[arg-type]
        result |= {"peak_mb_mapped": _peak_mb(), "seconds_mapped": round(time.perf_counter() - start)}
        path = Path(folder) / "maps.ome.tif"
        write_pyramid(path, maps.channels, maps.names(), maps.tile.shape[1:], 8.0)
        result |= {"peak_mb_written": _peak_mb(), "seconds_written": round(time.perf_counter() - start)}
        result |= {"channels": len(maps.names()), "file_mb": path.stat().st_size // 2**20}
    result["load_average"] = round(os.getloadavg()[0], 1)
    text = json.dumps(result, indent=1)
    arguments.output.write_text(text + "\n")
    print(text)


def _loaded(level: str) -> LoadedBackbone:
    transform = Transform("none", (0.0,) * 3, (1 / 255,) * 3) if level == "patch" else None
    report = LoadReport(0, [], [])
    return LoadedBackbone(Means(level), transform, level, report, level, region_cells=(REGION, REGION))  # type: ignore[arg-type]


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
