"""Balanced sampling and tables of tiles at scale, on synthetic slides: time, memory, draws per second.

    python -m benchmarks.sampling OUTPUT.json [--quick]

``sampler``: 100,000 slides of 20 centres with 10^6 to 10^9 tiles between them, balanced over centre, patient and slide;
the tiles exist as ranges only. ``table``: ``tiles.csv`` and ``tiles.parquet`` of up to 10^7 rows, read as for training.
Each measurement is a process of its own; its memory is the growth of its peak resident size after the imports.
"""

import argparse
import json
import multiprocessing
import pickle
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import environment
from dino.data import Balance, Groups, GroupSampler, SlideRanges
from dino.files import write_json
from dino.slides import parts
from dino.slides.parts import merge, save_part
from dino.slides.tables import SlideStatus, read_slide_tiles, read_tiles
from dino.slides.tables import TileRecord as Tile

SLIDES, CENTRES, SLIDES_PER_PATIENT = 100_000, 20, 3
DRAWS = 20_000
PER_SLIDE = 10_000


def measure_sampler(slides: int, tiles: int) -> dict[str, Any]:
    """Start-up, memory and draws per second with so many slides and tiles."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0, 1, slides)
    counts = np.maximum(1, np.floor(sizes / sizes.sum() * tiles)).astype(np.int64)
    counts[-1] += max(0, tiles - counts.sum())
    before, start = peak_mb(), time.perf_counter()
    ids = [f"slide_{number:06}" for number in range(slides)]
    columns = {one: (f"centre_{i % CENTRES}", f"patient_{i // SLIDES_PER_PATIENT}") for i, one in enumerate(ids)}
    ranges = SlideRanges(ids, np.concatenate([[0], np.cumsum(counts)]))

    def value(slide: str | None, column: str) -> str:
        known = columns[str(slide)]
        return {"centre": known[0], "patient_id": known[1], "slide_id": str(slide)}[column]

    groups = Groups.of(ranges, value, Balance(["centre", "patient_id", "slide_id"], temperature=0.5))
    built = time.perf_counter()
    sampler = GroupSampler(groups, seed=0)
    sampler(0)
    first = time.perf_counter()
    for draw in range(DRAWS):
        sampler(draw)
    drawn = time.perf_counter()
    sampler(groups.cycle)  # the next cycle
    cycle = time.perf_counter() - drawn
    return {
        "slides": slides,
        "tiles": int(counts.sum()),
        "groups": len(groups),
        "cycle_draws": groups.cycle,
        "start_seconds": round(first - start, 2),
        "of_which_groups_seconds": round(built - start, 2),
        "memory_mb": round(peak_mb() - before),
        "sent_to_a_worker_mb": round(len(pickle.dumps(sampler)) / 1e6, 1),
        "draws_per_second": round(DRAWS / (drawn - first)),
        "seconds_per_new_cycle": round(cycle, 3),
    }


def write_table(root: Path, rows: int) -> None:
    """The parts of a data folder with so many tiles, which are alike on all slides."""
    tiles = [Tile("0", i % 100 * 512, i // 100 * 512, 512, 0.5, 0.499, i / PER_SLIDE) for i in range(PER_SLIDE)]
    save_part(root, SlideStatus("0", "ok", tiles=PER_SLIDE), {}, tiles)
    folder = root / "coordinates" / "parts"
    written = {kind: (folder / f"0.{kind}").read_text() for kind in ("json", "tiles.csv", "regions.csv")}
    for number in range(1, rows // PER_SLIDE):
        slide = f"slide_{number:06}"
        for kind, text in written.items():
            changed = text.replace('"slide_id": "0"', f'"slide_id": "{slide}"').replace("\n0,", f"\n{slide},")
            (folder / f"{slide}.{kind}").write_text(re.sub("^0,", f"{slide},", changed))


def measure_merge(root: Path) -> dict[str, Any]:
    """Time to write the table of a folder."""
    before, start = peak_mb(), time.perf_counter()
    merge(root)
    return {"write_seconds": round(time.perf_counter() - start, 1), "write_memory_mb": round(peak_mb() - before)}


def measure_reading(root: Path) -> dict[str, Any]:
    """Time and memory to read the places of all tiles."""
    before, start = peak_mb(), time.perf_counter()
    found = read_slide_tiles(root)
    seconds = time.perf_counter() - start
    return {
        "tiles": sum(len(one.coords) for one in found.values()),
        "read_seconds": round(seconds, 2),
        "read_memory_mb": round(peak_mb() - before),
    }


def measure_rows(root: Path) -> dict[str, Any]:
    """The same through an object of each tile."""
    before, start = peak_mb(), time.perf_counter()
    count = len(read_tiles(root))
    return {
        "tiles": count,
        "read_seconds": round(time.perf_counter() - start, 2),
        "read_memory_mb": round(peak_mb() - before),
    }


def peak_mb() -> float:
    """Peak resident memory of this process; getrusage would count that of the process it was started from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def in_a_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of a function that has a process to itself."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def tables(rows: list[int], folder: Path) -> list[dict[str, Any]]:
    """Both kinds of tables with so many rows."""
    found = []
    for count in rows:
        root = folder / str(count)
        write_table(root, count)
        for kind, limit in (("csv", 10**12), ("parquet", 0)):
            written = in_a_process(_merge_with, root, limit)
            size = next(root.glob(f"tiles.{kind}")).stat().st_size
            read = in_a_process(measure_reading, root)
            found.append({"table": f"tiles.{kind}", "file_mb": round(size / 1e6), **read, **written})
            if kind == "csv" and count == min(rows):
                found.append({"table": "tiles.csv, an object of each tile", **in_a_process(measure_rows, root)})
    return found


def _merge_with(root: Path, limit: int) -> dict[str, Any]:
    parts.MANY_ROWS = limit
    return measure_merge(root)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks that everything runs")
    asked = parser.parse_args()
    slides, powers = (300, (3, 4)) if asked.quick else (SLIDES, (6, 7, 8, 9))
    samplers = [in_a_process(measure_sampler, slides, 10**power) for power in powers]
    with tempfile.TemporaryDirectory() as folder:
        rows = [PER_SLIDE] if asked.quick else [10**6, 10**7]
        found = {"sampler": samplers, "table": tables(rows, Path(folder))}
    for line in (*found["sampler"], *found["table"]):
        print(json.dumps(line))
    write_json(asked.output, {"benchmark": "sampling", **environment(torch.device("cpu")), **found})


if __name__ == "__main__":
    main()
