"""What changes from step to step: learning rate, weight decay, teacher momentum and temperature."""

import math
from dataclasses import dataclass

from dino.errors import ConfigError


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``start`` to ``end``, after a linear warm-up from 0 (Loshchilov & Hutter, arXiv 1608.03983).

    Attributes:
        start: Value when the warm-up is over.
        end: Value that the last step comes close to, as in facebookresearch/dino.
        total: Steps of the whole run.
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
        share = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Ramp:
    """A straight line from ``start`` to ``end`` over ``steps``, then constant."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        """Value at ``step``, counted from 0."""
        return self.end if step >= self.steps else self.start + (self.end - self.start) * step / self.steps


@dataclass(frozen=True)
class StepValues:
    """The scheduled values of one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    freeze_last_layer: bool


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run.

    Attributes:
        lr: Learning rate, already scaled to the global batch.
        weight_decay: Decay of all 2-D parameters.
        momentum: Momentum of the teacher's average.
        teacher_temp: Temperature of the teacher.
        freeze_steps: First steps during which the head's last layer is not updated.
    """

    lr: Cosine
    weight_decay: Cosine
    momentum: Cosine
    teacher_temp: Ramp
    freeze_steps: int

    def at(self, step: int) -> StepValues:
        """The values of ``step``, counted from 0."""
        return StepValues(
            self.lr(step),
            self.weight_decay(step),
            self.momentum(step),
            self.teacher_temp(step),
            step < self.freeze_steps,
        )


@dataclass(frozen=True)
class Length:
    """How long a run is: epochs are converted to steps here, once.

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
            ConfigError: If a batch is larger than the data, or no step is left.
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
