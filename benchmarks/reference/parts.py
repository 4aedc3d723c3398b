"""The further parts of the objective as their papers and public code write them, on the plain network.

Sources: Zhou et al. 2021, arXiv 2111.07832, eq. 2 (iBOT); Oquab et al. 2023, arXiv 2304.07193 (its weights in DINOv2,
KoLeo); Assran et al. 2023, arXiv 2301.08243, section 3 (regression); Karasikov et al. 2025, arXiv 2504.05186 (KDE).
Every loss is left to autograd, and the predictor sees every global view. As in DINOv2's code, heads see masked tokens
only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reference.loss import PairwiseLoss
from benchmarks.reference.network import Block, Head, MultiCrop, VisionTransformer


class Outputs(NamedTuple):
    """Results of one network.

    Attributes:
        logits: (V * B, K) of the cls tokens.
        cls: (2 * B, D) of the global views.
        patches: (2 * B, N, D) of the global views.
        masked: (M, K) logits of the masked tokens; None without iBOT.
        predicted: (M, D) predictions for the masked tokens; None without regression.
    """

    logits: Tensor
    cls: Tensor
    patches: Tensor
    masked: Tensor | None
    predicted: Tensor | None


class Predictor(nn.Module):
    """Blocks between two linear layers."""

    def __init__(self, dim: int, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList([Block(dim, max(1, dim // 64)) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, dim)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        tokens = self.embed(patches)
        for block in self.blocks:
            tokens = block(tokens)
        return self.proj(self.norm(tokens))


class PartsNetwork(MultiCrop):
    """A backbone with a mask token, a head for cls and masked tokens, and a predictor.

    Args:
        backbone: The backbone.
        head: The head.
        weights: Weight of each part by name.
        mask: (2 * B, N) bool, the masked tokens of the global views.

    Attributes:
        is_student: Whether masked tokens are replaced.
    """

    def __init__(self, backbone: VisionTransformer, head: Head, weights: Mapping[str, float], mask: Tensor) -> None:
        super().__init__(backbone, head)
        dim = backbone.cls_token.shape[-1]
        self.weights, self.mask, self.is_student = weights, mask, True
        self.masks = weights["ibot"] > 0 or weights["regression"] > 0
        if self.masks:
            backbone.register_parameter("mask_token", nn.Parameter(torch.zeros(1, dim)))
        if weights["regression"] > 0:
            self.regression_head = Predictor(dim)

    def forward(self, views: Sequence[Tensor]) -> Outputs:  # type: ignore[override]
        """V tensors (B, C, s, s), the global ones first."""
        backbone: Any = self.backbone
        x = torch.cat(list(views[:2]))
        patches = backbone.patch_embed(x)
        if self.masks and self.is_student:
            patches = torch.where(self.mask[..., None], backbone.mask_token.to(patches.dtype), patches)
        tokens = backbone.tokens(patches, x).float()
        cls, patches = tokens[:, 0], tokens[:, 1:]
        local = [backbone(torch.cat(list(views[2:]))).float()] if len(views) > 2 else []
        masked = self.head(patches[self.mask]) if self.weights["ibot"] > 0 else None
        is_predicting = self.weights["regression"] > 0 and self.is_student
        predicted = self.regression_head(patches)[self.mask] if is_predicting else None
        return Outputs(self.head(torch.cat([cls, *local])), cls, patches, masked, predicted)


class PartsLoss(nn.Module):
    """The weighted sum of the parts.

    Args:
        pairwise: DINO's loss.
        weights: Weight of each part by name.
        mask: (2 * B, N) bool.
        out_dim: Prototypes K.
        group: The spreading terms compare this many consecutive samples.
    """

    center: Tensor
    token_weights: Tensor

    def __init__(
        self, pairwise: PairwiseLoss, weights: Mapping[str, float], mask: Tensor, out_dim: int, group: int
    ) -> None:
        super().__init__()
        self.pairwise, self.weights, self.mask, self.group = pairwise, weights, mask, group
        self.register_buffer("center", torch.zeros(1, out_dim))
        per_view = mask.sum(-1, keepdim=True).clamp(min=1)
        self.register_buffer("token_weights", (1 / per_view).expand_as(mask)[mask] / len(mask))  # (M,)

    def forward(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The loss; moves the centres."""
        total = self.weights["dino"] * self.pairwise(student.logits, teacher.logits)
        if student.masked is not None and teacher.masked is not None:
            total = total + self.weights["ibot"] * self.masked_tokens(student.masked, teacher.masked)
        if student.predicted is not None:
            targets = F.layer_norm(teacher.patches, teacher.patches.shape[-1:])[self.mask].detach()
            distances = F.smooth_l1_loss(student.predicted.float(), targets, reduction="none").mean(-1)
            total = total + self.weights["regression"] * (distances * self.token_weights).sum()
        for name, spread in (("koleo", koleo), ("kde", kde)):
            if self.weights[name] > 0:
                groups = student.cls.split(self.group)
                total = total + self.weights[name] * sum(spread(group) for group in groups) / len(groups)
        return total

    def masked_tokens(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Weighted cross-entropy of (M, K) logits."""
        loss, self.center = masked_cross_entropy(student, teacher, self.center, self.token_weights)
        return loss


def masked_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    weights: Tensor,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    momentum: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of masked tokens, and the moved centre.

    Args:
        student: (M, K) logits.
        teacher: (M, K) logits.
        center: (1, K).
        weights: (M,).
        student_temp: Temperature of the student.
        teacher_temp: Temperature of the teacher.
        momentum: Momentum of the centre.
    """
    targets = F.softmax((teacher - center) / teacher_temp, dim=-1).detach()
    losses = torch.sum(-targets * F.log_softmax(student / student_temp, dim=-1), dim=-1)
    with torch.no_grad():
        center = center * momentum + teacher.mean(dim=0, keepdim=True) * (1 - momentum)
    return (losses * weights).sum(), center


def koleo(x: Tensor) -> Tensor:
    """Mean of the negative logarithm of the distance to the nearest neighbour of (g, D) vectors."""
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x, dim=-1, eps=1e-8)
        cosines = x @ x.T
        nearest = cosines.detach().fill_diagonal_(-1).argmax(dim=1)
        return -torch.log((x - x[nearest]).norm(dim=-1) + 1e-8).mean()


def kde(x: Tensor, concentration: float = 10.0) -> Tensor:
    """Mean logarithm of the kernel density at each of (g, D) vectors."""
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x, dim=-1)
        exponents = concentration * (x @ x.T)
        exponents = exponents.fill_diagonal_(-math.inf)
        return (torch.logsumexp(exponents, dim=1) - math.log(len(x) - 1)).mean()
