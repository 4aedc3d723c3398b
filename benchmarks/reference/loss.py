"""The loss as the paper writes it: every pair of two different views by itself (Caron et al. 2021, algorithm 1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PairwiseLoss(nn.Module):
    """Cross-entropy between each teacher view and each other student view, averaged over the pairs.

    Args:
        out_dim: Prototypes K.
        views: Student views V.
        student_temp: Temperature of the student.
        teacher_temp: Temperature of the teacher.
        momentum: Momentum of the centre.
    """

    center: Tensor

    def __init__(
        self, out_dim: int, views: int, student_temp: float = 0.1, teacher_temp: float = 0.04, momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.views, self.student_temp, self.teacher_temp, self.momentum = views, student_temp, teacher_temp, momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Loss of (V * B, K) student and (2 * B, K) teacher logits; moves the centre."""
        student_views = (student / self.student_temp).chunk(self.views)
        targets = F.softmax((teacher - self.center) / self.teacher_temp, dim=-1).detach().chunk(2)
        terms = []
        for t, target in enumerate(targets):
            for v, logits in enumerate(student_views):
                if v != t:
                    terms.append(torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean())
        with torch.no_grad():
            mean = teacher.mean(dim=0, keepdim=True)
            self.center = self.center * self.momentum + mean * (1 - self.momentum)
        return sum(terms, torch.zeros((), device=student.device)) / len(terms)
