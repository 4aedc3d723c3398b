"""Callbacks of the training loop: the log with its warnings and trackers, and the checkpoints."""

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino import distributed, progress
from dino.config.schema import LoggingConfig
from dino.errors import CheckpointError, ConfigError
from dino.evaluate.retrieval import effective_rank
from dino.evaluate.verdict import COLLAPSED_RANK
from dino.objectives import Condition
from dino.train.checkpoint import LAST, CheckpointFolder
from dino.train.loop import RANKED, Callback, StepReport, Trainer
from dino.train.profiling import DATA, STARVING, GpuUse, Stopwatch, busy_cores_warning, clock_of, data_advice, fraction
from dino.train.run_folder import RunFolder

WANDB_MODES = ("online", "offline")
TAKEN_OVER = "another process uses the folder now"
LINES = 10  # consecutive lines of the log in which a sign of collapse must show
WARMUP_LINES = 1  # lines before data_wait counts: workers start, and their prefetched batches are used up
FEW_SAMPLES = 16  # fewer samples may have a low rank by chance

Line = Mapping[str, Any]
Tracker = Callable[[int, Line], None]
Watch = Callable[[Line], Sequence[str]]


class MetricsLog(Callback):
    """Writes ``metrics.jsonl``, TensorBoard curves and ``status.json``, and advances the progress bar.

    Args:
        folder: The run folder.
        every_steps: Steps between lines.
        trackers: Further receivers of ``(step, numbers)``, such as TensorBoard.
        watches: Each gets every line; what it returns is shown as warnings.

    Attributes:
        bar: Advanced at every step; set before the first one.
    """

    def __init__(
        self,
        folder: RunFolder,
        every_steps: int,
        trackers: Sequence[Tracker] = (),
        watches: Sequence[Watch] = (),
    ) -> None:
        self.folder, self.every_steps = folder, every_steps
        self.trackers, self.watches = list(trackers), list(watches)
        self.bar: progress.Bar | None = None
        self._since = (time.monotonic(), 0)

    def start(self, trainer: Trainer) -> None:
        """Cut log and quarantine back to the step where the run resumes, and show the watches the lines kept."""
        for line in self.folder.cut_log(trainer.step):
            self._warnings(line)
        if trainer.schedules.segment and trainer.schedules.begins_at(trainer.step):
            self.folder.log({"step": trainer.step, "segment": trainer.schedules.segment.to_dict()})
        self.folder.write_quarantine(trainer.quarantine)
        self._since = (time.monotonic(), trainer.step)
        self._stopwatch = Stopwatch(clock_of(trainer.device), {DATA})
        trainer.span = self._stopwatch.span
        self._gpu_use = GpuUse(trainer.device)
        warning = busy_cores_warning(trainer.device)
        if warning:
            progress.warn(warning)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Write a line when one is due."""
        self._advance(1)
        self.folder.write_quarantine(trainer.quarantine)
        if report.step % self.every_steps and report.step != trainer.length.total:
            return
        line = {"step": report.step, "epoch": trainer.length.epoch(report.step), **self._numbers(trainer, report)}
        self.folder.log(line)
        self._track(report.step, line)
        for warning in self._warnings(line):
            self.folder.warn(warning)
        left = trainer.length.total - report.step
        seconds = trainer.length.global_batch / line["samples_per_second"]
        self.folder.update_status(
            state="running",
            step=report.step,
            total_steps=trainer.length.total,
            eta_seconds=round(left * seconds),
            bad_files=len(trainer.quarantine),
            samples_per_second=round(line["samples_per_second"], 1),
            data_wait=round(line["data_wait"], 3),
        )
        self._advance(0, _note(line, memory_gb(trainer.device)))

    def _advance(self, count: int, note: str = "") -> None:
        if self.bar is not None:
            self.bar.advance(count, note)

    def _warnings(self, line: Line) -> list[str]:
        return [warning for watch in self.watches for warning in watch(line)]

    def _track(self, step: int, line: Line) -> None:
        for tracker in tuple(self.trackers):
            try:
                tracker(step, line)
            except Exception as error:  # a full disk or a lost connection must not end a run
                self.trackers.remove(tracker)
                self.folder.warn(
                    f"curves are no longer sent: {type(error).__name__}: {error}; metrics.jsonl has them all"
                )

    def _numbers(self, trainer: Trainer, report: StepReport) -> dict[str, float]:
        own = report.numbers()
        means = distributed.mean_over_ranks(torch.stack(list(own.values()))).tolist()
        numbers: dict[str, float] = dict(zip(own, means, strict=True))
        for objective in trainer.model.objectives:
            numbers |= objective.log_values(numbers)
        if len(report.losses) == 1:  # then it is the loss
            numbers = {name: number for name, number in numbers.items() if not name.startswith("loss/")}
        # Read only now that the device has finished the step. The process that waits longest delays all others.
        waiting = distributed.agree(torch.tensor([fraction(self._stopwatch.take(), DATA)]).to(trainer.device))
        then, step = self._since
        self._since = (time.monotonic(), report.step)
        seconds = self._since[0] - then
        return {
            **numbers,
            "lr": report.values.lr,
            "weight_decay": report.values.weight_decay,
            "momentum": report.values.momentum,
            **report.scheduled,
            "feature_rank": feature_rank(report.features),
            "samples_per_second": (report.step - step) * trainer.length.global_batch / max(seconds, 1e-9),
            "data_wait": waiting.item(),
            "seconds": seconds,
            **self._gpu_use(),
        }


def _note(line: Line, memory: float) -> str:
    """A line of the log in short, for the progress bar."""
    losses = ", ".join(
        f"{name.partition('/')[2]} {value:.3f}" for name, value in line.items() if name.startswith("loss/")
    )
    return (
        f"loss {line['loss']:.3f}{f' ({losses})' if losses else ''}, lr {line['lr']:.2e}, "
        f"{line['samples_per_second']:.1f} img/s, data wait {line['data_wait']:.0%}, memory {memory:.1f} GB"
    )


def memory_gb(device: torch.device) -> float:
    """Most memory so far in GB: of torch's tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def feature_rank(features: Tensor) -> float:
    """Effective rank of the teacher's features of a step's first samples, the same on every process.

    Args:
        features: (micro-batches, n, D) of this process.
    """
    # (micro-batches, processes, n, D): in the order of the draws, whichever process drew them
    everyone = torch.stack(distributed.gather(features.float().cpu()), dim=1)
    return effective_rank(everyone.flatten(0, 2)[:RANKED])


