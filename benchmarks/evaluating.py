"""Memory and time of `dino evaluate knn` and `linear` with many tiles, on synthetic features of tiles in fp16.

    python -m benchmarks.evaluating OUTPUT.json [--tiles 250000,1000000] [--queries 4000] [--evaluations knn,linear]

Each evaluation is the command, in a process of its own whose peak resident size is recorded. The folder of features has
files of 10,000 tiles, as ``dino extract storage=fp16`` writes them, with five classes that a linear probe separates in
part; the last file is tested on. That both equal scikit-learn is tested with few tiles (``tests/evaluate``).
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from benchmarks.results import environment
from dino.files import read_json, write_json

DIM, CLASSES, PER_SLIDE = 1024, 5, 10_000
SIGNAL = 0.06  # length of the classes' means in units of the features' deviation, in each dimension
ROOT = Path(__file__).resolve().parents[1]


def write_features(folder: Path, tiles: int, queries: int) -> Path:
    """A folder of features and its labels: ``tiles`` in all, of which the last ``queries`` are tested.

    Returns:
        The table of labels.
    """
    generator = np.random.default_rng(0)
    means = SIGNAL * generator.standard_normal((CLASSES, DIM), np.float32)
    sizes = [PER_SLIDE] * ((tiles - queries) // PER_SLIDE) + [(tiles - queries) % PER_SLIDE, queries]
    labels = folder / "labels.csv"
    (folder / "features").mkdir()
    with labels.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "x", "y", "label", "partition"])
        for number, size in enumerate(sizes):
            if not size:
                continue
            slide, of_class = f"slide_{number:04}", generator.integers(0, CLASSES, size)
            features = means[of_class] + generator.standard_normal((size, DIM), np.float32)
            coords = 256 * np.stack([np.arange(size) % 100, np.arange(size) // 100], 1)
            with h5py.File(folder / "features" / f"{slide}.h5", "w") as stored:
                stored["features"] = features.astype(np.float16)
                stored["coords"] = coords
            partition = "test" if number == len(sizes) - 1 else "train"
            table.writerows([slide, x, y, one, partition] for (x, y), one in zip(coords, of_class, strict=True))
    return labels


def measure(evaluation: str, labels: Path, settings: list[str]) -> dict[str, Any]:
    """Peak memory, time and scores of a command."""
    output = labels.with_name(f"{evaluation}.json")
    command = [sys.executable, "-m", "dino", "evaluate", evaluation, str(labels.with_name("features")), str(labels)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    before, load = time.perf_counter(), os.getloadavg()[0]
    process = subprocess.Popen([*command, f"output={output}", "device=cpu", *settings], env=environ)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"expected exit code 0 of {' '.join(command)}, found {process.returncode}")
    result = read_json(output)
    return {
        "evaluation": evaluation,
        "settings": settings,
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
        "seconds": round(time.perf_counter() - before),
        "processor_seconds": round(used.ru_utime + used.ru_stime),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "scores": {name: round(value["value"], 4) for name, value in result["rows"][0]["estimates"].items()},
    }


def main() -> None:
    """Parse arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiles", default="250000,1000000")
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--evaluations", default="knn,linear")
    parser.add_argument("--settings", nargs="*", default=[], help="key=value of the commands")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for tiles in map(int, arguments.tiles.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            labels = write_features(Path(folder), tiles, arguments.queries)
            for evaluation in arguments.evaluations.split(","):
                row = measure(evaluation, labels, arguments.settings)
                found.append({"tiles": tiles, "dim": DIM, "queries": arguments.queries, **row})
                print(json.dumps(found[-1]), flush=True)
    write_json(arguments.output, {"benchmark": "evaluating", **environment(torch.device("cpu")), "measured": found})


if __name__ == "__main__":
    main()
