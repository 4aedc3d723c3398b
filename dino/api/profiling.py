"""``profile=true``: some steps without a run folder, and where their time goes."""

import dataclasses
import math
import os
from typing import Any

from dino import distributed, progress
from dino.api.run import Run
from dino.train.loop import NoState, StepReport, Trainer
from dino.train.profiling import (
    BACKWARD,
    DATA,
    PARTS,
    STARVING,
    STUDENT,
    TEACHER,
    Stopwatch,
    clock_of,
    cores,
    feeding_advice,
    share,
)

FIRST_STEPS = 3  # slower than the others: memory is asked for, kernels are chosen or compiled


class _Laps(NoState):
    """Callback that starts to measure when the warm-up is over, and stops with the last step."""

    def __init__(self, stopwatch: Stopwatch, warmup: int) -> None:
        self.stopwatch, self.warmup = stopwatch, warmup
        self.parts: dict[str, float] = {}

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Start to count after the last step of the warm-up; stop after the last of all."""
        if report.step in (self.warmup, trainer.length.total):
            self.parts = self.stopwatch.take()


def profile(run: Run, steps: int) -> dict[str, Any]:
    """Train some steps without writing anything, and print where the time of a step goes.

    The warm-up also uses up what the workers prepare while the first step is slow: only then does waiting show.

    Args:
        run: What to train.
        steps: Steps to measure.

    Returns:
        What was measured: ``milliseconds`` of each part of a step on the main process, ``samples_per_second`` over all
        processes, ``waiting`` share of the main process and ``slowest_waiting`` of the process that waits longest, and
        ``advice``.
    """
    speed = run.config.speed
    ahead = math.ceil(speed.num_workers * speed.prefetch / run.layout.accumulation)
    warmup = max(0, min(FIRST_STEPS + min(ahead, steps), run.length.total - 1))
    run.length = dataclasses.replace(run.length, total=min(warmup + steps, run.length.total))
    trainer = run.trainer()
    laps = _Laps(Stopwatch(clock_of(run.device)), warmup)
    trainer.callbacks, trainer.span = [laps], laps.stopwatch.span
    progress.say(f"training {warmup} steps to warm up and {run.length.total - warmup} to measure; no run is written")
    trainer.fit()
    waiting = distributed.gather(share(laps.parts, DATA))
    measured = run.length.total - warmup
    numbers = {
        "steps": measured,
        "milliseconds": {name: 1000 * laps.parts.get(name, 0.0) / measured for name in PARTS},
        "samples_per_second": measured * run.layout.global_batch / sum(laps.parts.values()),
        "waiting": waiting[0],
        "slowest_waiting": max(waiting),
        "advice": _advice(run, laps.parts, max(waiting)),
    }
    _show(run, numbers)
    return numbers


def _show(run: Run, numbers: dict[str, Any]) -> None:
    spent = numbers["milliseconds"]
    whole = sum(spent.values())
    rows = [[name, f"{time:.1f}", f"{time / whole:.1%}"] for name, time in spent.items()]
    batch = f"{run.layout.global_batch} samples on {run.device}"
    progress.table([*rows, ["one step", f"{whole:.1f}", "100.0%"]], ["part of a step", "ms", "share"])
    progress.say(f"{numbers['samples_per_second']:.1f} img/s: the mean of {numbers['steps']} steps of {batch}")
    if distributed.world_size() > 1:
        slowest = numbers["slowest_waiting"]
        progress.say(f"these are the times of process 0; the process that waits longest for data waits {slowest:.1%}")
    for line in numbers["advice"]:
        progress.say(line)


def data_advice(run: Run, waiting: float) -> str:
    """What to change in a run whose device waits for data for this share of the time."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return feeding_advice(waiting, run.config.speed.num_workers, cores(), processes)


def _advice(run: Run, parts: dict[str, float], waiting: float) -> list[str]:
    """What a user can do about these times, in words."""
    network = sum(share(parts, name) for name in (TEACHER, STUDENT, BACKWARD))
    lines = [data_advice(run, waiting)] if waiting > STARVING else []
    if run.config.speed.checkpointing:
        lines.append(
            "speed.checkpointing=true computes the student's forward pass twice: leave it out if memory allows"
        )
    if run.device.type == "cuda" and run.config.speed.compile.lower() == "false":
        lines.append("the blocks are run as written: speed.compile=auto compiles them")
    if not lines:
        lines.append(
            f"nothing stands out: the network takes {network:.0%} and the data is there in time "
            f"({waiting:.1%} waiting); a faster step needs a smaller model, fewer or smaller crops, or more devices"
        )
    return lines
