"""Schedules, parameter groups, gradient clipping, and an optimizer step that a non-finite gradient leaves undone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino.errors import ConfigError

NAMES = ("adamw", "sgd")
CLIP_MODES = ("per_parameter", "global")


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``start`` to ``end``, after a linear warm-up from 0 (Loshchilov & Hutter, arXiv 1608.03983).

    Attributes:
        start: Value at the end of the warm-up.
        end: Value that the last step approaches but does not reach, as in facebookresearch/dino.
        total: Steps of the run, warm-up included.
        warmup: Steps of the warm-up.
    """

    start: float
    end: float
    total: int
    warmup: int = 0

    def __call__(self, step: int) -> float:
        """Value at ``step``, counted from 0."""
        if step < self.warmup:
            return self.start * step / max(1, self.warmup - 1)
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Ramp:
    """Linear from ``start`` to ``end`` over ``steps``, then constant."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        """Value at ``step``, counted from 0."""
        return self.end if step >= self.steps else self.start + (self.end - self.start) * step / self.steps


@dataclass(frozen=True)
class StepValues:
    """Scheduled values of one step, but for the objectives' own."""

    lr: float
    weight_decay: float
    momentum: float
    freeze_last_layer: bool


@dataclass(frozen=True)
class Schedules:
    """Schedules of a run, but for the objectives' own.

    Attributes:
        lr: Learning rate, already scaled to the global batch.
        weight_decay: Decay of all 2-D parameters.
        momentum: Momentum of the teacher's average.
        freeze_steps: First steps during which the heads' last layers are not updated.
    """

    lr: Cosine
    weight_decay: Cosine
    momentum: Cosine
    freeze_steps: int

    def at(self, step: int) -> StepValues:
        """The values of ``step``, counted from 0."""
        return StepValues(self.lr(step), self.weight_decay(step), self.momentum(step), step < self.freeze_steps)


@dataclass(frozen=True)
class Length:
    """Length of a run: the only place where epochs are converted to steps.

    Attributes:
        samples: Samples of one pass over the data.
        global_batch: Samples of one optimizer step.
        total: Optimizer steps of the run.
    """

    samples: int
    global_batch: int
    total: int

    @classmethod
    def of(cls, samples: int, global_batch: int, epochs: float, max_steps: int | None) -> "Length":
        """Length of a run of ``epochs`` passes, or of ``max_steps`` steps where given.

        Raises:
            ConfigError: If a batch is larger than the data, or the run has no step.
        """
        if global_batch > samples:
            raise ConfigError(
                f"expected at least one batch of data, found {samples} samples for a global batch of {global_batch}; "
                "lower training.batch_size_per_gpu or training.gradient_accumulation"
            )
        total = max_steps if max_steps is not None else round(epochs * samples / global_batch)
        if total < 1:
            raise ConfigError(
                f"expected at least one step, found {total}; raise training.nepochs or training.max_steps"
            )
        return cls(samples, global_batch, total)

    def steps(self, epochs: float) -> int:
        """Steps that ``epochs`` passes take, at most the whole run."""
        return min(self.total, round(epochs * self.samples / self.global_batch))

    def epoch(self, step: int) -> float:
        """Passes done after ``step`` steps."""
        return step * self.global_batch / self.samples


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two groups as in facebookresearch/dino: weights with weight decay; biases and 1-D parameters without."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    fixed = [p for name, p in named if name.endswith(".bias") or p.ndim == 1]
    decayed = [p for name, p in named if not (name.endswith(".bias") or p.ndim == 1)]
    return [{"params": decayed, "decays": True}, {"params": fixed, "decays": False, "weight_decay": 0.0}]


def build_optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum 0.9, as fused kernels, which skip the step where ``found_inf`` is set.

    Args:
        name: ``adamw`` or ``sgd``; learning rate and weight decay are set at each step by :func:`gated_step`.
        module: The student.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name not in NAMES:
        raise ConfigError(f"expected optim.name {' or '.join(NAMES)}, found '{name}'")
    groups = parameter_groups(module)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, mode: str) -> tuple[Tensor, Tensor]:
    """Clip gradients in place to a norm of at most ``largest``.

    Args:
        parameters: Those without gradient are ignored.
        largest: Largest norm; 0 for no clipping.
        mode: ``per_parameter`` clips each tensor by its own norm (DINO), ``global`` all by their common norm.

    Returns:
        Norm over all gradients before clipping, and whether every one is finite; both scalars on the device.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # (P,)
    total = norms.norm()
    if largest > 0:
        scale = (largest / ((total if mode == "global" else norms) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scale.expand(len(gradients)).unbind()))
    return total, torch.isfinite(norms).all()


def gated_step(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, finite: Tensor) -> None:
    """One optimizer step that changes nothing where ``finite`` is false, without a host synchronization.

    Fused optimizers read ``found_inf`` on the device, which gradient scalers use for the same purpose.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
