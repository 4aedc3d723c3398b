"""What watches a run: the log, the checkpoints, and the judge."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dino import distributed, progress
from dino.errors import CheckpointError, ConfigError
from dino.models.backbone import Backbone
from dino.train.checkpoint import BEST, LAST, CheckpointFolder
from dino.train.loop import NoState, StepReport, Trainer
from dino.train.profiling import DATA, share
from dino.train.run_folder import RunFolder

Scores = dict[str, float]
TAKEN_OVER = "another process has taken the folder over"


class MetricsLog(NoState):
    """Writes ``metrics.jsonl``, TensorBoard curves, ``status.json`` and moves the progress bar.

    Args:
        folder: The run folder.
        every_steps: Steps between lines.
        out_dim: Number of prototypes K: loss and entropy are also given relative to ln K.
        bar: The progress bar.
        trackers: Further receivers of ``(step, numbers)``, such as TensorBoard.
        watch: Sees every line; what it gives back is shown as a warning.
        parts: What the time since it was last asked was spent on, in seconds.
    """

    def __init__(
        self,
        folder: RunFolder,
        every_steps: int,
        out_dim: int,
        bar: progress.Bar,
        trackers: Sequence[Callable[[int, Mapping[str, float]], None]] = (),
        watch: Callable[[Mapping[str, float]], Sequence[str]] = lambda line: (),
        parts: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.folder, self.every_steps, self.bar = folder, every_steps, bar
        self.trackers, self.watch, self.parts = list(trackers), watch, parts
        self.log_k = math.log(out_dim)
        self._since = (time.monotonic(), 0)

    def start(self, trainer: Trainer) -> None:
        """Cut the log and the quarantine back to where the run goes on."""
        self.folder.cut_log(trainer.step)
        self.folder.write_quarantine(trainer.quarantine)
        self._since = (time.monotonic(), trainer.step)
        self.parts()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Write a line when one is due."""
        self.bar.advance()
        self.folder.write_quarantine(trainer.quarantine)
        if report.step % self.every_steps and report.step != trainer.length.total:
            return
        line = {"step": report.step, "epoch": trainer.length.epoch(report.step), **self._numbers(trainer, report)}
        self.folder.log(line)
        self._track(report.step, line)
        for sign in self.watch(line):
            self.folder.warn(sign)
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
        self.bar.advance(0, f"loss {line['loss']:.3f} ({line['samples_per_second']:.1f} img/s)")

    def _track(self, step: int, line: Mapping[str, float]) -> None:
        for tracker in tuple(self.trackers):
            try:
                tracker(step, line)
            except Exception as error:  # a full disk or a lost connection: curves are no reason to lose a run
                self.trackers.remove(tracker)
                self.folder.warn(
                    f"curves are no longer sent: {type(error).__name__}: {error}; metrics.jsonl has them all"
                )

    def _numbers(self, trainer: Trainer, report: StepReport) -> dict[str, float]:
        own = torch.stack([report.loss, report.teacher_entropy, report.grad_norm.to(report.loss.dtype)])
        loss, entropy, grad_norm = distributed.mean_over_ranks(own).tolist()
        # Read once the device has come this far anyway. The process that waits longest holds up all others.
        waiting = distributed.agree(torch.tensor([share(self.parts(), DATA)]).to(trainer.device))
        then, step = self._since
        self._since = (time.monotonic(), report.step)
        seconds = self._since[0] - then
        return {
            "loss": loss,
            "loss_relative": loss / self.log_k,
            "teacher_entropy": entropy,
            "teacher_entropy_relative": entropy / self.log_k,
            "lr": report.values.lr,
            "weight_decay": report.values.weight_decay,
            "momentum": report.values.momentum,
            "teacher_temp": report.values.teacher_temp,
            "grad_norm": grad_norm,
            "samples_per_second": (report.step - step) * trainer.length.global_batch / max(seconds, 1e-9),
            "data_wait": waiting.item(),
            "seconds": seconds,
        }


