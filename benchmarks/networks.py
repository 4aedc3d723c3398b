"""The two contestants of a training step, with the same weights: this package's trainer and the plain reference."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import expect_close, relative_error
from benchmarks.reference.loss import PairwiseLoss
from benchmarks.reference.network import Head, MultiCrop, VisionTransformer
from benchmarks.reference.parts import PartsLoss, PartsNetwork
from benchmarks.reference.step import Step
from dino.config.schema import ModelConfig, ObjectiveConfig, OptimConfig, PretrainConfig, TrainingConfig
from dino.crops.masks import MaskDrawer
from dino.data.loader import Batch
from dino.models.backbone import BackboneSpec, build_backbone
from dino.models.spec import shape_of
from dino.randomness import generator
from dino.train.distill import Network, SelfDistillation, build_objectives, needs_masks
from dino.train.loop import Callback, Crops, StepReport, Trainer
from dino.train.optimizer import Cosine, Length, Schedules, SegmentedSchedules, build_optimizer

LR, WEIGHT_DECAY, MOMENTUM, TEACHER_TEMP = 1e-4, 0.04, 0.996, 0.04
Groups = Sequence[tuple[int, int]]  # (number of views, their side) of each size


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        arch: Architecture.
        batch: Images or grids of a step.
        out_dim: Prototypes K.
        groups: Number and side of the views of each size.
        level: ``patch`` or ``region``.
        input_dim: Channels of the input.
        parts: Settings of the objective, where it is not DINO alone.
    """

    arch: str
    batch: int
    out_dim: int = 65536
    groups: tuple[tuple[int, int], ...] = ((2, 224), (8, 96))
    level: str = "patch"
    input_dim: int = 3
    parts: tuple[tuple[str, Any], ...] = ()

    @property
    def objective(self) -> ObjectiveConfig:
        """Weights and settings of the parts."""
        return ObjectiveConfig(**dict(self.parts))

    @property
    def mask(self) -> Tensor | None:
        """The masked tokens of a batch, (B, G, N) bool; None where no part masks."""
        if not needs_masks(self.objective):
            return None
        side = self.spec.img_size[0] // self.spec.patch_size
        draw = MaskDrawer(self.objective, (side, side))
        masks = [draw({}, None, generator(0, number, "masks")) for number in range(self.batch)]
        return torch.from_numpy(np.stack(masks))

    @property
    def spec(self) -> BackboneSpec:
        """The backbone's."""
        side = self.groups[0][1]
        return BackboneSpec(self.arch, self.level, self.input_dim, (side, side), 16 if self.level == "patch" else 1)

    @property
    def views(self) -> int:
        """Number of views V."""
        return sum(count for count, _ in self.groups)


