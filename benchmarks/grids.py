"""Level 2 from a folder of ``.pt`` grids: views and training, against one file and one crop at a time."""

from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.material import GRID_DIM, GRID_SIDE, grid_files
from benchmarks.measure import Row, Setting, drain, duel, expect_close
from benchmarks.networks import Task, our_trainer, take_steps, their_step
from benchmarks.reference.data import GridViews, loader
from dino.crops.grids import GridCrops
from dino.data.datasets import GridDataset
from dino.data.grids import GridEntry
from dino.data.loader import Batch, DrawnBatches, Layout, load_batches
from dino.data.packed import GridFiles, pack
from dino.data.samplers import PermutationSampler

TITLE = "level-2 data path"
WORKERS = 1
ENDLESS = 10**9  # steps
VIEWS = ((2, 14), (8, 6))  # of a grid of 16 x 16 cells


class Ours:
    """This package's dataset, loader and crops.

    Args:
        folder: Folder of the grids.
        paths: Grid files.
        batch: Grids in a batch.
        device: Device that applies the crops.
    """

    def __init__(self, folder: Path, paths: list[Path], batch: int, device: torch.device) -> None:
        files = GridFiles(folder, [GridEntry(path) for path in paths], dtype=torch.bfloat16)  # as for bf16 runs
        packed = pack(folder / "packed", files, 0.0)
        self.crops = GridCrops((GRID_SIDE, GRID_SIDE), cells=packed.cells.to(device))
        dataset = GridDataset(files, packed.survey, packed, by_row=True)
        self.batches = DrawnBatches(dataset, PermutationSampler(len(dataset), 0), self.crops.draw, None, batch, seed=0)
        self._feeds: dict[int, Iterator[Batch]] = {}
        self.layout, self.steps, self.device = Layout(batch), len(paths) // batch, device

    def __call__(self, workers: int) -> Iterator[list[Tensor]]:
        """The batches of views of one epoch; the loader is not restarted between calls, as in a run."""
        for batch in islice(self.loaded(workers), self.steps):
            yield self.crops.apply(batch.inputs.to(self.device, non_blocking=True), batch.parameters)

    def loaded(self, workers: int) -> Iterator[Batch]:
        """Batches of an unlimited run."""
        if workers not in self._feeds:
            pin, steps = self.device.type == "cuda", (0, ENDLESS)
            loader = load_batches(self.batches, self.layout, steps, workers=workers, prefetch=2, pin=pin)
            self._feeds[workers] = iter(loader)
        return self._feeds[workers]


def run(setting: Setting) -> Iterator[Row]:
    """Views without a worker process and with one, then training."""
    folder, batch = setting.folder / "grids", setting.size(64, 256, 2)
    paths = grid_files(folder, setting.size(512, 2048, 4))
    ours = Ours(folder, paths, batch, setting.device)
    theirs = GridViews(paths, GRID_SIDE, ours.crops.draw)
    equality = check(ours, theirs)
    for workers in [0] if setting.quick else [0, WORKERS]:
        setting.notice(f"{len(paths)} grids of {GRID_DIM} x {GRID_SIDE} x {GRID_SIDE}, {workers} worker processes")
        slow = loader(theirs, batch, workers)
        result = duel(
            lambda w=workers: drain(ours(w)),
            lambda x=slow: drain([view.to(setting.device) for view in views] for views in x),
            setting.rounds(9),
            setting.device,
        )
        row = result.row(
            f"grids to views, {workers} workers", len(paths), "grids/s", "torch.load and crops, one by one"
        )
        row.equality, row.target = equality, None if setting.quick else 10.0
        row.details = {"grids": len(paths), "batch": batch, "gb": round(len(paths) * GRID_SIDE**2 * GRID_DIM * 4e-9, 2)}
        yield row
    yield training(setting, paths)


def training(setting: Setting, paths: list[Path]) -> Row:
    """Grids per second of training steps including file reading, against one file at a time and the reference step.

    Views are compared by :func:`check`, the step by the benchmark ``step``.
    """
    arch = "vit:dim=48,depth=2,heads=2" if setting.quick else "hvit_xs"
    task = Task(arch, setting.size(32, 256, 2), setting.size(65536, 65536, 256), VIEWS, "region", GRID_DIM)
    workers, steps = (0, 1) if setting.quick else (WORKERS, setting.size(2, 20, 1))
    setting.notice(f"{arch} from grids, batch {task.batch}, {workers} worker processes")
    ours = Ours(paths[0].parent, paths, task.batch, setting.device)
    trainer = our_trainer(task, setting.device, "bf16", ours.crops, lambda first, last: ours.loaded(workers))
    step = their_step(task, trainer, setting.original_precision)
    slow = loader(GridViews(paths, GRID_SIDE, ours.crops.draw), task.batch, workers)
    feed = chain.from_iterable(repeat(slow))  # pass after pass

    def their_turn() -> None:
        for views in islice(feed, steps):
            step([view.to(setting.device, non_blocking=True) for view in views])

    result = duel(lambda: take_steps(trainer, steps), their_turn, setting.rounds(3), setting.device)
    row = result.row(f"from grids {arch}", task.batch * steps, "grids/s", "torch.load, crops one by one, plain step")
    row.equality = "asserted for the views above, for the step by the benchmark step"
    row.target = 10.0 if setting.on_gpu and not setting.quick else None
    row.details = {"batch": task.batch, "workers": workers, "steps": steps, "out_dim": task.out_dim}
    return row


def check(ours: Ours, theirs: GridViews) -> str:
    """Check that the views of the first batch are equal, rounded to bf16.

    Raises:
        RuntimeError: If they differ.
    """
    batch = ours.batches[0]
    groups = ours.crops.apply(batch.inputs.to(ours.device), batch.parameters)
    views = [view.cpu() for group in groups for view in group]
    names = {path.name: index for index, path in enumerate(theirs.paths)}
    worst = 0.0
    for row, (draw, name) in enumerate(zip(batch.draws.tolist(), batch.names, strict=True)):
        expected = _views_of(theirs, names[name.split("#")[0]], draw)
        worst = max(
            [worst, *(float((view[row] - e.bfloat16()).abs().max()) for view, e in zip(views, expected, strict=True))]
        )
    return expect_close("views", worst, 0.0)


def _views_of(theirs: GridViews, index: int, draw: int) -> list[Tensor]:
    """The views of a file for a given draw number."""
    one = GridViews([theirs.paths[index]] * (draw + 1), theirs.side, theirs.draw, theirs.seed)
    return one[draw]
