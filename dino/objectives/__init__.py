"""Training objectives: what a network learns from its teacher. Each is a module with named losses that add up.

To add one, change four files: ``objectives/<name>.py`` (a subclass of :class:`Objective`), its settings in
``config/schema.py``, its line in ``build_objectives`` of ``train/distill.py``, and ``tests/objectives/test_<name>.py``.
The step, the log, TensorBoard, checkpoints, warnings, failure records and ``dino replay`` use its names as they come.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from dino.models.backbone import Tokens

Condition = Callable[[Mapping[str, float]], bool]  # on a line of the log


class Outputs(NamedTuple):
    """What a network returns for V views of B samples; a tuple, so that hooks find its tensors.

    Attributes:
        tokens: The backbone's tokens of each group of views of one size, with leading dimensions (V_g, B).
        logits: Output of each head by its name, (V, B, ...); V may be the first views alone.
    """

    tokens: list[Tokens]
    logits: dict[str, Tensor]


class Terms(NamedTuple):
    """Results of an objective on one micro-batch, all scalars.

    Attributes:
        losses: Losses by name, which are added; gradients flow into the student's outputs.
        diagnostics: Further numbers for the log by name, without gradient.
    """

    losses: dict[str, Tensor]
    diagnostics: dict[str, Tensor]


class Objective(nn.Module, ABC):
    """Base of all objectives.

    An objective decides what its head is and what it reads; student and teacher each have one of that shape, as a
    submodule of their network, so that it runs within the network's ``forward``. State that is kept from step to step
    (such as a centre) is the objective's own: buffers, which checkpoints save.

    Attributes:
        head: Name of its head in both networks and in checkpoints; no two objectives share one, and it ends with
            ``head``, by which readers of backbones recognise that it is not part of one.
        weight: Factor of its losses in the sum that is minimised.
        cls_only: Whether it reads the cls token alone, so that the last block may leave out the other tokens.
        warnings: Text for the user by the condition on a line of the log (see :meth:`log_values`) that lasts.
    """

    head: ClassVar[str]
    weight: float = 1.0
    cls_only: ClassVar[bool] = True
    warnings: ClassVar[Mapping[str, Condition]] = {}

    @abstractmethod
    def build_head(self, embed_dim: int) -> nn.Module:
        """The student's head, with initial weights; it maps (N, D) inputs to (N, K) logits."""

    @staticmethod
    @abstractmethod
    def head_inputs(tokens: Sequence[Tokens]) -> Tensor:
        """The tokens that the head reads, (V, B, ..., D), of the groups of views."""

    def scheduled(self, step: int) -> dict[str, float]:
        """Scheduled values of ``step``, counted from 0, by the name under which they are logged."""
        return {}

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        """Losses and diagnostics of a micro-batch.

        Args:
            student: Of all V views. The logits of the own head may be overwritten, because nothing else reads them.
            teacher: Of the first G views, without gradient; likewise.
            values: Scheduled values of the step, see :meth:`scheduled`.
        """

    def step(self, finite: Tensor) -> None:
        """Update the state after an optimizer step.

        Args:
            finite: Scalar bool on the device; where false the state must stay as it is. Reading it would make the host
                wait.
        """

    def log_values(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Further numbers for a line of the log.

        Args:
            numbers: Means over all processes: ``loss/<name>`` of each loss, and each diagnostic.
        """
        return {}
