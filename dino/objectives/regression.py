"""Regression of masked features: I-JEPA (Assran et al. 2023, arXiv 2301.08243) on the global crops of DINO."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino.config.schema import ObjectiveConfig
from dino.errors import ConfigError
from dino.models.backbone import Tokens
from dino.models.predictor import Predictor
from dino.objectives import Condition, Masked, Objective, Outputs, Terms

COLLAPSED = 0.02  # variance of the targets within a view, of at most 1


class Regression(Objective):
    """Smooth L1 distance between predicted and teacher features of masked tokens (Assran et al. 2023, section 3).

    With ``p_m`` the prediction for a masked token from all of the student's tokens of its view, ``t_m`` the teacher's
    token at the same place in the unmasked view, and ``w_m`` the weights of :class:`~dino.objectives.Masked`::

        L = sum_m w_m 1/D sum_d smooth_l1(p_md - layer_norm(t_m)_d)
        smooth_l1(x) = x^2 / 2 if |x| < 1, else |x| - 1/2

    Unlike in I-JEPA, the masked tokens are not left out of the student's input but replaced by the mask token, so that
    one pass of the student serves DINO, iBOT and this objective, and one pass of the predictor all masked tokens of a
    view. So does nanopath (MedARC), which masks four squares, each a tenth of the tokens, in every global crop:
    ``objective.mask_shape=squares objective.mask_probability=1 objective.mask_ratio=[0.34,0.4]``.

    Args:
        objective: Weight, width and depth of the predictor, and how many views are masked.
        seed: Seed of the predictor's initial weights.

    Raises:
        ConfigError: If a setting is out of range.
    """

    name = "regression"
    head = "regression_head"
    teacher_head = False
    cls_only = False
    masks = True
    warnings: ClassVar[Mapping[str, Condition]] = {
        "regression: the teacher gives all tokens of a view the same features (variance near 0): lower "
        "objective.regression or optim.lr": lambda line: line["regression_variance"] < COLLAPSED,
    }

    def __init__(self, objective: ObjectiveConfig, seed: int) -> None:
        super().__init__(objective.regression)
        width, depth = objective.predictor_width, objective.predictor_depth
        if width is not None and width < 1:
            raise ConfigError(f"expected objective.predictor_width of at least 1, found {width}")
        if depth < 1:
            raise ConfigError(f"expected objective.predictor_depth of at least 1, found {depth}")
        self.width, self.depth, self.seed = width, depth, seed
        self.mask_probability = objective.mask_probability

    def build_head(self, embed_dim: int) -> nn.Module:
        """The predictor, with initial weights."""
        return Predictor(embed_dim, self.width or embed_dim, self.depth, self.seed)

    @staticmethod
    def project(head: nn.Module, tokens: Sequence[Tokens], masked: Masked | None) -> Tensor:
        """Predictions for the masked tokens: (M, D)."""
        assert masked is not None and tokens[0].patches is not None
        return head(*masked.gather_views(tokens[0].patches))

    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        """Loss, and variance of the targets within a view: 0 if all of them are equal, near 1 if they are unrelated.

        Args:
            student: With (M, D) predictions.
            teacher: With patch tokens (G, B, N, D).
            values: Not used.
        """
        masked, patches = student.masked, teacher.tokens[0].patches
        assert masked is not None and patches is not None
        predicted = student.logits[self.name]
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        with torch.autocast(predicted.device.type, enabled=False):
            targets = F.layer_norm(masked.gather(patches).to(dtype), patches.shape[-1:])  # (M, D)
            distances = F.smooth_l1_loss(predicted.to(dtype), targets, reduction="none").mean(-1)
            loss = (distances * masked.weight.to(dtype)).sum()
            variance = variance_within_views(targets, masked) / self.mask_probability
        return Terms({"regression": loss}, {"regression_variance": variance})


def variance_within_views(targets: Tensor, masked: Masked) -> Tensor:
    """Variance of the layer-normed targets (M, D) of a view, averaged over the global views; 0 of one without any.

    Their squares have the mean 1, so that the variance of a view is 1 less the mean square of its average target.
    """
    mask, weights = masked.mask.flatten(0, 1), masked.weight.to(targets.dtype)  # (G B, N)
    placed = targets.new_zeros(mask.numel(), targets.shape[-1])
    placed.index_copy_(0, masked.index, targets * weights[:, None])  # index_add_ has no fixed order on a GPU
    means = placed.unflatten(0, mask.shape).sum(1) * len(mask)  # (G B, D)
    return (mask.any(1).sum() - means.square().mean(-1).sum()) / len(mask)