class CollapseWatch:
    """Returns a warning once a sign of collapse has lasted for :data:`LINES` lines; a run is never stopped for it.

    Args:
        signs: Warnings of the objectives, by text.
        warmup: Steps of all warm-ups, in which such signs are normal.
        samples: Samples of a step; with few of them the rank of the features is ignored.
    """

    def __init__(self, signs: Mapping[str, Condition], warmup: int, samples: int = FEW_SAMPLES) -> None:
        self.signs, self.warmup = dict(signs), warmup
        if samples >= FEW_SAMPLES:
            # Features can lose rank while prototypes are still distinguished (Jing et al. 2022, arXiv 2110.09348).
            self.signs[
                "the teacher's features have an effective rank near 1 (feature_rank), so they hardly distinguish "
                "samples: lower optim.lr, raise training.warmup_epochs or model.momentum_teacher, or train on samples "
                "that differ more"
            ] = lambda line: line.get("feature_rank", math.inf) < COLLAPSED_RANK
        self._lasting = dict.fromkeys(self.signs, 0)

    def __call__(self, line: Line) -> list[str]:
        """Warnings after a line of the log; most often none.

        Args:
            line: ``step``, ``feature_rank``, and what the objectives' conditions read.
        """
        if line["step"] <= self.warmup:
            return []
        for sign, shows in self.signs.items():
            self._lasting[sign] = self._lasting[sign] + 1 if shows(line) else 0
        return [sign for sign, lines in self._lasting.items() if lines == LINES]


