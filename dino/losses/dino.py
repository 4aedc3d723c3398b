"""Self-distillation with no labels: the loss and its centre (Caron et al. 2021, arXiv 2104.14294)."""

from typing import Any

import torch
from torch import Tensor, nn

from dino.distributed import mean_over_ranks
from dino.errors import ConfigError


def dino_loss(student: Tensor, targets: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy of every student view with every teacher view but its own (Caron et al. 2021, eq. 3).

    With ``z_v`` the student's logits, ``Q_v`` the sum of the targets of the teacher views other than ``v``, and
    ``n_v`` how many those are, the pairwise sum is linear in the views::

        L = 1 / (n_pairs B) sum_v [ n_v logsumexp(z_v / temp) - Q_v . z_v / temp ]
        dL/dz_v = (n_v softmax(z_v / temp) - Q_v) / (n_pairs B temp)

    so that 2 + 8 views cost ten terms instead of eighteen, and no more memory than the gradient and one view.

    Args:
        student: (V, B, K) logits, fp32 or fp64 (bf16 errs by 0.05 near ``|z| = 1`` once divided by 0.04).
        targets: (G, B, K) teacher probabilities of the first G views; no gradient flows into them.
        student_temp: Temperature of the student.

    Returns:
        The loss, a scalar, in nats.

    Raises:
        ConfigError: There is no pair of two different views.
    """
    views, teacher_views = len(student), len(targets)
    if teacher_views < 1 or views < max(2, teacher_views):
        raise ConfigError(
            f"the loss compares two different views, found {views} of the student and {teacher_views} of the teacher:"
            " give it at least two"
        )
    return _DinoLoss.apply(student, targets, float(student_temp))


class _DinoLoss(torch.autograd.Function):
    """The gradient is written down, because autograd would keep three more tensors of the student's size."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: Tensor, temp: float) -> Tensor:
        views, teacher_views = len(student), len(targets)
        everything = targets.sum(0)  # (B, K)
        log_sums = []
        total = student.new_zeros(student.shape[1])  # (B,)
        for view in range(views):
            others, count = _others(targets, everything, view)
            scaled = student[view] / temp
            log_sums.append(scaled.logsumexp(-1))  # (B,)
            total += count * log_sums[-1] - scaled.mul_(others).sum(-1)
        ctx.save_for_backward(student, targets, torch.stack(log_sums))
        ctx.temp = temp
        return total.mean() / (views * teacher_views - teacher_views)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        student, targets, log_sums = ctx.saved_tensors
        views, batch, _ = student.shape
        everything = targets.sum(0)
        factor = grads[0] / (len(targets) * (views - 1) * batch * ctx.temp)
        gradient = torch.empty_like(student)
        for view in range(views):
            others, count = _others(targets, everything, view)
            probabilities = torch.div(student[view], ctx.temp, out=gradient[view])
            probabilities.sub_(log_sums[view, :, None]).exp_().mul_(count).sub_(others).mul_(factor)
        return gradient, None, None


def _others(targets: Tensor, everything: Tensor, view: int) -> tuple[Tensor, int]:
    """Sum of the targets of the teacher views other than ``view``, (B, K), and how many those are."""
    count = len(targets)
    if view >= count:
        return everything, count
    kept = [v for v in range(count) if v != view]
    return targets[kept].sum(0), count - 1


class Centre(nn.Module):
    """Moving average of the teacher's logits, subtracted from them against collapse (Caron et al. 2021, eq. 4).

    One optimizer step may see several micro-batches: each is observed, and the average moves once.

    Attributes:
        center: (1, K) the moving average; the only entry of the state dict, named as in facebookresearch/dino.
    """

    center: Tensor
    observed: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9) -> None:
        """Start at zero.

        Args:
            out_dim: Number of prototypes K.
            momentum: Share of the old centre that each step keeps.
        """
        super().__init__()
        self.momentum = momentum
        self.count = 0
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("observed", torch.zeros(1, out_dim), persistent=False)

    @torch.no_grad()
    def targets(self, teacher_logits: Tensor, temp: float) -> Tensor:
        """Centred and sharpened teacher probabilities.

        Args:
            teacher_logits: (G, B, K) logits, fp32 or fp64.
            temp: Temperature of the teacher.

        Returns:
            (G, B, K) probabilities.
        """
        return ((teacher_logits - self.center) / temp).softmax(-1)

    @torch.no_grad()
    def observe(self, teacher_logits: Tensor) -> None:
        """Add a micro-batch to what the next :meth:`step` averages.

        Args:
            teacher_logits: (G, B, K) logits as the teacher gave them.
        """
        self.observed += teacher_logits.flatten(0, -2).sum(0)
        self.count += teacher_logits[..., 0].numel()

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """Move the centre by the mean of everything observed on all processes, and forget it.

        Args:
            finite: Scalar bool on the centre's device; where false the centre stays as it is. Read on the device
                only: the host never waits.

        Raises:
            RuntimeError: Nothing was observed since the last step.
        """
        if not self.count:
            raise RuntimeError("Centre.step needs at least one Centre.observe before it")
        sums = torch.cat([self.observed, self.observed.new_full((1, 1), self.count)], dim=1)  # (1, K + 1)
        sums = mean_over_ranks(sums)
        mean = sums[:, :-1] / sums[:, -1:]
        moved = self.center * self.momentum + mean * (1 - self.momentum)
        self.center.copy_(torch.where(finite, moved, self.center))
        self.observed.zero_()
        self.count = 0


@torch.no_grad()
def entropy(targets: Tensor) -> Tensor:
    """Mean entropy of the teacher's probabilities: near 0 or near ln K it has collapsed.

    Args:
        targets: (..., K) probabilities.

    Returns:
        Scalar, in nats.
    """
    return torch.special.entr(targets).sum(-1).mean()
