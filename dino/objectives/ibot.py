"""Self-distillation of masked patch tokens (Zhou et al. 2021, arXiv 2111.07832), as in DINOv2."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from dino.config.schema import ModelConfig, ObjectiveConfig
from dino.errors import ConfigError
from dino.evaluate.verdict import ALL_PROTOTYPES, ONE_PROTOTYPE
from dino.models.backbone import Tokens
from dino.objectives import Condition, Masked, Objective, Outputs, Terms
from dino.objectives.cross_entropy import masked_loss
from dino.objectives.dino import DINO, build_head
from dino.objectives.targets import build_targets

HEADS = ("shared", "separate")


class IBOT(Objective):
    """Cross-entropy of masked tokens with the teacher's tokens at the same places (Zhou et al. 2021, eq. 2).

    The student's global views are masked, the teacher's are not; only masked tokens pass through the head. Per view the
    loss is the mean over its masked tokens, and it is averaged over all global views, masked or not (as in DINOv2,
    arXiv 2304.07193), so that masking half of them halves its weight.

    Args:
        settings: Temperature of the student, momentum of the centre, and the shape of the head.
        objective: Targets, whether the head is DINO's or separate, and the separate one's number of prototypes.
        teacher_temp: Temperature of the teacher at a step, counted from 0.
        seed: Seed of a separate head's initial weights.

    Raises:
        ConfigError: If a setting is unknown or out of range.
    """

    name = "ibot"
    cls_only = False
    masks = True
    warnings: ClassVar[Mapping[str, Condition]] = {
        "iBOT: the teacher assigns every token to one prototype (entropy near 0): raise model.teacher_temp, or lower "
        "objective.ibot": lambda line: line["ibot_entropy_relative"] < ONE_PROTOTYPE,
        "iBOT: the teacher gives all prototypes the same probability (entropy near ln K): lower "
        "model.warmup_teacher_temp and model.teacher_temp": lambda line: line["ibot_entropy_relative"] > ALL_PROTOTYPES,
    }

    def __init__(
        self, settings: ModelConfig, objective: ObjectiveConfig, teacher_temp: Callable[[int], float], seed: int
    ) -> None:
        super().__init__(objective.ibot)
        if objective.ibot_head not in HEADS:
            raise ConfigError(f"expected objective.ibot_head {' or '.join(HEADS)}, found '{objective.ibot_head}'")
        is_shared = objective.ibot_head == "shared"
        if is_shared and objective.ibot_out_dim not in {None, settings.out_dim}:
            raise ConfigError(
                f"expected one number of prototypes for a shared head, found model.out_dim={settings.out_dim} and "
                f"objective.ibot_out_dim={objective.ibot_out_dim}: leave it out, or set objective.ibot_head=separate"
            )
        self.out_dim = objective.ibot_out_dim or settings.out_dim
        if self.out_dim < 2:
            raise ConfigError(f"expected at least 2 prototypes for iBOT, found {self.out_dim}")
        self.head = DINO.head if is_shared else "ibot_head"
        self.settings, self.teacher_temp, self.seed = settings, teacher_temp, seed
        self.mask_probability = objective.mask_probability
        self.centre = build_targets(objective.targets, self.out_dim, settings.center_momentum)
        self.whole_step = self.centre.whole_step

    def build_head(self, embed_dim: int) -> nn.Module:
        """The projection head, with initial weights; it maps (M, D) tokens to (M, K) logits."""
        return build_head(embed_dim, self.settings, self.out_dim, self.seed)

    @staticmethod
    def project(head: nn.Module, tokens: Sequence[Tokens], masked: Masked | None) -> Tensor:
        """Logits of the masked tokens: (M, K)."""
        assert masked is not None and tokens[0].patches is not None
        return head(masked.gather(tokens[0].patches))

    def scheduled(self, step: int) -> dict[str, float]:
        """The teacher's temperature."""
        return {"teacher_temp": self.teacher_temp(step)}

    def prepare(self, teacher: Sequence[Outputs], values: Mapping[str, float]) -> None:
        """Compute the targets of all micro-batches of a step."""
        self.centre.prepare([outputs.logits[self.name] for outputs in teacher], values["teacher_temp"])

    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        """Loss and teacher entropy of a micro-batch, both in nats; the logits are overwritten.

        Args:
            student: With (M, K) logits of the masked tokens.
            teacher: Likewise, of the same tokens.
            values: ``teacher_temp``.
        """
        assert student.masked is not None
        logits = teacher.logits[self.name]
        self.centre.observe(logits)
        targets, entropies = self.centre.targets(logits, values["teacher_temp"], overwrite=True)
        weights = student.masked.weight.to(entropies.dtype)
        loss = masked_loss(student.logits[self.name], targets, weights, self.settings.student_temp, overwrite=True)
        entropy = (entropies * weights).sum() / self.mask_probability  # per view, as the loss, and over masked views
        return Terms({"ibot": loss}, {"ibot_entropy": entropy})

    def step(self, finite: Tensor) -> None:
        """Move the centre by the logits since the last step, if the step was ``finite``."""
        self.centre.step(finite)

    def log_values(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Entropy relative to ln K, which a uniform distribution over the prototypes has."""
        return {"ibot_entropy_relative": numbers["ibot_entropy"] / math.log(self.out_dim)}
