"""What watches a run: the log and the checkpoints."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dino import distributed, progress
from dino.errors import CheckpointError, ConfigError
from dino.evaluate.retrieval import effective_rank
from dino.train.checkpoint import LAST, CheckpointFolder
from dino.train.loop import RANKED, NoState, StepReport, Trainer
from dino.train.profiling import DATA, share
from dino.train.run_folder import RunFolder

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
        """Cut the log and the quarantine back to where the run goes on, and recall what the log has shown so far."""
        for line in self.folder.cut_log(trainer.step):
            self.watch(line)
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
            "feature_rank": feature_rank(report.features),
            "samples_per_second": (report.step - step) * trainer.length.global_batch / max(seconds, 1e-9),
            "data_wait": waiting.item(),
            "seconds": seconds,
        }


def feature_rank(features: Tensor) -> float:
    """How many directions the teacher's features of a step's first samples fill, the same on every process.

    Args:
        features: ``(micro-batches, n, D)`` of this process.
    """
    # (micro-batches, processes, n, D): in the order of the draws, so that it does not matter who drew which
    everyone = torch.stack(distributed.gather(features.float().cpu()), dim=1)
    return effective_rank(everyone.flatten(0, 2)[:RANKED])


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
        """Note where the run is safe, and finish what a process that was killed did not come to."""
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
        saved = self.saved_step == report.step or self.save(trainer)  # the judge may have saved this step
        if not saved and (report.final or trainer.stop_early):
            raise CheckpointError(
                f"expected to write the last checkpoint of this run, {self.files.folder / LAST}, found that the disk "
                f"does not take it; the run is safe up to step {self.saved_step}: make room, and run the same command"
            )
        if saved and kept:
            self.name(f"step_{report.step}.pt")

    def save(self, trainer: Trainer) -> bool:
        """Write ``last.pt`` now; on every process, whether that went well.

        Raises:
            ConfigError: If another process has taken the folder over.
        """
        content = self.content(trainer)

        def write() -> None:
            self.folder.sync_log()  # first: a resumed run counts on the lines up to its checkpoint
            self.files.save(content)

        if not self._write(LAST, write):
            return False
        self.saved_step = trainer.step
        self.folder.update_status(last_checkpoint=f"checkpoints/{LAST}", last_checkpoint_step=trainer.step)
        return True

    def name(self, name: str) -> bool:
        """Let the newest checkpoint bear a further name; on every process, whether that went well.

        Raises:
            ConfigError: If another process has taken the folder over.
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
                f"cannot write {self.files.folder / name}: {problem}; the one before is kept, the run goes on"
            )
        return not problem

    def _attempt(self, write: Callable[[], None]) -> str:
        """Do ``write``; a reason where that was not possible, else an empty string."""
        lock = self.folder.lock
        if not lock.is_mine():
            return TAKEN_OVER if lock.is_taken_over() else "the folder has vanished"
        try:
            write()
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
