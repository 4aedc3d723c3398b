"""`python -m benchmarks.neighbours OUTPUT.json`: the nearest of a million tiles, with bounds and by comparing all.

The features are made up: 50 groups, 384 numbers, and standard deviations of the directions that fall as i^-p, in
memory-mapped files of 100 slides. Times are of the processor, on one thread, since wall time depends on what else runs.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dino.extraction.encoder_features import SlideFeatures
from dino.extraction.neighbours import Bounds

TILES, DIM, SLIDES, GROUPS, QUERIES, COUNT = 1_000_000, 384, 100, 50, 10, 16
BLOCK = 50_000


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for power, kind in ((1.0, np.float32), (0.5, np.float32), (1.0, np.float16)):
            results.append({"standard_deviations": f"i^-{power}", "features": np.dtype(kind).name})
            results[-1] |= measure(_features(Path(folder) / "features", power, kind))
    text = json.dumps(
        {"tiles": TILES, "dim": DIM, "load_average": round(os.getloadavg()[0], 1), "runs": results}, indent=1
    )
    arguments.output.write_text(text + "\n")
    print(text)


def measure(features: np.ndarray) -> dict[str, Any]:
    """Processor seconds of both ways, and whether they find the same tiles."""
    size = len(features) // SLIDES
    parts = [SlideFeatures(features[i * size : (i + 1) * size], np.arange(size)) for i in range(SLIDES)]
    started = time.process_time()
    bounds = Bounds(parts, np.concatenate([part.unit(np.arange(0, size, SLIDES // 2)) for part in parts]))
    built = time.process_time() - started
    for part in parts:
        assert len(part.norms) == size  # computed once, as in the viewer
    excluded = np.zeros(len(features), bool)
    excluded[:size] = True
    seconds: dict[str, list[float]] = {"with_bounds": [], "comparing_all": []}
    same = True
    for number in range(QUERIES):
        query = parts[0].unit(np.array([number * size // QUERIES]))[0]
        started = time.process_time()
        found = bounds.nearest(query, COUNT, excluded)
        seconds["with_bounds"].append(time.process_time() - started)
        started = time.process_time()
        similar = np.concatenate([part.similarity(query) for part in parts])
        similar[excluded] = -np.inf
        expected = np.argpartition(-similar, COUNT)[:COUNT]
        seconds["comparing_all"].append(time.process_time() - started)
        same &= found is not None and set(found[0].tolist()) == set(expected.tolist())
    medians = {f"seconds_{name}": round(float(np.median(taken)), 3) for name, taken in seconds.items()}
    return {"seconds_to_make_bounds": round(built, 1), **medians, "same_tiles": same}


def _features(path: Path, power: float, kind: type) -> np.ndarray:
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0].astype(np.float32)
    scale = (np.arange(1, DIM + 1) ** -power).astype(np.float32)
    groups = rng.standard_normal((GROUPS, DIM), np.float32)
    stored = np.memmap(path, kind, "w+", shape=(TILES, DIM))
    for start in range(0, TILES, BLOCK):
        rows = rng.standard_normal((BLOCK, DIM), np.float32) + groups[rng.integers(0, GROUPS, BLOCK)]
        stored[start : start + BLOCK] = ((rows * scale) @ rotation).astype(kind)
    stored.flush()
    return np.memmap(path, kind, "r", shape=(TILES, DIM))


if __name__ == "__main__":
    main()
