"""A training step on precomputed views: this package's loop against the original algorithm."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks import facebook
from benchmarks.material import GRID_DIM, random_views
from benchmarks.measure import Row, Setting, duel, flops, without_tf32
from benchmarks.networks import ReadyViews, Task, our_trainer, same_step, take_steps, their_step

TITLE = "training step"
FACEBOOK = "facebookresearch/dino"
SMALL = Task("vit:dim=64,depth=2,heads=2", 2, 256, ((2, 32), (3, 16)))
SMALL_REGION = Task("vit:dim=48,depth=2,heads=2", 2, 256, ((2, 6), (3, 4)), "region", 16)
REGION_GROUPS = ((2, 14), (8, 6))
TOLERANCE = 2e-4  # of fp32 gradients, relative

Make = Callable[[Task, Any], Any]


def tasks(setting: Setting) -> Iterator[tuple[Task, int, float | None]]:
    """Task, number of rounds and target ratio of each row."""
    if setting.quick:
        yield SMALL, 1, None
        yield SMALL_REGION, 1, None
        return
    yield Task("vit_small", setting.size(16, 256, 0)), 3, 2.5 if setting.on_gpu else 1.1
    yield Task("vit_base", setting.size(4, 128, 0)), 2, None
    yield Task("hvit_xs", setting.size(32, 256, 0), 65536, REGION_GROUPS, "region", GRID_DIM), 3, None


def run(setting: Setting) -> Iterator[Row]:
    """Each network against the reference, and against facebookresearch/dino if a checkout is given."""
    precision = setting.original_precision
    makes: dict[str, Make] = {"the original algorithm, eager": partial(their_step, precision=precision)}
    if setting.facebook_dino is not None:
        makes[FACEBOOK] = partial(facebook.step, checkout=setting.facebook_dino, precision=precision)
    for task, rounds, target in tasks(setting):
        for name, make in makes.items():
            if name == FACEBOOK and task.level == "region":
                continue
            setting.notice(f"{task.arch}: checking our step against {name}")
            equality = _equal(task, name, setting)
            setting.notice(f"{task.arch}, batch {task.batch}: timing our step in alternation with {name}")
            yield _measure(task, name, make, setting.rounds(rounds), setting, equality, target)


def _equal(task: Task, name: str, setting: Setting) -> str:
    small = SMALL_REGION if task.level == "region" else SMALL
    make: Make = partial(their_step, precision="fp32")
    if name == FACEBOOK and setting.facebook_dino is not None:
        make = partial(facebook.step, checkout=setting.facebook_dino, precision="fp32")
    views = random_views(small.batch, small.input_dim, small.groups, setting.device)
    with without_tf32():
        return same_step(small, make, views, TOLERANCE)


def _measure(
    task: Task, name: str, make: Make, rounds: Iterable[int], setting: Setting, equality: str, target: float | None
) -> Row:
    views = random_views(task.batch, task.input_dim, task.groups, setting.device)
    trainer = our_trainer(task, setting.device, "bf16", ReadyViews(views))
    theirs = make(task, trainer)
    flat: list[Tensor] = [view for group in views for view in group]
    steps = setting.size(1, 10, 1)  # of a round

    def their_steps() -> None:
        for _ in range(steps):
            theirs(flat)

    result = duel(lambda: take_steps(trainer, steps), their_steps, rounds, setting.device)
    unit = "grids/s" if task.level == "region" else "img/s"
    row = result.row(f"step {task.arch}", task.batch * steps, unit, name, equality=equality, target=target)
    per_item = flops(lambda: take_steps(trainer)) / task.batch
    row.details = {
        "batch": task.batch,
        "out_dim": task.out_dim,
        "views": list(task.groups),
        "gflop_per_item": round(per_item / 1e9, 2),
        "parameters": _parameters(trainer.model.student),
        "comparator_precision": theirs.precision,
    }
    return row


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
