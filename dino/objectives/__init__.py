"""Training objectives: what a network learns from its teacher. Each is a module with named losses that add up.

To add one, change four files: ``objectives/<name>.py`` (a subclass of :class:`Objective`), its settings in
``config/schema.py``, its line in ``build_objectives`` of ``train/distill.py``, and ``tests/objectives/test_<name>.py``.
The step, the log, TensorBoard, checkpoints, warnings, failure records and ``dino replay`` use its names as they come.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dino.crops.parameters import GLOBAL_VIEWS
from dino.crops.resample import to_device
from dino.models.backbone import Backbone, Tokens

Condition = Callable[[Mapping[str, float]], bool]  # on a line of the log


class Masked(NamedTuple):
    """The masked tokens of the global views of a micro-batch, of which there are M.

    Tokens are counted in the order (G, B, N): by view, sample and position.

    Attributes:
        mask: (G, B, N) bool, true where the student's token is replaced by the mask token.
        index: (M,) int64, where ``mask.flatten()`` is true; known to the host, so that gathering them does not wait.
        weight: (M,) float64, 1 / (G B m) for a token of a view with m masked tokens: a mean over the masked tokens
            of a view, and over all views, masked or not (as in DINOv2).
        views: (n,) int64, those of the G * B views that have masked tokens; known to the host as well.
    """

    mask: Tensor
    index: Tensor
    weight: Tensor
    views: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Masked":
        """The masked tokens of a (B, G, N) mask on the CPU."""
        mask = mask.transpose(0, 1).contiguous()  # (G, B, N)
        per_view = mask.sum(-1, keepdim=True).double() * len(mask) * mask.shape[1]  # (G, B, 1)
        index, views = mask.flatten().nonzero()[:, 0], mask.any(-1).flatten().nonzero()[:, 0]
        return cls(mask, index, (1 / per_view).expand(mask.shape)[mask], views)

    def to(self, device: torch.device) -> "Masked":
        """The same on a device, without waiting for it."""
        return Masked(*(to_device(part, device) for part in self))

    def gather(self, patches: Tensor) -> Tensor:
        """The masked ones, (M, D), of the patch tokens (V, B, N, D) of the first group of views, V >= G."""
        return patches[: len(self.mask)].flatten(0, 2)[self.index]

    def gather_views(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of the views that have masked ones.

        Args:
            patches: (V, B, N, D) of the first group of views, V >= G.

        Returns:
            The tokens (n, N, D), and the places of the masked ones among these n * N, (M,) int64.
        """
        count = self.mask.shape[-1]
        view = torch.searchsorted(self.views, self.index // count)
        return patches[: len(self.mask)].flatten(0, 1)[self.views], view * count + self.index % count


class Inputs(NamedTuple):
    """Inputs of the networks for a micro-batch.

    Attributes:
        groups: Views by size, (V_g, B, C, h, w); the first two views are the global ones.
        keep: (B, V, depth, 2) multipliers of the student's residual branches, or None.
        masked: The masked tokens, where an objective masks.
    """

    groups: Sequence[Tensor]
    keep: Tensor | None = None
    masked: Masked | None = None

    @property
    def global_views(self) -> Tensor:
        """The global views, (G, B, C, h, w)."""
        return self.groups[0][:GLOBAL_VIEWS]


class Outputs(NamedTuple):
    """What a network returns for V views of B samples; a tuple, so that hooks find its tensors.

    Attributes:
        tokens: The backbone's tokens of each group of views of one size, with leading dimensions (V_g, B); patch tokens
            of the first group alone, and only where an objective reads them.
        logits: What each objective's head makes of them (:meth:`Objective.project`), by the objective's name:
            (V, B, ...), or (M, ...) of the masked tokens; V may be the first views alone.
        masked: The masked tokens, where an objective masks.
    """

    tokens: list[Tokens]
    logits: dict[str, Tensor]
    masked: Masked | None = None


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

    Args:
        weight: Factor of its losses in the sum that is minimised.

    Attributes:
        name: Key of its outputs, and its name in settings.
        head: Name of its head in both networks and in checkpoints, None without one. It ends with ``head``, by which
            readers of backbones recognise that it is not part of one. Of objectives that name the same head, the
            first builds it and all use it.
        teacher_head: Whether the teacher's head is used too.
        cls_only: Whether it reads the cls token alone, so that the last block may leave out the other tokens. Else it
            gets the patch tokens of the first group of views.
        masks: Whether tokens of the student's global views are masked.
        reads_teacher: Whether it reads the outputs of the teacher, the moving average.
        across_samples: Whether the loss of a sample depends on the other samples of its micro-batch.
        whole_step: Whether :meth:`prepare` needs the teacher's outputs of all micro-batches of a step.
        warnings: Text for the user by the condition on a line of the log (see :meth:`log_values`) that lasts.
    """

    name: ClassVar[str]
    head: str | None = None
    teacher_head: ClassVar[bool] = True
    cls_only: ClassVar[bool] = True
    masks: ClassVar[bool] = False
    reads_teacher: ClassVar[bool] = True
    across_samples: ClassVar[bool] = False
    whole_step: bool = False
    warnings: ClassVar[Mapping[str, Condition]] = {}

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def build_head(self, embed_dim: int) -> nn.Module:
        """The student's head, with initial weights, for tokens of dimension ``embed_dim``."""
        raise NotImplementedError

    @staticmethod
    def project(head: nn.Module, tokens: Sequence[Tokens], masked: Masked | None) -> Tensor:
        """Output of the head, within the network's ``forward``.

        Args:
            head: As :meth:`build_head` made it.
            tokens: Of each group of views, (V_g, B, ...).
            masked: The masked tokens, where an objective masks.
        """
        raise NotImplementedError

    def prepare(self, teacher: Sequence[Outputs], values: Mapping[str, float]) -> None:
        """Called before the first micro-batch of a step where ``whole_step``.

        Args:
            teacher: Of each micro-batch; its own logits may be overwritten.
            values: Scheduled values of the step, see :meth:`scheduled`.
        """

    def scheduled(self, step: int) -> dict[str, float]:
        """Scheduled values of ``step``, counted from 0, by the name under which they are logged."""
        return {}

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        """Losses and diagnostics of a micro-batch.

        Args:
            student: Of all V views. The logits of the own head may be overwritten, because nothing else reads them.
            teacher: Of the first G views, without gradient; likewise. Its logits include the targets of a frozen
                network, and its tokens are left out where no objective reads them.
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


class FrozenNetwork(nn.Module, ABC):
    """A network that is never trained, from which the student learns besides its own moving average.

    No checkpoint contains it.

    Attributes:
        backbone: Its backbone, in eval mode and without gradients.
    """

    backbone: Backbone

    @abstractmethod
    def objectives(self, seed: int) -> list[Objective]:
        """The objectives that learn from it.

        Args:
            seed: Seed of the initial weights of their heads.
        """

    @abstractmethod
    def targets(self, views: Tensor) -> dict[str, Tensor]:
        """Its outputs for the global views, (G, B, C, h, w), by the name of the objective that learns them."""
