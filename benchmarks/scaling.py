"""Scaling: two processes against one on one machine, and opening folders of ten times as many files."""

import argparse
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.material import random_views
from benchmarks.measure import Duel, Row, Setting
from benchmarks.networks import ReadyViews, Task, our_trainer, take_steps
from benchmarks.results import ROOT
from dino import distributed
from dino.data.datasets import FolderTiles, TileDataset
from dino.data.images import list_names

TITLE = "processes and files"
FOLDERS = 100


def run(setting: Setting) -> Iterator[Row]:
    """Both benchmarks."""
    if setting.on_gpu and torch.cuda.device_count() < 2:
        yield Row("two processes", skipped=f"needs two GPUs, found {torch.cuda.device_count()}")
    elif not setting.on_gpu and torch.get_num_threads() < 2:
        yield Row("two processes", skipped=f"needs two threads, found {torch.get_num_threads()}")
    else:
        yield _two_processes(setting)
    yield _files(setting)


def _two_processes(setting: Setting) -> Row:
    """The same work per process, each on one thread (or GPU); the limit is twice the rate of one process."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in setting.rounds(2):
        for processes, found in rates.items():
            setting.notice(f"{processes} processes, round {number + 1}")
            found.append(launch(processes, setting.quick))
    seconds = {processes: [1 / rate for rate in found] for processes, found in rates.items()}
    row = Duel(seconds[2], seconds[1]).row("two processes", 1, "img/s", "one process")
    row.equality = "two processes train to the same weights as one (tests/integration)"
    row.limit, row.limited_by = 2 * (row.theirs or 0), "twice one process"
    return row


def launch(processes: int, quick: bool) -> float:
    """Images per second of all ``processes`` together, started by torchrun.

    Raises:
        RuntimeError: If a process fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "benchmarks.scaling", *(["--quick"] if quick else [])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith('{"images_per_second"')]
    if result.returncode or not lines:
        raise RuntimeError(f"expected {processes} processes to run, found: {result.stderr[-500:]}")
    return float(json.loads(lines[-1])["images_per_second"])


def _files(setting: Setting) -> Row:
    """Time and memory of opening a folder, at one and at ten times the files."""
    few = 100 if setting.quick else 10_000
    root = setting.folder / "many"
    found = {}
    for count in (few, 10 * few):
        setting.notice(f"open a folder of {count:,} files")
        _fill(root, count)
        found[count] = _open(root)
    (seconds, kept, _), (more_seconds, more_kept, more_peak) = found.values()
    return Row(
        f"open {10 * few:,} files",
        "files/s",
        10 * few / more_seconds,
        rounds=1,
        note=f"10 x the files: {more_seconds / seconds:.1f} x the time, {more_kept / few / 10:.0f} bytes a file kept",
        details={
            "seconds": round(more_seconds, 3),
            "seconds_of_a_tenth": round(seconds, 3),
            "kept_bytes_per_file": round(more_kept / few / 10),
            "kept_bytes_per_file_of_a_tenth": round(kept / few),
            "peak_bytes_per_file": round(more_peak / few / 10),
        },
    )


def _fill(root: Path, count: int) -> None:
    for number in range(FOLDERS):
        (root / f"slide_{number:03}").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (root / f"slide_{index % FOLDERS:03}" / f"slide_{index % FOLDERS:03}_{index * 256}_0.jpg").touch()


def _open(root: Path) -> tuple[float, int, int]:
    """Seconds to list a folder and make it a dataset; the bytes that the dataset keeps, and most on the way to it."""
    started = time.perf_counter()
    TileDataset(FolderTiles(root, list_names(root)))
    seconds = time.perf_counter() - started
    tracemalloc.start()
    source = TileDataset(FolderTiles(root, list_names(root)))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del source
    return seconds, kept, peak


def main() -> None:
    """One of several processes that train together; rank 0 prints the images per second of all of them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    device = distributed.choose_device("auto")
    task = Task("vit_tiny", 256 if device.type == "cuda" else 16, 4096, ((2, 96), (6, 48)))
    if quick:
        task = Task("vit:dim=64,depth=2,heads=2", 2, 256, ((2, 32), (3, 16)))
    steps = 1 if quick else 6
    with distributed.process_group(device):
        trainer = our_trainer(task, device, "bf16", ReadyViews(random_views(task.batch, 3, task.groups, device)))
        take_steps(trainer, 2)
        distributed.barrier()
        started = time.perf_counter()
        take_steps(trainer, steps)
        float(next(trainer.model.parameters()).sum())  # waits for the device
        distributed.barrier()
        rate = task.batch * steps * distributed.world_size() / (time.perf_counter() - started)
    if distributed.is_main():
        print(json.dumps({"images_per_second": rate}), flush=True)


if __name__ == "__main__":
    main()
