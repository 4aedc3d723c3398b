"""One training step as the original takes it: eager, and tensor by tensor behind the backward pass."""

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from benchmarks.reference.loss import PairwiseLoss

CLIP = 3.0


def clip_each(parameters: Iterable[nn.Parameter], largest: float = CLIP) -> None:
    """Scale each gradient down to a norm of at most ``largest``."""
    for parameter in parameters:
        if parameter.grad is not None:
            scale = largest / (parameter.grad.norm() + 1e-6)
            if scale < 1:
                parameter.grad.mul_(scale)


@torch.no_grad()
def average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher = momentum * teacher + (1 - momentum) * student."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.mul_(momentum).add_((1 - momentum) * new.detach())


def adamw(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Torch's AdamW as a loop over tensors; biases and norms do not decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, foreach=False, fused=False)


class Step:
    """Student, teacher, loss and optimizer.

    Args:
        student: Takes a list of views and returns (V * B, K) logits; the teacher is a copy of it.
        loss: Of student and teacher logits.
        precision: ``fp32``, ``bf16`` (autocast), or ``fp16`` (autocast with a loss scaler).
        lr: Learning rate.
        weight_decay: Weight decay.
        momentum: Momentum of the teacher's average.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: PairwiseLoss | nn.Module,
        precision: str = "bf16",
        lr: float = 1e-4,
        weight_decay: float = 0.04,
        momentum: float = 0.996,
    ) -> None:
        self.student, self.loss = student, loss
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.optimizer = adamw(student, lr, weight_decay)
        self.momentum, self.precision = momentum, precision
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler() if precision == "fp16" else None

    def __call__(self, views: Sequence[Tensor]) -> float:
        """One step on V views (B, C, s, s), the global ones first; the loss."""
        device = views[0].device.type
        with torch.autocast(device, self.dtype) if self.dtype else nullcontext():
            teacher = self.teacher(list(views[:2]))
            student = self.student(list(views))
            loss = self.loss(student, teacher)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"expected a finite loss, found {value}")
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            clip_each(self.student.parameters())
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            clip_each(self.student.parameters())
            self.scaler.step(self.optimizer)
            self.scaler.update()
        average(self.teacher, self.student, self.momentum)
        return value
