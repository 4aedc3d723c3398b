"""Balanced sampling and tables of tiles at scale, on synthetic slides: time, memory, draws per second.

    python -m benchmarks.sampling OUTPUT.json [--quick]

``sampler``: 100,000 slides of 20 centres with 10^6 to 10^9 tiles between them, balanced over centre, patient and slide;
the tiles exist as ranges only. ``table``: ``tiles.csv`` and ``tiles.parquet`` of up to 10^7 rows, read as for training.
``root``: a data folder with 10^8 listed tiles, opened as for training. ``dataset``: the dataset of as many and of 10^9
tiles on slides, and a worker that draws from it and looks up the places; no pixels are read.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import environment
from dino.api.sources import open_tiles
from dino.config.load import load_config
from dino.config.schema import PatchConfig, SamplingConfig, TileConfig
from dino.data import Balance, Groups, GroupSampler, PermutationSampler, Sampler, SlideRanges
from dino.data.slide_tiles import Placement, SlideTileDataset
from dino.files import write_json
from dino.slides import parts
from dino.slides.lattice import Geometry
from dino.slides.parts import merge, save_part
from dino.slides.places import PlacedTiles, Places
from dino.slides.tables import (
    STATUS_COLUMNS,
    TILE_NUMBERS,
    SlideStatus,
    csv_line,
    read_slide_tiles,
    read_tiles,
    status_cells,
    write_tiling,
)
from dino.slides.tables import TileRecord as Tile
from dino.slides.tiled import TiledSlides

SLIDES, CENTRES, SLIDES_PER_PATIENT = 100_000, 20, 3
DRAWS = 20_000
PER_SLIDE = 10_000
DICTIONARY: Any = ["slide_id"]  # columns with few values
NAMES = ("sampler", "table", "root", "dataset")


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


def tissue(side: int, share: float = 0.35) -> np.ndarray:
    """(N, 2) places of a smooth shape that covers a share of a lattice of ``side`` x ``side`` cells."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:side, :side] / side
    waves = sum(np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(0, 3, (6, 3)))
    row, column = np.nonzero(waves >= np.quantile(waves, 1 - share))
    return np.stack([column, row], axis=1).astype(np.int64) * 512


def write_root(root: Path, slides: int, per_slide: int) -> None:
    """A data folder whose table is written piece by piece; every slide is the same file."""
    import pyarrow as pa
    from pyarrow import parquet

    write_tiling(root, TileConfig(storage="none"))
    coords = tissue(round((per_slide / 0.35) ** 0.5))[:per_slide]
    (root / "slide.svs").touch()
    status = [
        SlideStatus(f"slide_{i:06}", "ok", "", len(coords), 0, root / "slide.svs", None, f"patient_{i // 3}", "", 0.25)
        for i in range(slides)
    ]
    lines = [csv_line(STATUS_COLUMNS), *(csv_line(status_cells(one).values()) for one in status)]
    (root / "slides_status.csv").write_text("".join(lines))
    types = {name: pa.from_numpy_dtype(kind) for name, kind in TILE_NUMBERS.items()}
    schema = pa.schema([("slide_id", pa.string()), *types.items()])
    with parquet.ParquetWriter(root / "tiles.parquet", schema, compression="zstd", use_dictionary=DICTIONARY) as file:
        for start in range(0, slides, 100):
            some = [one.slide_id for one in status[start : start + 100]]
            count, x, y = len(some) * len(coords), *np.tile(coords, (len(some), 1)).T
            fixed = {"step_lv0": 512, "spacing_requested_um": 0.5, "spacing_um": 0.499, "tissue": 0.7}
            columns = {"slide_id": np.repeat(some, len(coords)), "x": x, "y": y}
            columns |= {name: np.full(count, value) for name, value in fixed.items()}
            file.write_table(pa.table(columns, schema))


