"""The work after the backward pass: clipping, AdamW and teacher average, against loops over tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, Setting, duel, expect_close, relative_error
from benchmarks.networks import LR, MOMENTUM, WEIGHT_DECAY, ReadyViews, Task, our_trainer, their_step
from benchmarks.reference.step import Step, average, clip_each
from dino.train.loop import Trainer
from dino.train.optimizer import clip_gradients, gated_step

TITLE = "optimizer tail"
SMALL = Task("vit:dim=64,depth=2,heads=2", 2, 256, ((2, 32), (3, 16)))


@dataclass
class Tails:
    """Both implementations with equal weights and gradients.

    Attributes:
        ours: Trainer of this package.
        theirs: The reference.
    """

    ours: Trainer
    theirs: Step

    def fill(self) -> None:
        """Give both the same gradients."""
        generator = torch.Generator(self.ours.device).manual_seed(0)
        for our, their in zip(_parameters(self.ours.model.student), _matching(self), strict=True):
            our.grad = torch.randn(our.shape, generator=generator, device=our.device)
            their.grad = our.grad.clone()

    def run_ours(self) -> None:
        """Clip, step, average; the centre gets no logits here."""
        model = self.ours.model
        _, finite = clip_gradients(model.student.parameters(), 3.0, "per_parameter")
        gated_step(self.ours.optimizer, LR, WEIGHT_DECAY, finite)
        for objective in model.objectives:
            objective.centre.count = 1  # type: ignore[union-attr]
        model.update_teacher(MOMENTUM, finite)

    def run_theirs(self) -> None:
        """Clip, step, average, one tensor at a time."""
        clip_each(self.theirs.student.parameters())
        self.theirs.optimizer.step()
        average(self.theirs.teacher, self.theirs.student, MOMENTUM)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _matching(tails: Tails) -> list[nn.Parameter]:
    """The reference's parameters in our order."""
    by_name = {_short(name): p for name, p in tails.theirs.student.named_parameters()}
    return [by_name[_short(name)] for name, p in tails.ours.model.student.named_parameters() if p.requires_grad]


def _short(name: str) -> str:
    name = name.replace("backbone.vit.", "backbone.").replace("parametrizations.weight.", "")
    return name.replace("original0", "weight_g").replace("original1", "weight_v")


def build(task: Task, device: torch.device) -> Tails:
    """Both implementations, with gradients."""
    trainer = our_trainer(task, device, "fp32", ReadyViews([]))
    tails = Tails(trainer, their_step(task, trainer, "fp32"))
    tails.fill()
    return tails


def check(tails: Tails) -> str:
    """Check that student and teacher are equal after a step.

    Raises:
        RuntimeError: If they differ.
    """
    tails.run_ours()
    tails.run_theirs()
    teacher = dict(tails.theirs.teacher.named_parameters())
    theirs: dict[str, Tensor] = {_short(name): p for name, p in teacher.items()}
    pairs = [(p, theirs[_short(name)]) for name, p in tails.ours.model.teacher.named_parameters()]
    pairs += list(zip(_parameters(tails.ours.model.student), _matching(tails), strict=True))
    return expect_close("weights of student and teacher", max(relative_error(*pair) for pair in pairs), 1e-5)


def run(setting: Setting) -> Iterator[Row]:
    """ViT-S/16 with a head of 65,536 prototypes."""
    equality = check(build(SMALL, setting.device))
    task = SMALL if setting.quick else Task("vit_small", 1)
    setting.notice(f"clip, AdamW and teacher's average of {task.arch}")
    tails = build(task, setting.device)
    result = duel(tails.run_ours, tails.run_theirs, setting.rounds(9), setting.device, warmup=2)
    count = sum(p.numel() for p in tails.ours.model.student.parameters())
    row = result.row("optimizer tail", 1, "steps/s", "loops over tensors", equality=equality)
    row.target = 4.0 if setting.on_gpu and not setting.quick else None
    details: dict[str, Any] = {"parameters": count}
    # Per parameter: the norm reads the gradient, clipping reads and writes it, Adam reads 4 and writes 3, the average
    # reads 2 and writes 1: 13 numbers of 4 bytes.
    details["bytes_per_item"] = 13 * 4 * count
    row.details = details
    return iter([row])
