"""A training step with further parts of the objective: beside DINO alone, and beside the same written plainly."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.material import random_views
from benchmarks.measure import Duel, Row, Setting, clock_of, flops, in_turn, without_tf32
from benchmarks.networks import ReadyViews, Task, our_trainer, same_step, take_steps, their_step
from benchmarks.step import TOLERANCE

TITLE = "training step by parts of the objective"
ALONE, PLAIN = "DINO alone", "the same written plainly, eager"
LARGEST_COST = 1.35  # of DINOv2's step, as a multiple of DINO's

SMALL = Task("vit:dim=64,depth=2,heads=2", 4, 256, ((2, 96), (3, 32)))
SQUARES = {"mask_shape": "squares", "mask_probability": 1.0, "mask_ratio": [0.34, 0.4]}
SETS: dict[str, dict[str, Any]] = {
    "dino+kde": {"kde": 0.01},
    "dino+koleo": {"koleo": 0.1},
    "dino+ibot": {"ibot": 1.0},
    "dino+regression": {"regression": 1.0, **SQUARES},
    "dino+ibot+koleo (DINOv2)": {"ibot": 1.0, "koleo": 0.1},
}
DINOV2 = "dino+ibot+koleo (DINOv2)"


def with_parts(task: Task, parts: dict[str, Any]) -> Task:
    """The task with a set of parts; the spreading terms compare at most 16 samples."""
    return replace(task, parts=tuple({**parts, "spread_group": min(16, task.batch)}.items()))


def run(setting: Setting) -> Iterator[Row]:
    """Two rows for each set of parts."""
    base = SMALL if setting.quick else Task("vit_small", setting.size(16, 256, 0))
    precision = setting.original_precision  # as in the benchmark of the step
    views = random_views(base.batch, base.input_dim, base.groups, setting.device)
    for name, parts in SETS.items():
        setting.notice(f"{name}: checking our step against the plain one")
        small = with_parts(SMALL, parts)
        with without_tf32():
            few = random_views(small.batch, small.input_dim, small.groups, setting.device)
            equality = same_step(small, partial(their_step, precision="fp32"), few, TOLERANCE)
        setting.notice(f"{name}, {base.arch}, batch {base.batch}: timing in alternation")
        yield from _measure(name, base, with_parts(base, parts), views, precision, equality, setting)


def _measure(
    name: str, alone: Task, task: Task, views: list[Tensor], precision: str, equality: str, setting: Setting
) -> Iterator[Row]:
    trainers = [our_trainer(one, setting.device, "bf16", ReadyViews(views)) for one in (task, alone)]
    theirs = their_step(task, trainers[0], precision)
    flat = [view for group in views for view in group]
    steps, clock = setting.size(1, 10, 1), clock_of(setting.device)
    ours, dino = (partial(take_steps, trainer, steps) for trainer in trainers)

    def plain() -> None:
        for _ in range(steps):
            theirs(flat)

    times = in_turn([ours, dino, plain], setting.rounds(3), setting.device, clock=clock)
    per_item = flops(lambda: take_steps(trainers[0])) / task.batch
    for comparator, seconds in ((ALONE, times[1]), (PLAIN, times[2])):
        row = Duel(times[0], seconds).row(f"step {task.arch} {name}", task.batch * steps, "img/s", comparator)
        if comparator == PLAIN:
            row.equality = equality
        elif name == DINOV2 and not (setting.on_gpu or setting.quick):
            row.target = round(1 / LARGEST_COST, 3)
        row.details = {
            "clock": clock.__name__,
            "batch": task.batch,
            "out_dim": task.out_dim,
            "views": list(task.groups),
            "objective": dict(task.parts),
            "masked_tokens": 0 if task.mask is None else int(task.mask.sum()),
            "gflop_per_item": round(per_item / 1e9, 2),
        }
        yield row