class ReadyViews:
    """Crops that were made before: what a step costs without its data."""

    def __init__(self, views: list[Tensor]) -> None:
        self.views = views

    def apply(self, pixels: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
        """The views, whatever the batch."""
        return self.views


def ready_batches(task: Task) -> Callable[[int, int], Iterable[Batch]]:
    """Batches for :class:`ReadyViews`, which hold no pixels."""
    empty = Batch(torch.empty(0), torch.arange(task.batch), {}, None, [], [], mask=task.mask)
    return lambda first, last: (empty for _ in range(first, last))


def our_trainer(
    task: Task,
    device: torch.device,
    precision: str,
    crops: Crops,
    batches: Callable[[int, int], Iterable[Batch]] | None = None,
) -> Trainer:
    """This package's trainer; :func:`take_steps` runs it."""
    backbone = build_backbone(task.spec, seed=0)
    config = PretrainConfig(
        model=ModelConfig(out_dim=task.out_dim, norm_last_layer=False, teacher_temp=TEACHER_TEMP),
        training=TrainingConfig(batch_size_per_gpu=task.batch),
        objective=task.objective,
    )
    objectives = build_objectives(config, Length(task.batch, task.batch, 0), seed=1)
    student = Network(backbone, objectives).to(device)
    model = SelfDistillation(student, copy.deepcopy(student), [part.to(device) for part in objectives], device)
    lr, decay, momentum = (Cosine(value, value, 1) for value in (LR, WEIGHT_DECAY, MOMENTUM))
    return Trainer(
        model=model,
        optimizer=build_optimizer(OptimConfig(), model.student),
        crops=crops,
        batches=batches or ready_batches(task),
        accumulation=1,
        schedules=SegmentedSchedules(Schedules(lr, decay, momentum, 0)),
        length=Length(task.batch, task.batch, 0),
        device=device,
        precision=precision,
        clip_grad=3.0,
        clip_mode="per_parameter",
        largest_quarantine=0,
    )


def take_steps(trainer: Trainer, count: int = 1) -> None:
    """Train ``count`` steps on."""
    trainer.length = Length(trainer.length.samples, trainer.length.global_batch, trainer.step + count)
    trainer.fit()


def their_step(task: Task, trainer: Trainer, precision: str) -> Step:
    """The reference with the weights that ``trainer`` has now."""
    shape = shape_of(task.arch)
    if shape is None:
        raise ValueError(f"expected one of this package's own architectures, found {task.arch}")
    spec, student = task.spec, trainer.model.student
    backbone = VisionTransformer(task.input_dim, spec.img_size[0], spec.patch_size, shape.dim, shape.depth, shape.heads)
    head, loss = Head(shape.dim, task.out_dim), PairwiseLoss(task.out_dim, task.views)
    network: nn.Module = MultiCrop(backbone, head)
    total: nn.Module = loss
    if task.parts:
        weights = vars(task.objective)
        tokens = torch.zeros(task.batch, 2, backbone.native**2, dtype=torch.bool) if task.mask is None else task.mask
        mask = tokens.transpose(0, 1).flatten(0, 1).to(trainer.device)  # (2 B, N)
        network = PartsNetwork(backbone, head, weights, mask)
        total = PartsLoss(loss, weights, mask, task.out_dim, task.objective.spread_group)
    load_named(network, student.published_state())
    step = Step(network.to(trainer.device), total.to(trainer.device), precision, LR, WEIGHT_DECAY, MOMENTUM)
    step.teacher.is_student = False  # type: ignore[assignment]
    return step


def load_named(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights under facebookresearch/dino's names into whatever form of weight norm the network has."""
    network.load_state_dict(state)


class Losses(Callback):
    """Callback that keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Append the loss."""
        self.values.append(float(report.loss))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients under facebookresearch/dino's names."""
    names = {"original0": "weight_g", "original1": "weight_v"}
    found = {}
    for name, parameter in module.named_parameters():
        short = name.replace("backbone.vit.", "backbone.").replace("parametrizations.weight.", "")
        first, _, last = short.rpartition(".")
        if parameter.grad is not None:
            found[f"{first}.{names.get(last, last)}"] = parameter.grad
    return found


def same_step(task: Task, make_theirs: Callable[[Task, Trainer], Any], views: list[Tensor], largest: float) -> str:
    """Take one step in fp32 with both; their losses and clipped gradients must agree.

    The bias of the keys is left out: softmax does not feel it, so that its gradient is rounding alone.

    Args:
        task: A small one.
        make_theirs: Builds the comparator from the task and our trainer; called with a list of views, gives the loss.
        views: One (V_g, B, C, s, s) tensor per size.
        largest: Largest relative error.

    Raises:
        RuntimeError: If they differ.
    """
    trainer = our_trainer(task, views[0].device, "fp32", ReadyViews(views))
    theirs = make_theirs(task, trainer)
    losses = Losses()
    trainer.callbacks = [losses]
    take_steps(trainer)
    expected = theirs([view for group in views for view in group])
    found, wanted = gradients(trainer.model.student), gradients(theirs.student)
    if found.keys() != wanted.keys():
        raise RuntimeError(f"expected gradients of the same tensors, found {sorted(found.keys() ^ wanted.keys())}")
    errors = {name: relative_error(*_without_key_bias(name, found[name], wanted[name])) for name in wanted}
    worst = max(errors, key=lambda name: errors[name])
    expect_close("loss", abs(losses.values[0] / expected - 1), largest)
    return expect_close(f"loss and every gradient (fp32; farthest is {worst})", errors[worst], largest)


def _without_key_bias(name: str, *tensors: Tensor) -> list[Tensor]:
    if not name.endswith("qkv.bias"):
        return list(tensors)
    return [torch.cat([t[: len(t) // 3], t[2 * len(t) // 3 :]]) for t in tensors]