class StarvationWatch:
    """Returns a warning, once, when a run waits for data.

    Args:
        workers: ``speed.num_workers``.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._lines, self._warned = 0, False

    def __call__(self, line: Line) -> list[str]:
        """Warnings after a line of the log; most often none.

        Args:
            line: ``data_wait``, the fraction of the time since the previous line that was spent waiting for data.
        """
        self._lines += 1
        if self._warned or self._lines <= WARMUP_LINES or line["data_wait"] <= STARVING:
            return []
        self._warned = True
        return [data_advice(line["data_wait"], self.workers)]


class Checkpoints(Callback):
    """Saves the run every so many steps or minutes, when it is stopped, and at its end.

    Args:
        files: The checkpoint folder.
        content: Returns the content of a checkpoint; called on every process.
        folder: The run folder.
        every_steps: Steps between checkpoints, 0 for by time alone.
        keep_every_steps: Steps between checkpoints that are kept as ``step_*.pt``, 0 for never.
    """

    def __init__(
        self,
        files: CheckpointFolder,
        content: Callable[[Trainer], dict[str, Any]],
        folder: RunFolder,
        every_steps: int,
        keep_every_steps: int,
    ) -> None:
        self.files, self.content, self.folder = files, content, folder
        self.every_steps, self.keep_every_steps = every_steps, keep_every_steps
        self.saved_step = 0

    def start(self, trainer: Trainer) -> None:
        """Record which step is saved, and write the ``step_*.pt`` that a killed process may have left out."""
        self.saved_step = trainer.step
        if trainer.step == 0:
            return
        self.folder.update_status(last_checkpoint=f"checkpoints/{self.files.newest}", last_checkpoint_step=trainer.step)
        if self._is_kept(trainer.step):
            self.name(f"step_{trainer.step}.pt")

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Save when it is due."""
        by_steps = self.every_steps > 0 and report.step % self.every_steps == 0
        kept = self._is_kept(report.step)
        if not (by_steps or kept or report.save_due or trainer.stop_early):
            return
        trainer.settle(report)
        saved = self.saved_step == report.step or self.save(trainer)  # an earlier callback may have saved this step
        if not saved and (report.final or trainer.stop_early):
            raise CheckpointError(
                f"expected to write the last checkpoint of this run, {self.files.folder / LAST}, found that the disk "
                f"does not take it; the run is safe up to step {self.saved_step}: make room, and run the same command"
            )
        if saved and kept:
            self.name(f"step_{report.step}.pt")

    def save(self, trainer: Trainer) -> bool:
        """Write ``last.pt``; on every process, whether it was written.

        Raises:
            ConfigError: If another process uses the folder now.
        """
        content = self.content(trainer)

        def write() -> None:
            self.folder.sync_log()  # first: a resumed run expects the lines up to its checkpoint
            self.files.save(content)

        if not self._write(LAST, write):
            return False
        self.saved_step = trainer.step
        self.folder.update_status(last_checkpoint=f"checkpoints/{LAST}", last_checkpoint_step=trainer.step)
        return True

    def name(self, name: str) -> bool:
        """Give the newest checkpoint a further name; on every process, whether that succeeded.

        Raises:
            ConfigError: If another process uses the folder now.
        """
        return self._write(name, lambda: self.files.keep_last_as(name))

    def _is_kept(self, step: int) -> bool:
        return self.keep_every_steps > 0 and step % self.keep_every_steps == 0

    def _write(self, name: str, write: Callable[[], None]) -> bool:
        problem = distributed.broadcast(self._attempt(write) if distributed.is_main() else "")
        if problem == TAKEN_OVER:
            raise ConfigError(
                f"expected {self.folder.path} to be this run's, found that {problem}; nothing was written"
            )
        if problem:
            self.folder.warn(
                f"cannot write {self.files.folder / name}: {problem}; the previous one is kept, the run goes on"
            )
        return not problem

    def _attempt(self, write: Callable[[], None]) -> str:
        """Call ``write``; the reason where it failed, else an empty string."""
        lock = self.folder.lock
        if not lock.is_mine():
            return TAKEN_OVER if lock.is_taken_over() else "the folder has vanished"
        try:
            write()
        except OSError as error:
            return error.strerror or str(error)
        return ""


class SaveClock:
    """Returns whether a checkpoint is due by time; True on one process suffices.

    Args:
        minutes: Minutes between checkpoints, 0 for never.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = minutes * 60
        self._next = time.monotonic() + self.seconds

    def __call__(self) -> bool:
        """True once per interval, on the main process."""
        if self.seconds <= 0 or not distributed.is_main() or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self.seconds
        return True


def build_trackers(folder: Path, config: dict[str, Any], log: LoggingConfig) -> tuple[Tracker, ...]:
    """Where curves go besides ``metrics.jsonl``: the trackers asked for, on the main process only.

    Args:
        folder: The run folder.
        config: The resolved settings, which are recorded with the curves.
        log: Which trackers.

    Raises:
        ConfigError: If a wanted tracker is not installed, or W&B cannot be reached.
    """
    if not distributed.is_main():
        return ()
    wanted = [(log.tensorboard, _tensorboard), (log.wandb, partial(_wandb, log)), (log.mlflow, _mlflow)]
    return tuple(build(folder, config) for chosen, build in wanted if chosen)


def _tensorboard(folder: Path, config: dict[str, Any]) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "logging.tensorboard=true needs tensorboard: pip install tensorboard, or set logging.tensorboard=false"
        ) from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(step: int, numbers: Line) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def _wandb(log: LoggingConfig, folder: Path, config: dict[str, Any]) -> Tracker:
    if log.wandb_mode not in WANDB_MODES:
        raise ConfigError(f"expected logging.wandb_mode {' or '.join(WANDB_MODES)}, found '{log.wandb_mode}'")
    try:
        import wandb
        from wandb.errors import Error
    except ImportError:
        raise ConfigError("logging.wandb=true needs an extra: pip install 'histodino[wandb]'") from None
    try:
        run = wandb.init(
            dir=str(folder),
            id=folder.name,
            project=log.wandb_project,
            name=log.wandb_name or folder.name,
            group=log.wandb_group,
            mode=log.wandb_mode,  # type: ignore[arg-type]
            resume="allow" if log.wandb_mode == "online" else None,
            config=config,
        )
    except (Error, OSError, ValueError) as error:  # no key, no network, or a name that W&B does not take
        raise ConfigError(
            f"expected W&B to accept the run, found: {' '.join(str(error).split())}; run `wandb login`, or set "
            "logging.wandb_mode=offline, or logging.wandb=false"
        ) from None
    return lambda step, numbers: run.log(dict(numbers), step=step)


def _mlflow(folder: Path, config: dict[str, Any]) -> Tracker:
    try:
        import mlflow  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError("logging.mlflow=true needs an extra: pip install 'histodino[mlflow]'") from None
    mlflow.start_run(run_name=folder.name)
    mlflow.log_dict(config, "config.json")
    return lambda step, numbers: mlflow.log_metrics(dict(numbers), step=step)
