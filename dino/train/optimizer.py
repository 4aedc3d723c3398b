"""Schedules and segments of a run, parameter groups, clipping, and a step that a non-finite gradient leaves undone."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dino.config.schema import ExtendConfig, OptimConfig, PretrainConfig
from dino.errors import ConfigError

NAMES = ("adamw", "sgd")
CLIP_MODES = ("per_parameter", "global")
DECAYS = ("weights", "all")
LR_SCALINGS: dict[str, Callable[[int], float]] = {
    "linear": lambda batch: batch / 256,
    "sqrt": lambda batch: math.sqrt(batch / 1024),
}
BETA1 = 0.9
SEGMENTS = "segments"  # in identity.json, status.json (how many) and checkpoints
WARMUP_FRACTION = 0.1  # at most, of a segment, unless another warm-up is asked for
BLOCK = re.compile(r"^backbone\.vit\.blocks\.(\d+)\.")
BEFORE_BLOCKS = re.compile(r"^backbone\.(mask_token$|vit\.(cls_token|reg_token|pos_embed|patch_embed|norm_pre)\b)")


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
    freeze_backbone: bool


@dataclass(frozen=True)
class Schedules:
    """Schedules of a run, but for the objectives' own.

    Attributes:
        lr: Learning rate, already scaled to the global batch.
        weight_decay: Decay of the parameters that decay.
        momentum: Momentum of the teacher's average.
        freeze_steps: First steps during which the heads' last layers are not updated.
        backbone_freeze_steps: First steps during which the backbone is not updated.
    """

    lr: Cosine
    weight_decay: Cosine
    momentum: Cosine
    freeze_steps: int
    backbone_freeze_steps: int = 0

    def at(self, step: int) -> StepValues:
        """The values of ``step``, counted from 0."""
        frozen = (step < self.freeze_steps, step < self.backbone_freeze_steps)
        return StepValues(self.lr(step), self.weight_decay(step), self.momentum(step), *frozen)


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


def scaled_lr(optim: OptimConfig, global_batch: int) -> float:
    """Peak learning rate of a global batch.

    Args:
        optim: ``lr`` and ``lr_scaling``: linear (Goyal et al. 2017, arXiv 1706.02677) or the square root, as in
            facebookresearch/dinov2.
        global_batch: Samples of one optimizer step.

    Raises:
        ConfigError: If the scaling is unknown.
    """
    if optim.lr_scaling not in LR_SCALINGS:
        raise ConfigError(f"expected optim.lr_scaling {' or '.join(LR_SCALINGS)}, found '{optim.lr_scaling}'")
    return optim.lr * LR_SCALINGS[optim.lr_scaling](global_batch)


@dataclass(frozen=True)
class Segment:
    """Training that goes on after the end of a run's schedule; it starts from all state at that end.

    A run of 100 epochs that is extended by 20 is not a run of 120 epochs, whose learning rate would have been higher at
    epoch 100. So the segments are part of a run's identity, its log and its checkpoints.

    The learning rate rises linearly from 0 and falls on a cosine, and the momentum of the teacher rises to 1 again, as
    in the first segment: at its final value of 1 the teacher would not change. Weight decay and teacher temperature
    stay at their final values, and no layer is frozen.

    Attributes:
        start: Steps done before it.
        end: Steps done after it.
        lr: Peak learning rate, for the global batch.
        min_lr: Final learning rate.
        warmup_steps: Steps of the warm-up.
        momentum_teacher: Initial momentum of the teacher.
    """

    start: int
    end: int
    lr: float
    min_lr: float
    warmup_steps: int
    momentum_teacher: float

    @classmethod
    def of(cls, extend: ExtendConfig, config: PretrainConfig, length: Length, first: int, start: int) -> "Segment":
        """The segment that settings ask for.

        Args:
            extend: The settings.
            config: Settings of the run, which are those of the segment where ``extend`` has none.
            length: Length of the run.
            first: Steps done before the first extension, from which ``epochs`` and ``steps`` are counted.
            start: Steps done before this one.

        Raises:
            ConfigError: Unless there is one length of at least one step, and values are in range.
        """
        if (extend.epochs is None) == (extend.steps is None):
            raise ConfigError("expected extend.epochs or extend.steps, found both or neither; give one of them")
        added = extend.steps if extend.steps is not None else _steps(extend.epochs or 0, length)
        longest = int(WARMUP_FRACTION * max(0, first + added - start))
        warmup = min(_steps(config.training.warmup_epochs, length), longest)
        optim = config.optim if extend.lr is None else dataclasses.replace(config.optim, lr=extend.lr)
        segment = cls(
            start,
            first + added,
            scaled_lr(optim, length.global_batch),
            config.optim.lr_scheduler.min_lr if extend.min_lr is None else extend.min_lr,
            warmup if extend.warmup_epochs is None else _steps(extend.warmup_epochs, length),
            config.model.momentum_teacher if extend.momentum_teacher is None else extend.momentum_teacher,
        )
        if segment.end - start <= segment.warmup_steps > 0:
            raise ConfigError(
                f"expected extend.warmup_epochs to be shorter than the extension, found {segment.warmup_steps} steps "
                f"of warm-up in {segment.end - start} steps"
            )
        if added < 1 or segment.lr <= 0 or segment.min_lr < 0 or not 0 <= segment.momentum_teacher <= 1:
            raise ConfigError(
                "expected an extension of at least one step, extend.lr above 0, extend.min_lr of at least 0 and "
                f"extend.momentum_teacher in [0, 1], found {added} steps and {segment}"
            )
        return segment

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Segment":
        """The inverse of :meth:`to_dict`."""
        return cls(**{item.name: values[item.name] for item in dataclasses.fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and checkpoints."""
        return dataclasses.asdict(self)

    def schedules(self, weight_decay: float) -> Schedules:
        """Its schedules, of steps counted from its start."""
        steps = self.end - self.start
        return Schedules(
            Cosine(self.lr, self.min_lr, steps, self.warmup_steps),
            Cosine(weight_decay, weight_decay, steps),
            Cosine(self.momentum_teacher, 1.0, steps),
            freeze_steps=0,
        )

    def __str__(self) -> str:
        warmup = (
            f"from 0 to {self.lr:.3g} in {self.warmup_steps} steps, then" if self.warmup_steps else f"{self.lr:.3g},"
        )
        return (
            f"steps {self.start} to {self.end}: learning rate {warmup} on a cosine to {self.min_lr:.3g}; "
            f"momentum of the teacher from {self.momentum_teacher:g} to 1"
        )


