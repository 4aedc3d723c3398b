"""A second objective, to test training with several objectives of any names."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from dino.models.backbone import Tokens
from dino.objectives import Condition, Masked, Objective, Outputs, Terms


class Regression(Objective):
    """Mean squared distance between projected patch tokens of student and teacher; counts its steps."""

    name = "regression"
    head = "projection_head"
    cls_only = False
    warnings: ClassVar[Mapping[str, Condition]] = {"the step count is shown": lambda line: line["steps_seen"] >= 0}

    steps: Tensor

    def __init__(self) -> None:
        super().__init__(weight=0.5)
        self.register_buffer("steps", torch.zeros(()))

    def build_head(self, embed_dim: int) -> nn.Module:
        head = nn.Linear(embed_dim, 4, bias=False)
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
        return head

    @staticmethod
    def project(head: nn.Module, tokens: Sequence[Tokens], masked: Masked | None) -> Tensor:
        patches = tokens[0].patches
        assert patches is not None
        return head(patches.mean(2))  # (V_g, B, N, D) -> (V_g, B, 4)

    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        distance = (student.logits[self.name] - teacher.logits[self.name]).square()
        return Terms({"distance": distance.mean(), "scale": distance.amax()}, {"steps_seen": self.steps + 0})

    def step(self, finite: Tensor) -> None:
        self.steps += finite
