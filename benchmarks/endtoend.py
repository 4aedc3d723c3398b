"""Training from JPEG files: this package's loop against Pillow crops in a DataLoader and the reference step."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.material import IMAGENET, original_crops, tile_files
from benchmarks.measure import Duel, Row, Setting
from benchmarks.networks import Task, our_trainer, take_steps, their_step
from benchmarks.reference.crops import PillowCrops
from benchmarks.reference.data import TileViews, loader
from benchmarks.reference.step import Step
from dino.crops.images import ImageCrops
from dino.data.datasets import Dataset, FolderTiles, TileDataset
from dino.data.loader import Batch, DrawnBatches, Layout, load_batches
from dino.data.samplers import PermutationSampler
from dino.train.loop import Trainer

TITLE = "from JPEG files"
LARGEST_WAIT = 0.01


class Waiting:
    """An iterator that sums up the time spent in ``next``."""

    def __init__(self, inner: Iterator) -> None:
        self.inner, self.seconds = inner, 0.0

    def __iter__(self) -> "Waiting":
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        item = next(self.inner)
        self.seconds += time.perf_counter() - started
        return item


@dataclass(frozen=True)
class Plan:
    """What both implementations train in a round.

    Attributes:
        task: Network, batch and views.
        tiles: The tiles.
        crops: Crop module.
        workers: Number of worker processes.
        warm: Untimed steps, until the prefetched batches are used up.
        steps: Timed steps.
        device: Device to train on.
    """

    task: Task
    tiles: Dataset
    crops: ImageCrops
    workers: int
    warm: int
    steps: int
    device: torch.device


class OurTurn:
    """Dataset, loader, crops and step of this package."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        sampler = PermutationSampler(len(plan.tiles), 0)
        self.batches = DrawnBatches(plan.tiles, sampler, plan.crops.draw, None, plan.task.batch, seed=0)
        self.trainer: Trainer = our_trainer(plan.task, plan.device, "bf16", plan.crops)

    def __call__(self) -> tuple[float, float]:
        """Seconds of the timed steps, and of waiting for data in them."""
        plan = self.plan
        steps = (self.trainer.step, self.trainer.step + plan.warm + plan.steps)
        pin = plan.device.type == "cuda"
        loaded = load_batches(
            self.batches, Layout(plan.task.batch), steps, workers=plan.workers, prefetch=1 if pin else 2, pin=pin
        )
        feed = Waiting(iter(loaded))
        self.trainer.batches = lambda first, last: feed
        take_steps(self.trainer, plan.warm)
        _wait(plan.device)
        before, started = feed.seconds, time.perf_counter()
        take_steps(self.trainer, plan.steps)
        _wait(plan.device)
        return time.perf_counter() - started, feed.seconds - before


class TheirTurn:
    """Pillow crops in a DataLoader, and the reference step."""

    def __init__(self, plan: Plan, paths: list[Path], step: Step) -> None:
        self.plan, self.step = plan, step
        crops = PillowCrops(plan.crops.view_sizes, IMAGENET.mean, IMAGENET.std)
        needed = plan.task.batch * (plan.warm + plan.steps)
        self.data = TileViews([paths[i % len(paths)] for i in range(needed)], crops, plan.crops.draw)

    def __call__(self) -> tuple[float, float]:
        """Seconds of the timed steps, and of waiting for data in them."""
        feed = Waiting(iter(loader(self.data, self.plan.task.batch, self.plan.workers)))
        for _ in range(self.plan.warm):
            self._take(feed)
        before, started = feed.seconds, time.perf_counter()
        for _ in range(self.plan.steps):
            self._take(feed)
        return time.perf_counter() - started, feed.seconds - before

    def _take(self, feed: Waiting) -> None:
        views: list[Tensor] = next(feed)  # type: ignore[assignment]
        self.step([view.to(self.plan.device, non_blocking=True) for view in views])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def worker_processes() -> int:
    """One for each core but one, at most 15."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores - 1, 15))


def plan_vit_small(tiles: Dataset, setting: Setting) -> Plan:
    """ViT-S/16 as in the original."""
    workers = worker_processes()
    warm, steps = (workers + 1, 20) if setting.on_gpu else (1, 3)
    if setting.quick:
        task = Task("vit:dim=64,depth=2,heads=2", 2, 256, ((2, 32), (3, 16)))
        return Plan(task, tiles, original_crops((32, 16), 3), 1, 1, 1, setting.device)
    task = Task("vit_small", setting.size(16, 256, 0))
    return Plan(task, tiles, original_crops(), workers, warm, steps, setting.device)


def plans(tiles: Dataset, setting: Setting) -> Iterator[tuple[Plan, int]]:
    """ViT-S/16, and a small network on small crops, which needs more images per second."""
    plan = plan_vit_small(tiles, setting)
    yield plan, 1 if setting.quick else 2
    if not setting.quick:
        task = Task("vit_tiny", setting.size(64, 512, 0), 4096, ((2, 96), (6, 48)))
        yield replace(plan, task=task, crops=original_crops((96, 48), 6)), 3


def run(setting: Setting) -> Iterator[Row]:
    """Both plans. The benchmarks ``crops`` and ``step`` check that the results are equal."""
    paths = tile_files(setting.folder / "tiles", setting.size(256, 2048, 4))
    tiles = TileDataset(FolderTiles(paths[0].parent, [path.name for path in paths]))
    for plan, rounds in plans(tiles, setting):
        setting.notice(f"{plan.task.arch} from JPEG files, batch {plan.task.batch}, {plan.workers} worker processes")
        ours = OurTurn(plan)
        theirs = TheirTurn(plan, paths, their_step(plan.task, ours.trainer, setting.original_precision))
        results = [(ours(), theirs()) for _ in setting.rounds(rounds)]
        row = Duel([a[0] for a, _ in results], [b[0] for _, b in results]).row(
            f"from JPEG {plan.task.arch}",
            plan.task.batch * plan.steps,
            "img/s",
            "Pillow in a DataLoader, the original algorithm",
        )
        waits = [sum(r[i][1] for r in results) / sum(r[i][0] for r in results) for i in (0, 1)]
        row.target = 3.0 if setting.on_gpu and not setting.quick and plan.task.arch == "vit_small" else None
        row.note = f"waiting for data {waits[0]:.2%} of a step (target < {LARGEST_WAIT:.0%})"
        row.equality = "asserted by the benchmarks crops and step"
        row.details = {
            "batch": plan.task.batch,
            "workers": plan.workers,
            "our_waiting_share": round(waits[0], 5),
            "their_waiting_share": round(waits[1], 5),
            "waiting_share_wanted": LARGEST_WAIT,
        }
        yield row
