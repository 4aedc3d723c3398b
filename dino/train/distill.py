"""Student, teacher and objectives: one optimizer step of self-distillation with no labels, for both levels."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dino import distributed
from dino.models.backbone import Backbone
from dino.objectives.dino import Centre, dino_loss
from dino.train.profiling import BACKWARD, LOSS, STUDENT, TEACHER, Span, no_span

TEACHER_VIEWS = 2  # the teacher sees the two global views


class Network(nn.Module):
    """A backbone with the head of each objective; its state names equal facebookresearch/dino's.

    Args:
        backbone: The backbone.
        heads: Head of each objective by name; the DINO objective's is called ``head``.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head_names = list(heads)
        for name, head in heads.items():
            self.add_module(name, head)

    def forward(self, groups: Sequence[Tensor], keep: Tensor | None = None) -> dict[str, Tensor]:
        """Logits of every view, by objective: :meth:`logits` of :meth:`features`."""
        return self.logits(self.features(groups, keep))

    def features(self, groups: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """The cls token of every view.

        Args:
            groups: Views of one size each, ``(V_g, B, C, h, w)``.
            keep: ``(B, V, depth, 2)`` multipliers of the residual branches, or None.

        Returns:
            ``(V, B, D)`` features, views in the order of the groups.
        """
        tokens, first = [], 0
        for views in groups:
            count, batch = views.shape[:2]
            # (B, V, depth, 2) -> (V_g * B, depth, 2), in the order of the flattened views
            kept = None if keep is None else keep[:, first : first + count].transpose(0, 1).flatten(0, 1)
            tokens.append(self.backbone(views.flatten(0, 1), keep=kept, cls_only=True).cls.unflatten(0, (count, batch)))
            first += count
        return torch.cat(tokens)  # (V, B, D)

    def logits(self, cls: Tensor) -> dict[str, Tensor]:
        """``(V, B, K)`` logits in fp32 of ``(V, B, D)`` features, by head name."""
        return {name: getattr(self, name)(cls.flatten(0, 1)).unflatten(0, cls.shape[:2]) for name in self.head_names}

    def published_state(self) -> dict[str, Tensor]:
        """The weights under facebookresearch/dino's names for them (``backbone.cls_token``, ``head.mlp.0…``)."""
        return {_published(name): tensor for name, tensor in self.state_dict().items()}

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`published_state` gave; every name must fit."""
        own = {_published(name): name for name in self.state_dict()}
        self.load_state_dict({own.get(name, name): tensor for name, tensor in state.items()})


def _published(name: str) -> str:
    return name.replace("backbone.vit.", "backbone.", 1)


class Objective(Protocol):
    """What is learned: how a head's logits become a loss, and what is remembered from step to step.

    Attributes:
        head: Name of its head in :class:`Network`.
        needs: Tokens it reads from the backbone.
    """

    head: str
    needs: frozenset[str]

    def loss(self, student: Tensor, teacher: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
        """Loss and teacher entropy (nats) of ``(V, B, K)`` student and ``(G, B, K)`` teacher logits."""
        ...

    def step(self, finite: Tensor) -> None:
        """Close an optimizer step; a step that is not ``finite`` leaves the objective as it was."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what was remembered."""
        ...


class DINO(nn.Module):
    """Cross-entropy between centred, sharpened teacher and student (Caron et al. 2021, arXiv 2104.14294, eq. 1-3).

    Args:
        out_dim: Number of prototypes K.
        student_temp: Temperature of the student.
        center_momentum: Momentum of the centre.
    """

    head = "head"
    needs = frozenset({"cls"})

    def __init__(self, out_dim: int, student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.centre = Centre(out_dim, center_momentum)

    def loss(self, student: Tensor, teacher: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
        """Loss and teacher entropy of ``(V, B, K)`` student and ``(G, B, K)`` teacher logits, first G views shared.

        Both are overwritten.
        """
        # Nothing else reads these logits: the teacher's memory takes the targets, the student's the gradient.
        self.centre.observe(teacher)
        targets, entropy = self.centre.targets(teacher, teacher_temp, overwrite=True)
        return dino_loss(student, targets, self.student_temp, overwrite=True), entropy

    def sample_losses(self, student: Tensor, teacher: Tensor, teacher_temp: float) -> Tensor:
        """``(B,)`` loss of each sample alone, of the logits that :meth:`loss` takes; nothing is remembered."""
        targets, _ = self.centre.targets(teacher, teacher_temp)
        alone = zip(student.split(1, 1), targets.split(1, 1), strict=True)
        return torch.stack([dino_loss(z, q, self.student_temp) for z, q in alone])

    def step(self, finite: Tensor) -> None:
        """Move the centre by what was observed since the last step."""
        self.centre.step(finite)


class SelfDistillation(nn.Module):
    """A student that learns, and a teacher that is its moving average.

    Args:
        student: Network that is trained.
        teacher: Network of the same shape; it takes the student's weights here and never gets a gradient.
        objectives: What is learned, each with a head of its name in both networks.
        device: Where both live.
    """

    def __init__(self, student: Network, teacher: Network, objectives: Sequence[DINO], device: torch.device) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.objectives = nn.ModuleList(objectives)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self._parallel = [distributed.parallelize(self.student, device)]  # in a list: no second entry in state_dict

    def accumulate(
        self,
        groups: Sequence[Tensor],
        keep: Tensor | None,
        teacher_temp: float,
        *,
        share: float,
        last: bool,
        span: Span = no_span,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of one micro-batch; gradients add up.

        Args:
            groups: Views by size, ``(V_g, B, C, h, w)``; the first two views are the global ones.
            keep: ``(B, V, depth, 2)`` multipliers of the student's residual branches, or None.
            teacher_temp: Temperature of the teacher.
            share: Share of this micro-batch in the step (1 / accumulation).
            last: Whether it is the step's last: only then are gradients averaged over processes.
            span: Told what each stretch of the work is spent on.

        Returns:
            Loss and teacher entropy in nats, both times ``share``, as scalars without gradient; and the teacher's
            ``(B, D)`` features of the first view.
        """
        with span(TEACHER), torch.no_grad():
            features = self.teacher.features([groups[0][:TEACHER_VIEWS]])
            teacher = self.teacher.logits(features)
        parallel = self._parallel[0]
        with distributed.without_gradient_sync(parallel, not last):
            with span(STUDENT):
                student = parallel(groups, keep)
            with span(LOSS):
                results = [o.loss(student[o.head], teacher[o.head], teacher_temp) for o in self.objectives]  # type: ignore[operator,index]
                loss = torch.stack([loss for loss, _ in results]).sum() * share
            with span(BACKWARD), torch.autocast(loss.device.type, enabled=False):
                loss.backward()
        return loss.detach(), torch.stack([bits for _, bits in results]).mean().detach() * share, features[0]

    @torch.no_grad()
    def update_teacher(self, momentum: float, finite: Tensor) -> None:
        """Teacher = momentum * teacher + (1 - momentum) * student; unchanged unless ``finite``. Centres move too."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student = [parameter.detach() for parameter in self.student.parameters()]
        pull = torch.where(finite, 1.0 - momentum, 0.0).to(teacher[0].dtype)
        if pull.device.type == "cpu":  # reading it makes nobody wait, and saves a copy of all weights
            torch._foreach_lerp_(teacher, student, float(pull))
        else:
            torch._foreach_mul_(teacher, 1.0 - pull)
            torch._foreach_add_(teacher, torch._foreach_mul(student, pull))
        for objective in self.objectives:
            objective.step(finite)  # type: ignore[operator]

    def freeze_last_layer(self) -> None:
        """Drop the gradients of the heads' last layers, so that the optimizer leaves them alone (as DINO)."""
        for name, parameter in self.student.named_parameters():
            if ".last_layer." in name:
                parameter.grad = None
