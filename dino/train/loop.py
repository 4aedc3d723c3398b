"""The only training loop: batches to views, views to gradients, one optimizer step after another."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dino import distributed, progress
from dino.crops.resample import to_device
from dino.data.loader import Batch
from dino.errors import DataError, Stopped, TrainingFault
from dino.objectives import Inputs, Masked, Outputs
from dino.precision import autocast, casts_to_bf16
from dino.signals import StopSignal
from dino.train.distill import DTYPES, SelfDistillation
from dino.train.optimizer import Length, SegmentedSchedules, StepValues, clip_gradients, gated_step
from dino.train.profiling import AVERAGE, CLIP, COPY, CROPS, DATA, OPTIMIZER, Span, no_span

RANKED = 64  # samples of a step whose features are used for the effective rank


class Crops(Protocol):
    """What turns a batch into views."""

    def apply(self, pixels: Tensor, /, parameters: dict[str, Tensor]) -> list[Tensor]:
        """Views by size, (V_g, B, C, h, w) on the device of ``pixels``."""
        ...


@dataclass
class StepReport:
    """One completed step, as callbacks get it. Tensors are of this process; reading one waits for the device.

    Attributes:
        step: Steps done so far, this one included.
        values: Scheduled values.
        scheduled: Scheduled values of the objectives, by name.
        loss: Weighted sum of the losses, scalar.
        losses: Losses by name, scalars.
        diagnostics: Further numbers of the objectives by name, scalars.
        grad_norm: Norm of all gradients before clipping, scalar.
        features: (micro-batches, n, D) cls tokens of the teacher, first view of the first samples of each micro-batch.
        batches: Micro-batches of this process.
        flags: (4,) what processes agree on: broken, stop, save, bad; None once :meth:`Trainer.settle` has read it.
        stopping: A process was asked to stop (set when settled).
        save_wanted: A checkpoint is due by time (set when settled).
        final: True on every process when no step follows, unless a callback ends the run.
        save_due: True on every process when this step is to be saved.
    """

    step: int
    values: StepValues
    scheduled: dict[str, float]
    loss: Tensor
    losses: dict[str, Tensor]
    diagnostics: dict[str, Tensor]
    grad_norm: Tensor
    features: Tensor
    batches: list[Batch]
    flags: Tensor | None
    stopping: bool = False
    save_wanted: bool = False
    final: bool = False
    save_due: bool = False

    def numbers(self) -> dict[str, Tensor]:
        """All scalars of the step under their names in the log."""
        losses = {f"loss/{name}": loss for name, loss in self.losses.items()}
        return {"loss": self.loss, **losses, **self.diagnostics, "grad_norm": self.grad_norm.to(self.loss.dtype)}


class NonFiniteStep(TrainingFault):
    """A loss or gradient was not finite on some process; the step changed nothing.

    Attributes:
        report: The step, as this process saw it.
    """

    def __init__(self, report: StepReport) -> None:
        super().__init__(
            f"loss or gradient was not finite at step {report.step}; that step changed no weight. "
            "In a new run, lower optim.lr or set speed.precision=fp32; model.init=RUN starts it from this one's weights"
        )
        self.report = report


class Callback(Protocol):
    """What follows a run, and the base of those that leave methods out.

    Every process calls every callback at the same steps.
    """

    @property
    def state_name(self) -> str:
        """Key of the callback's state in checkpoints."""
        return type(self).__name__

    def start(self, trainer: "Trainer") -> None:
        """Called before the first step."""

    def after_step(self, trainer: "Trainer", report: StepReport) -> None:
        """Called after every step."""

    def state_dict(self) -> dict[str, Any]:
        """State that checkpoints save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""


@dataclass
class Trainer:
    """What the loop works on, and its state.

    Attributes:
        model: Student, teacher and objectives.
        optimizer: Of the student's parameters.
        crops: Turns a batch into views on the device.
        batches: This process's micro-batches of steps ``first ... last - 1``, in order.
        accumulation: Micro-batches per step.
        schedules: Values of each step.
        length: Steps of the run, with all its segments.
        device: Where to compute.
        precision: ``bf16``, ``fp32`` or ``fp64``.
        clip_grad: Largest gradient norm, 0 for no clipping.
        clip_mode: ``per_parameter`` or ``global``.
        largest_quarantine: Largest number of bad samples with which the run goes on.
        callbacks: Called after every step, in this order.
        save_clock: Called after every step; returns True on rank 0 when a checkpoint is due by time.
        span: Measures each part of a step.
        step: Steps done.
        quarantine: Samples that could not be used: reason by name.
        stop_early: Set by a callback, on every process at the same step, to end the run.
    """

    model: SelfDistillation
    optimizer: torch.optim.Optimizer
    crops: Crops
    batches: Callable[[int, int], Iterable[Batch]]
    accumulation: int
    schedules: SegmentedSchedules
    length: Length
    device: torch.device
    precision: str
    clip_grad: float
    clip_mode: str
    largest_quarantine: int
    callbacks: Sequence[Callback] = ()
    save_clock: Callable[[], bool] = lambda: False
    span: Span = no_span
    step: int = 0
    quarantine: dict[str, str] = field(default_factory=dict)
    stop_early: bool = False

    def fit(self) -> None:
        """Train from ``step`` to the end.

        Raises:
            Stopped: If a signal asked for it, or torchrun is gone; callbacks have saved.
            NonFiniteStep: If a loss or gradient was not finite on any process; that step changed nothing.
            DataError: If too many samples are bad.
            KeyboardInterrupt: At a second ctrl-C.
        """
        for callback in self.callbacks:
            callback.start(self)
        with StopSignal().listening() as stop:
            batches = iter(self.batches(self.step, self.length.total))
            earlier: StepReport | None = None
            while self.step < self.length.total and not self.stop_early:
                report = self._step(batches, stop)
                if earlier is not None:
                    self.settle(earlier)  # one step late, so that the device never waits for the host
                stopping = earlier is not None and earlier.stopping
                report.final = stopping or self.step == self.length.total
                report.save_due = report.final or (earlier is not None and earlier.save_wanted)
                for callback in self.callbacks:
                    callback.after_step(self, report)
                if stopping:
                    message = (
                        f"stopped by a signal after step {self.step}, state saved; run the same command again to resume"
                    )
                    raise Stopped(message, stop.received)
                earlier = report
            if earlier is not None:
                self.settle(earlier)

    def settle(self, report: StepReport) -> None:
        """Read what all processes agreed on about a step, once; must be called before anything of it is saved.

        Raises:
            NonFiniteStep: If the step was not finite; it changed nothing.
            DataError: If there are too many bad samples by now.
        """
        if report.flags is None:
            return
        broken, report.stopping, report.save_wanted, bad = (bool(flag) for flag in report.flags.tolist())
        report.flags = None
        if bad:
            self._merge_quarantine(report.batches)
        if broken:
            raise NonFiniteStep(report)

    def _step(self, batches: Iterator[Batch], stop: StopSignal) -> StepReport:
        """One optimizer step; nothing in it makes the host wait for the device."""
        values, scheduled = self.schedules.at(self.step), self.model.scheduled(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        used: list[Batch] = []
        parts = []
        for micro, (inputs, teacher) in enumerate(self._micro_batches(batches, scheduled, used)):
            last, fraction = micro == self.accumulation - 1, 1 / self.accumulation
            with self.autocast():
                part = self.model.accumulate(
                    inputs, scheduled, teacher=teacher, fraction=fraction, last=last, span=self.span
                )
            parts.append(part)
        if values.freeze_last_layer:
            self.model.freeze_last_layer()
        if values.freeze_backbone:
            self.model.freeze_backbone()
        with self.span(CLIP):
            norm, finite = clip_gradients(self.model.student.parameters(), self.clip_grad, self.clip_mode)
        loss = torch.stack([part.loss for part in parts]).sum()
        flags = self._flags(~(finite & torch.isfinite(loss)), stop, any(batch.bad for batch in used))
        finite = flags[0] == 0  # agreed by all processes, still on the device
        with self.span(OPTIMIZER):
            gated_step(self.optimizer, values.lr, values.weight_decay, finite)
        with self.span(AVERAGE):
            self.model.update_teacher(values.momentum, finite)
        self.step += 1
        losses, diagnostics = _sums([part.losses for part in parts]), _sums([part.diagnostics for part in parts])
        features = torch.stack([part.features[:RANKED] for part in parts])
        return StepReport(self.step, values, scheduled, loss, losses, diagnostics, norm, features, used, flags)

    def _micro_batches(
        self, batches: Iterator[Batch], scheduled: dict[str, float], used: list[Batch]
    ) -> Iterator[tuple[Inputs, Outputs | None]]:
        """Inputs of the step's micro-batches, with the teacher's outputs where all are needed before the first.

        Args:
            batches: Where they come from.
            scheduled: Scheduled values of the objectives.
            used: Receives the batches.
        """

        def following() -> Inputs:
            with self.span(DATA):
                used.append(next(batches))
            return self.inputs(used[-1])

        if not self.model.whole_step:
            for _ in range(self.accumulation):
                yield following(), None
            return
        held = [following() for _ in range(self.accumulation)]
        with self.autocast():
            teacher = [self.model.teach(inputs, span=self.span) for inputs in held]
        self.model.prepare(teacher, scheduled)
        yield from zip(held, teacher, strict=True)

    def inputs(self, batch: Batch) -> Inputs:
        """Inputs of the networks for a batch."""
        dtype, keep = DTYPES[self.precision], batch.keep
        with self.span(COPY):
            pixels = batch.inputs.to(self.device, non_blocking=True)
            keep = None if keep is None else keep.to(self.device, dtype, non_blocking=True)
            masked = None if batch.mask is None else Masked.of(batch.mask).to(self.device)
        with self.span(CROPS):
            views = self.crops.apply(pixels, batch.parameters)
            # Autocast accepts any dtype; bf16 views would only be copied to fp32 and back.
            if not casts_to_bf16(self.precision, self.device):
                views = [view.to(dtype) for view in views]
            return Inputs(views, keep, masked)

    def autocast(self) -> AbstractContextManager[Any]:
        """Precision of forward passes."""
        return autocast(self.precision, self.device)

    def _flags(self, broken: Tensor, stop: StopSignal, bad: bool) -> Tensor:
        """(broken, stop, save, bad) as one small tensor that all processes agree on."""
        stopping = stop.received is not None or distributed.is_orphan()
        own = torch.tensor([stopping, self.save_clock(), bad], dtype=torch.float32)
        flags = torch.cat([broken.float().reshape(1), to_device(own, self.device)])
        return distributed.agree(flags)

    def _merge_quarantine(self, batches: Sequence[Batch]) -> None:
        for bad in distributed.gather([pair for batch in batches for pair in batch.bad]):
            for name, reason in bad:
                if name not in self.quarantine:
                    progress.warn(f"{reason}; another sample is used instead")
                self.quarantine[name] = reason
        if len(self.quarantine) > self.largest_quarantine:
            names = "; ".join(list(self.quarantine.values())[:3])
            raise DataError(
                f"expected at most {self.largest_quarantine} samples that cannot be used "
                f"(training.max_bad_fraction), found {len(self.quarantine)}: {names}"
            )


def _sums(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of each name's scalars over the micro-batches."""
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
