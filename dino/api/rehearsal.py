"""Training without writing a run: ``dry_run=true``, ``profile=true``, and ``replay`` of a step that was not finite."""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dino import distributed, progress
from dino.api.run import Run
from dino.data import Groups
from dino.errors import ConfigError, DataError
from dino.train.checkpoint import CheckpointFolder, restore
from dino.train.failure import Failure, SampleFinding, examine, read_failure
from dino.train.loop import Callback, NonFiniteStep, StepReport, Trainer
from dino.train.profiling import (
    BACKWARD,
    CROPS,
    DATA,
    PARTS,
    STARVING,
    STUDENT,
    TEACHER,
    Stopwatch,
    clock_of,
    data_advice,
    fraction,
)
from dino.train.run_folder import RunReader
from dino.train.shares import summary

DRY_STEPS = 3  # the first warms up, the others are timed
FIRST_STEPS = 3  # slower than the others: memory is allocated, kernels are chosen or compiled


class _StepTimes(Callback):
    """Records when each step was completed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Record the time once the device is done."""
        report.loss.item()
        self.times.append(time.monotonic())


def dry_run(run: Run) -> dict[str, Any]:
    """Train a few steps, and print what the whole run would take.

    Args:
        run: What to train.

    Returns:
        The numbers printed; ``steps`` are those of the whole run.
    """
    total = run.length.total
    run.length = dataclasses.replace(run.length, total=min(DRY_STEPS, total))
    trainer, timer = run.trainer(), _StepTimes()
    trainer.callbacks = [timer]
    trainer.fit()
    seconds = (timer.times[-1] - timer.times[0]) / max(1, len(timer.times) - 1) if len(timer.times) > 1 else 0.0
    parameters = sum(p.numel() for p in trainer.model.student.parameters())
    numbers = {
        "level": run.level.name,
        "samples": run.level.samples,
        "slides": run.level.split.slides,
        "held_out_samples": run.level.split.held_out_samples,
        "held_out_slides": run.level.split.held_out_slides,
        "steps": total,
        "global_batch": run.layout.global_batch,
        "effective_lr": run.peak_lr,
        "student_parameters": parameters,
        "checkpoint_gb": round(parameters * 4 * 4 / 1e9, 3),  # student, teacher and two Adam moments in fp32
        "hours": round(total * seconds / 3600, 3),
        "device": str(run.device),
    }
    for name, value in numbers.items():
        progress.say(f"{name:>20}  {value}")
    if run.level.groups is not None:
        _print_groups(run.level.groups)
    return numbers


def _print_groups(groups: Groups) -> None:
    found = summary(groups, np.zeros(len(groups), np.int64))
    rows = [[one["group"], f"{one['tiles']:,}", f"{one['expected']:.3%}"] for one in found["shares"]]
    more = f" (the {len(rows)} largest of {len(groups):,})" if len(rows) < len(groups) else ""
    progress.table(rows, [f"group{more}", "tiles", "share of draws"])


class _Measurement(Callback):
    """Measures from the end of the warm-up to the last step."""

    def __init__(self, stopwatch: Stopwatch, warmup: int) -> None:
        self.stopwatch, self.warmup = stopwatch, warmup
        self.parts: dict[str, float] = {}

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Start after the last step of the warm-up; stop after the last of all."""
        if report.step in (self.warmup, trainer.length.total):
            self.parts = self.stopwatch.take()


def profile(run: Run) -> dict[str, Any]:
    """Train some steps, and print where the time of a step goes.

    The warm-up also uses up the batches that workers prefetch during the slow first steps: only then does waiting show.

    Args:
        run: What to train.

    Returns:
        ``steps`` measured, ``milliseconds`` of each part of a step on the main process, ``samples_per_second`` over all
        processes, ``waiting``, the fraction of the time that the main process waits for data, ``slowest_waiting``, that
        of the process that waits longest, and ``advice``.

    Raises:
        ConfigError: If no step is to be measured.
    """
    steps, speed = run.config.profile_steps, run.config.speed
    if steps < 1:
        raise ConfigError(f"expected profile_steps of at least 1, found {steps}")
    ahead = math.ceil(speed.num_workers * speed.prefetch / run.layout.accumulation)
    warmup = max(0, min(FIRST_STEPS + min(ahead, steps), run.length.total - 1))
    run.length = dataclasses.replace(run.length, total=min(warmup + steps, run.length.total))
    trainer = run.trainer()
    measurement = _Measurement(Stopwatch(clock_of(run.device)), warmup)
    trainer.callbacks, trainer.span = [measurement], measurement.stopwatch.span
    progress.say(f"training {warmup} steps to warm up and {run.length.total - warmup} to measure; no run is written")
    trainer.fit()
    waiting = distributed.gather(fraction(measurement.parts, DATA))
    measured = run.length.total - warmup
    numbers = {
        "steps": measured,
        "milliseconds": {name: 1000 * measurement.parts.get(name, 0.0) / measured for name in PARTS},
        "samples_per_second": measured * run.layout.global_batch / sum(measurement.parts.values()),
        "waiting": waiting[0],
        "slowest_waiting": max(waiting),
        "advice": _advice(run, measurement.parts, max(waiting)),
    }
    _print_profile(run, numbers)
    return numbers


def _print_profile(run: Run, numbers: dict[str, Any]) -> None:
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


def _advice(run: Run, parts: dict[str, float], waiting: float) -> list[str]:
    """What the user can change about these times."""
    network, crops = sum(fraction(parts, name) for name in (TEACHER, STUDENT, BACKWARD)), fraction(parts, CROPS)
    lines = [data_advice(waiting, run.config.speed.num_workers)] if waiting > STARVING else []
    if run.config.speed.checkpointing:
        lines.append(
            "speed.checkpointing=true computes the student's forward pass twice: leave it out if memory allows"
        )
    if run.device.type == "cuda" and run.config.speed.compile.lower() == "false":
        lines.append("the blocks are not compiled: speed.compile=auto compiles them")
    if crops > network:
        lines.append(
            f"the crops take {crops:.0%} of a step, the network {network:.0%}: fewer or smaller crops "
            "(aug.local_crops_number, …) make a step faster, but are another run"
        )
    if not lines:
        lines.append(
            f"no bottleneck: the network takes {network:.0%} and data is ready in time "
            f"({waiting:.1%} waiting); a faster step needs a smaller model, fewer or smaller crops, or more devices"
        )
    return lines


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        step: The step that failed.
        again: Whether it was not finite this time either.
        samples: Each of its samples by itself, in the order of their draws.
    """

    step: int
    again: bool
    samples: list[SampleFinding]

    @property
    def suspects(self) -> list[SampleFinding]:
        """Samples that are not finite by themselves."""
        return [sample for sample in self.samples if not sample.is_finite]