def _steps(epochs: float, length: Length) -> int:
    return round(epochs * length.samples / length.global_batch)


@dataclass(frozen=True)
class SegmentedSchedules:
    """Schedules of a run with further segments.

    Attributes:
        first: Those of the run without them.
        segments: The further segments, in order.
        weight_decay: Its final value, which is that of the segments.
    """

    first: Schedules
    segments: Sequence[Segment] = ()
    weight_decay: float = 0.0

    @property
    def segment(self) -> Segment | None:
        """The last segment; None in a run that was not extended."""
        return self.segments[-1] if self.segments else None

    def begins_at(self, step: int) -> bool:
        """Whether the last segment has no step yet after ``step`` steps."""
        return self.segment is not None and self.segment.start == step

    def at(self, step: int) -> StepValues:
        """The values of ``step``, counted from 0."""
        for segment in reversed(self.segments):
            if step >= segment.start:
                return segment.schedules(self.weight_decay).at(step - segment.start)
        return self.first.at(step)


def lr_factor(name: str, depth: int, optim: OptimConfig) -> float:
    """Learning rate of a parameter of the student, as a fraction of the scheduled one (DINOv2's layer-wise decay).

    ``layer_decay ** (depth - i)`` for block i of ``depth``, counted from 0; one further factor for what comes before
    the blocks (tokens and embeddings), and ``patch_embed_lr_factor`` on top for the patch embedding. The final norm and
    the heads have 1 (Bao et al. 2022, arXiv 2106.08254; Oquab et al. 2024, arXiv 2304.07193).

    Args:
        name: Name in the student, such as ``backbone.vit.blocks.3.norm1.weight``.
        depth: Number of blocks.
        optim: ``layer_decay`` and ``patch_embed_lr_factor``.
    """
    block = BLOCK.search(name)
    if block:
        return optim.layer_decay ** (depth - int(block[1]))
    if not BEFORE_BLOCKS.search(name):
        return 1.0
    return optim.layer_decay ** (depth + 1) * (optim.patch_embed_lr_factor if ".patch_embed." in name else 1.0)


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict]:
    """Parameters by what scales their learning rate and whether they decay, the largest learning rate first.

    With the default settings these are the two groups of facebookresearch/dino: weights with weight decay; biases and
    1-D parameters without.

    Args:
        module: The student.
        optim: ``layer_decay``, ``patch_embed_lr_factor`` and ``weight_decay_on``.

    Returns:
        Groups with ``params``, ``lr_factor`` and ``decays``, for :func:`gated_step`.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    depth = 1 + max((int(found[1]) for name, _ in named if (found := BLOCK.search(name))), default=-1)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        decays = optim.weight_decay_on == "all" or not (name.endswith(".bias") or parameter.ndim == 1)
        groups.setdefault((lr_factor(name, depth, optim), decays), []).append(parameter)
    return [
        {"params": groups[factor, decays], "lr_factor": factor, "decays": decays, "weight_decay": 0.0}
        for factor, decays in sorted(groups, reverse=True)
    ]


def build_optimizer(optim: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum 0.9, as fused kernels, which skip the step where ``found_inf`` is set.

    Args:
        optim: Its settings; learning rate and weight decay are set at each step by :func:`gated_step`.
        module: The student.

    Raises:
        ConfigError: If a name is unknown, or a factor is not positive.
    """
    if optim.name not in NAMES:
        raise ConfigError(f"expected optim.name {' or '.join(NAMES)}, found '{optim.name}'")
    if optim.weight_decay_on not in DECAYS:
        raise ConfigError(f"expected optim.weight_decay_on {' or '.join(DECAYS)}, found '{optim.weight_decay_on}'")
    for name in ("layer_decay", "patch_embed_lr_factor"):
        if not 0 < getattr(optim, name) <= 1:
            raise ConfigError(f"expected optim.{name} above 0 and at most 1, found {getattr(optim, name)}")
    if not 0 < optim.beta2 < 1:
        raise ConfigError(f"expected optim.beta2 between 0 and 1, found {optim.beta2}")
    groups = parameter_groups(module, optim)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(BETA1, optim.beta2), fused=True)
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

    Args:
        optimizer: With the groups of :func:`parameter_groups`.
        lr: Scheduled learning rate, before the factors of the groups.
        weight_decay: Scheduled weight decay of the groups that decay.
        finite: Bool scalar on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)  # checkpoints of versions up to 0.1.0 have no factors
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
