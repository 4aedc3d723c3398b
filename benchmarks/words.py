"""`python -m benchmarks.words OUTPUT.json [--slides 20 --tiles 50000 --dim 384]`: time and memory of `dino words`.

The tables are those of slides that do not exist; the features are random, in 30 groups, stored as fp16.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.sampling import write_root
from dino import api
from dino.extraction import tile_files
from dino.slides.tables import read_slide_tiles

GROUPS, SPREAD = 30, 0.7


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--tiles", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=384)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_root(root, arguments.slides, arguments.tiles)
        write_features(root, arguments.dim)
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        found = api.find_words("random", root)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        size = sum(path.stat().st_size for path in (root / "features_random").iterdir())
    result = {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "tiles": found.tiles,
        "dim": arguments.dim,
        "words": len(found.counts),
        "features_mb": round(size / 1e6),
        "seconds": round(seconds, 1),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_mb_before": round(before.ru_maxrss / 1e3),
        "peak_memory_mb": round(after.ru_maxrss / 1e3),
    }
    text = json.dumps(result, indent=1)
    arguments.output.write_text(text + "\n")
    print(text)


def write_features(root: Path, dim: int) -> None:
    """Features in groups for all tiles of a ROOT."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(GROUPS, dim)).astype(np.float32)
    (root / "features_random").mkdir()
    for slide, tiles in read_slide_tiles(root).items():
        count = len(tiles.coords)
        rows = centres[rng.integers(GROUPS, size=count)]
        rows += SPREAD * rng.standard_normal((count, dim), np.float32)
        layout = tile_files.Layout(dim, "fp16")
        with tile_files.create(root / "features_random" / f"{slide}.h5", tiles.coords, layout, {}, {}) as file:
            file.write(np.arange(count), torch.from_numpy(rows))


if __name__ == "__main__":
    main()