def measure_root(root: Path) -> dict[str, Any]:
    """Time and memory to open a data folder for training, and a worker's."""
    config = load_config(PatchConfig, overrides={"data_dir": str(root), "sampling.jitter_px": 64})
    before, clock = peak_mb(), Clock()
    dataset = open_tiles(config).dataset
    opened = clock.lap("open")
    assert dataset.fingerprint
    found = {"tiles": len(dataset), "slides": len(dataset.ranges.slide_ids), **opened, **clock.lap("fingerprint")}
    found["memory_mb"] = round(peak_mb() - before)
    return {**found, **worker(dataset, PermutationSampler(len(dataset), 0))}


def measure_dataset(slides: int, per_slide: int) -> dict[str, Any]:
    """The same without a table: the dataset of so many slides, and a balanced sampler."""
    side = round((per_slide / 0.35) ** 0.5)
    coords = tissue(side)
    before, clock = peak_mb(), Clock()
    names = [f"slide_{number:06}" for number in range(slides)]
    size = 512 * side
    status = {one: SlideStatus(one, "ok", width=size, height=size, spacing_um=0.25) for one in names}
    tiles = [PlacedTiles(one, Places.of(coords), 512, 0.499) for one in names]
    placement = Placement.of(SamplingConfig(jitter_px=64), 0.5, 256, 0)
    dataset = SlideTileDataset(tiles, TiledSlides(Geometry(), status), {}, placement)
    found = {"tiles": len(dataset), "slides": slides, **clock.lap("dataset")}
    groups = Groups.of(dataset.ranges, lambda slide, _: str(slide), Balance(["slide_id"]))
    found |= clock.lap("groups")
    assert dataset.fingerprint
    found |= {**clock.lap("fingerprint"), "memory_mb": round(peak_mb() - before)}
    return {**found, **worker(dataset, GroupSampler(groups, 0))}


class Clock:
    """Seconds, and seconds of processor time, in which other programs do not count."""

    def __init__(self) -> None:
        self.last = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> dict[str, float]:
        """Those since the last call."""
        now, last = (time.perf_counter(), time.process_time()), self.last
        self.last = now
        return {f"{name}_seconds": round(now[0] - last[0], 1), f"{name}_cpu_seconds": round(now[1] - last[1], 1)}


def worker(dataset: Any, sampler: Sampler) -> dict[str, Any]:
    """Draws per second of a forked worker, with their places, and the memory that it has for itself."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_draw, args=(dataset, sampler, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def _draw(dataset: Any, sampler: Sampler, queue: Any) -> None:
    sampler(0)
    start = time.process_time()
    for draw in range(DRAWS):
        dataset.drawn_place(sampler(draw), draw)
    seconds = time.process_time() - start
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    own = sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
    queue.put({"draws_per_cpu_second": round(DRAWS / seconds), "worker_mb": round(own)})


def peak_mb() -> float:
    """Peak resident memory of this process; getrusage would count that of the process it was started from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def in_a_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that has a process to itself."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


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


def roots(quick: bool, folder: Path) -> list[dict[str, Any]]:
    """A data folder with many tiles."""
    in_a_process(write_root, folder, *((30, 400) if quick else (10_000, PER_SLIDE)))
    return [in_a_process(measure_root, folder)]


def datasets(quick: bool) -> list[dict[str, Any]]:
    """Datasets without a table."""
    sizes = [(30, 400)] if quick else [(10_000, PER_SLIDE), (SLIDES, PER_SLIDE)]
    return [in_a_process(measure_dataset, *size) for size in sizes]


def samplers(quick: bool) -> list[dict[str, Any]]:
    """Samplers of ever more tiles."""
    slides, powers = (300, (3, 4)) if quick else (SLIDES, (6, 7, 8, 9))
    return [in_a_process(measure_sampler, slides, 10**power) for power in powers]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES, help="what to measure (all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks that everything runs")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), [PER_SLIDE] if asked.quick else [10**6, 10**7]
        measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "sampler": lambda: samplers(asked.quick),
            "table": lambda: tables(rows, folder),
            "root": lambda: roots(asked.quick, folder),
            "dataset": lambda: datasets(asked.quick),
        }
        found = {}
        for part in asked.only:
            found[part] = measures[part]()
            for line in found[part]:
                print(json.dumps(line), flush=True)
    write_json(asked.output, {"benchmark": "sampling", **environment(torch.device("cpu")), **found})


if __name__ == "__main__":
    main()
