"""A second objective, to test training with several objectives of any names."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from dino.models.backbone import Tokens
from dino.objectives import Condition, Objective, Outputs, Terms


class Regression(Objective):
    """Mean squared distance between projected patch tokens of student and teacher; counts its steps."""

    head = "projection_head"
    weight = 0.5
    cls_only = False
    warnings: ClassVar[Mapping[str, Condition]] = {"the step count is shown": lambda line: line["steps_seen"] >= 0}

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def build_head(self, embed_dim: int) -> nn.Module:
        head = nn.Linear(embed_dim, 4, bias=False)
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
        return head

    @staticmethod
    def head_inputs(tokens: Sequence[Tokens]) -> Tensor:
        patches = tokens[0].patches
        assert patches is not None
        return patches.mean(2)  # (V_g, B, N, D) -> (V_g, B, D)

    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        distance = (student.logits[self.head] - teacher.logits[self.head]).square()
        return Terms({"distance": distance.mean(), "scale": distance.amax()}, {"steps_seen": self.steps + 0})

    def step(self, finite: Tensor) -> None:
        self.steps += finite
