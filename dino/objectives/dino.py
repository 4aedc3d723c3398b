"""Self-distillation of the cls token with no labels (Caron et al. 2021, arXiv 2104.14294)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from dino.config.schema import ModelConfig
from dino.errors import ConfigError
from dino.evaluate.verdict import ALL_PROTOTYPES, ONE_PROTOTYPE
from dino.models.backbone import Tokens
from dino.models.head import DINOHead
from dino.objectives import Condition, Masked, Objective, Outputs, Terms
from dino.objectives.cross_entropy import dino_loss
from dino.objectives.targets import build_targets


class DINO(Objective):
    """Cross-entropy between centred, sharpened teacher and student (Caron et al. 2021, arXiv 2104.14294, eq. 1-3).

    Args:
        settings: Number of prototypes K, temperature of the student, momentum of the centre, and the head.
        teacher_temp: Temperature of the teacher at a step, counted from 0.
        seed: Seed of the head's initial weights.
        targets: ``centring`` or ``sinkhorn``.
        weight: Factor of the loss.

    Raises:
        ConfigError: If there are less than two prototypes.
    """

    name = "dino"
    head = "head"
    # DINO collapses in two ways, and centring and sharpening each prevent one (Caron et al. 2021, section 5.3).
    warnings: ClassVar[Mapping[str, Condition]] = {
        "the teacher assigns every sample to one prototype (entropy near 0): raise model.teacher_temp, or lower "
        "model.center_momentum or optim.lr": lambda line: line["teacher_entropy_relative"] < ONE_PROTOTYPE,
        "the teacher gives all prototypes the same probability (entropy near ln K): lower model.warmup_teacher_temp "
        "and model.teacher_temp": lambda line: line["teacher_entropy_relative"] > ALL_PROTOTYPES,
        "the loss stays at ln K, so the student learns nothing: raise optim.lr or training.batch_size_per_gpu, or "
        "lower model.out_dim": lambda line: line["teacher_entropy_relative"] <= ALL_PROTOTYPES < line["loss_relative"],
    }

    def __init__(
        self,
        settings: ModelConfig,
        teacher_temp: Callable[[int], float],
        seed: int,
        targets: str = "centring",
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if settings.out_dim < 2:
            raise ConfigError(f"expected model.out_dim of at least 2, found {settings.out_dim}")
        self.settings, self.teacher_temp, self.seed = settings, teacher_temp, seed
        self.centre = build_targets(targets, settings.out_dim, settings.center_momentum)
        self.whole_step = self.centre.whole_step

    def build_head(self, embed_dim: int) -> nn.Module:
        """The projection head, with initial weights; it maps (N, D) tokens to (N, K) logits."""
        return build_head(embed_dim, self.settings, self.settings.out_dim, self.seed)

    @staticmethod
    def project(head: nn.Module, tokens: Sequence[Tokens], masked: Masked | None) -> Tensor:
        """Logits of the cls token of every view: (V, B, K)."""
        cls = torch.cat([group.cls for group in tokens])  # (V, B, D)
        return head(cls.flatten(0, 1)).unflatten(0, cls.shape[:2])

    def scheduled(self, step: int) -> dict[str, float]:
        """The teacher's temperature."""
        return {"teacher_temp": self.teacher_temp(step)}

    def prepare(self, teacher: Sequence[Outputs], values: Mapping[str, float]) -> None:
        """Compute the targets of all micro-batches of a step."""
        self.centre.prepare([outputs.logits[self.name] for outputs in teacher], values["teacher_temp"])

    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        """Loss and teacher entropy of a micro-batch, both in nats; the logits are overwritten.

        Args:
            student: With (V, B, K) logits.
            teacher: With (G, B, K) logits of the first G views.
            values: ``teacher_temp``.
        """
        logits = teacher.logits[self.name]
        self.centre.observe(logits)
        # Nothing else reads these logits: their memory takes the targets, and the student's the gradient.
        targets, entropies = self.centre.targets(logits, values["teacher_temp"], overwrite=True)
        loss = dino_loss(student.logits[self.name], targets, self.settings.student_temp, overwrite=True)
        return Terms({"dino": loss}, {"teacher_entropy": entropies.mean()})

    def step(self, finite: Tensor) -> None:
        """Move the centre by the logits since the last step, if the step was ``finite``."""
        self.centre.step(finite)

    def log_values(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Loss and entropy relative to ln K, which a uniform distribution over the prototypes has."""
        uniform = math.log(self.settings.out_dim)
        return {
            "loss_relative": numbers["loss/dino"] / uniform,
            "teacher_entropy_relative": numbers["teacher_entropy"] / uniform,
        }


def build_head(embed_dim: int, settings: ModelConfig, out_dim: int, seed: int) -> DINOHead:
    """A projection head for self-distillation, with initial weights.

    Args:
        embed_dim: Dimension D of the tokens.
        settings: Its shape.
        out_dim: Number of prototypes K.
        seed: Seed of the weights.
    """
    return DINOHead(
        embed_dim,
        out_dim,
        settings.hidden_dim,
        settings.bottleneck_dim,
        settings.use_bn_in_head,
        settings.norm_last_layer,
        seed,
    )