def replay(folder: Path, changes: Sequence[str] = ()) -> Replay:
    """Repeat the step that ``RUN/failure`` describes; nothing is written.

    One process trains from the newest checkpoint before the step (or from the start) with the same samples, crops and
    drop-path, examines each sample of the step by itself, and then takes the step.

    Args:
        folder: ``RUN/failure``.
        changes: Settings to change for the replay as ``key=value`` words, e.g. ``["speed.precision=fp32"]``.

    Raises:
        CheckpointError: If the record or the checkpoints are damaged.
        DataError: If the step's samples are not what they were.
        ConfigError: If the run's settings are gone, or its batch cannot be laid out on one process.
    """
    failure = read_failure(folder)
    reader = RunReader(folder.resolve().parent)
    run = _rebuild(reader, failure, changes)
    trainer = _train_before(run, failure, CheckpointFolder(reader.checkpoints))
    batches = list(run.batches(trainer.model.student.backbone.depth, failure.step - 1, failure.step))
    _expect_same(failure, [name for batch in batches for name in batch.names])
    samples = [finding for batch in batches for finding in examine(trainer, batch, failure.step - 1)]
    return Replay(failure.step, not _is_finite(trainer, failure.step), samples)


def _rebuild(reader: RunReader, failure: Failure, changes: Sequence[str]) -> Run:
    """The run on one process, with the same global batch."""
    micro_batches = len(failure.facts["processes"]) * reader.config().training.gradient_accumulation
    config = reader.config([f"training.gradient_accumulation={micro_batches}", "speed.num_workers=0", *changes])
    run = Run(config, distributed.choose_device(config.speed.device), reader.segments())
    if run.layout.global_batch != len(failure.draws):
        raise ConfigError(
            f"expected a global batch of {len(failure.draws)} as in the failed step, found {run.layout.global_batch}; "
            "set training.batch_size_per_gpu and training.gradient_accumulation so that it is the same"
        )
    return run


def _train_before(run: Run, failure: Failure, checkpoints: CheckpointFolder) -> Trainer:
    """The trainer in its state before the failed step."""
    trainer = run.trainer()
    saved = checkpoints.load()
    if saved is not None and saved["step"] < failure.step:
        restore(trainer, saved)
    progress.say(f"replaying {failure.step - 1 - trainer.step} steps before step {failure.step}")
    _fit_until(trainer, failure.step - 1)
    return trainer


def _fit_until(trainer: Trainer, step: int) -> None:
    trainer.length = dataclasses.replace(trainer.length, total=step)
    trainer.fit()


def _is_finite(trainer: Trainer, step: int) -> bool:
    try:
        _fit_until(trainer, step)
    except NonFiniteStep:
        return False
    return True


def _expect_same(failure: Failure, names: list[str]) -> None:
    changed = [(old, new) for old, new in zip(failure.names, names, strict=True) if old != new]
    if changed:
        raise DataError(
            f"expected the samples of step {failure.step} as they were, found {changed[0][1]} in the place of "
            f"{changed[0][0]} ({len(changed)} differ); restore the data"
        )