class Checkpoints(NoState):
    """Saves the run every so many steps or minutes, when it is stopped, and at its end.

    Args:
        files: The checkpoint folder.
        content: Builds what a checkpoint holds; called on every process.
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
        """Note where the run is safe."""
        self.saved_step = trainer.step

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Save when it is due."""
        by_steps = self.every_steps > 0 and report.step % self.every_steps == 0
        kept = self.keep_every_steps > 0 and report.step % self.keep_every_steps == 0
        if not (by_steps or kept or report.save_due or trainer.stop_early):
            return
        trainer.settle(report)
        also = (f"step_{report.step}.pt",) if kept else ()
        if not self.save(trainer, *also) and (report.final or trainer.stop_early):
            raise CheckpointError(
                f"expected to write the last checkpoint of this run, {self.files.folder / LAST}, found that the disk "
                f"does not take it; the run is safe up to step {self.saved_step}: make room, and run the same command"
            )

    def save(self, trainer: Trainer, *also: str) -> bool:
        """Write ``last.pt`` now; on every process, whether that went well.

        Args:
            trainer: What to save.
            also: Further names for the same checkpoint.

        Raises:
            ConfigError: If another process has taken the folder over.
        """
        content = self.content(trainer)
        problem = distributed.broadcast(self._write(content, also) if distributed.is_main() else "")
        if problem == TAKEN_OVER:
            raise ConfigError(
                f"expected {self.folder.path} to be this run's, found that {problem}; nothing was written"
            )
        if problem:
            self.folder.warn(
                f"cannot write {self.files.folder / LAST}: {problem}; the one before is kept, the run goes on"
            )
            return False
        self.saved_step = trainer.step
        self.folder.update_status(last_checkpoint=f"checkpoints/{LAST}", last_checkpoint_step=trainer.step)
        return True

    def _write(self, content: dict[str, Any], also: tuple[str, ...]) -> str:
        """Write a checkpoint; a reason where that was not possible, else an empty string."""
        lock = self.folder.lock
        if not lock.is_mine():
            return TAKEN_OVER if lock.is_anothers() else "the folder has vanished"
        try:
            self.files.save(content)
            for name in also:
                self.files.keep_last_as(name)
        except OSError as error:
            return error.strerror or str(error)
        return ""


class SaveClock:
    """Tells when a checkpoint is due by time; asked on every process, the first to say yes decides.

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


class Judge:
    """kNN of teacher and student on labelled images while training; keeps ``best.pt`` and ends a run that stalls.

    Args:
        score: Scores of a backbone; called on every process, returns the same numbers on each.
        tracked: Which score decides, e.g. ``knn_20_accuracy``.
        every_steps: Steps between evaluations.
        patience: Evaluations without a better score before the run ends, 0 for never.
        folder: The run folder.
        checkpoints: Saves ``last.pt``, of which ``best.pt`` is a copy.
    """

    def __init__(
        self,
        score: Callable[[Backbone], Scores],
        tracked: str,
        every_steps: int,
        patience: int,
        folder: RunFolder,
        checkpoints: Checkpoints,
    ) -> None:
        self.score, self.tracked, self.every_steps, self.patience = score, tracked, every_steps, patience
        self.folder, self.checkpoints = folder, checkpoints
        self.best: float | None = None
        self.misses = 0
        self.untrained: Scores = {}
        self.latest: Scores = {}

    def start(self, trainer: Trainer) -> None:
        """Judge the start weights, as the floor of the run."""
        if trainer.step == 0:
            self.untrained = self.score(trainer.model.teacher.backbone)
            self.folder.log({"step": 0, "evaluation": {"untrained": self.untrained}})
            progress.say(f"untrained: {_shown(self.untrained)}")

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Evaluate when it is due, keep the best, and count what is not better."""
        if report.step % self.every_steps and report.step != trainer.length.total:
            return
        trainer.settle(report)
        scores = {"teacher": self.score(trainer.model.teacher.backbone)}
        scores["student"] = self.score(trainer.model.student.backbone)
        self.latest = scores["teacher"]
        self.folder.log({"step": report.step, "evaluation": scores})
        progress.say(f"step {report.step}: teacher {_shown(scores['teacher'])}; student {_shown(scores['student'])}")
        if self.best is None or self.latest[self.tracked] > self.best:
            before = self.best
            self.best, self.misses = self.latest[self.tracked], 0  # first, because the checkpoint holds them
            if not self.checkpoints.save(trainer, BEST):
                self.best = before
            return
        self.misses += 1
        trainer.stop_early = 0 < self.patience <= self.misses

    def state_dict(self) -> dict[str, Any]:
        """Best score, misses, and the scores of the start weights."""
        return {"best": self.best, "misses": self.misses, "untrained": self.untrained, "latest": self.latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where the run was saved."""
        self.best, self.misses = state["best"], state["misses"]
        self.untrained, self.latest = state["untrained"], state["latest"]


def _shown(scores: Scores) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if value is not None)
