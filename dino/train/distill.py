"""Self-distillation: student, teacher and objectives, and what one micro-batch and one optimizer step do to them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino import distributed, progress
from dino.config.schema import ObjectiveConfig, PretrainConfig
from dino.errors import ConfigError
from dino.models.backbone import Backbone, BackboneSpec, Tokens, build_backbone, compile_blocks, should_compile
from dino.models.weights import init_from, report_initial_weights
from dino.objectives import FrozenNetwork, Inputs, Masked, Objective, Outputs
from dino.objectives.dino import DINO
from dino.objectives.ibot import IBOT
from dino.objectives.regression import Regression
from dino.objectives.spread import KDE, KoLeo
from dino.train.optimizer import Length, Ramp
from dino.train.profiling import BACKWARD, LOSS, STUDENT, TEACHER, Span, no_span

DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}  # of weights; bf16 is autocast
FROZEN_SEED = 100  # added to the seed of the heads of a frozen network's objectives; others count from 0


class Head(NamedTuple):
    """How an objective uses a head of a network.

    Attributes:
        module: Name of the head in the network.
        project: See :meth:`Objective.project`.
        of_teacher: Whether the teacher's is used.
    """

    module: str
    project: Callable[[nn.Module, Sequence[Tokens], Masked | None], Tensor]
    of_teacher: bool


class Network(nn.Module):
    """A backbone with the heads of the objectives.

    Args:
        backbone: The backbone; it gets a mask token if an objective masks.
        objectives: They build the heads.
    """

    def __init__(self, backbone: Backbone, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.backbone = backbone
        self.cls_only = all(objective.cls_only for objective in objectives)
        if backbone.mask_token is None and any(objective.masks for objective in objectives):
            backbone.add_mask_token()
        self.heads: dict[str, Head] = {}
        for objective in objectives:
            if objective.head is None:
                continue
            self.heads[objective.name] = Head(objective.head, objective.project, objective.teacher_head)
            if not hasattr(self, objective.head):
                self.add_module(objective.head, objective.build_head(backbone.embed_dim))

    def forward(
        self,
        groups: Sequence[Tensor],
        keep: Tensor | None = None,
        masked: Masked | None = None,
        as_teacher: bool = False,
    ) -> Outputs:
        """Tokens and logits of every view.

        Args:
            groups: Views of one size each, (V_g, B, C, h, w); the first group begins with the global views.
            keep: (B, V, depth, 2) multipliers of the residual branches, or None.
            masked: The masked tokens, where an objective masks.
            as_teacher: Do not replace the masked tokens, and use the teacher's heads only.

        Returns:
            Tokens of each group, (V_g, B, ...), and the logits of each objective, fp32 or fp64.
        """
        tokens, first = [], 0
        for views in groups:
            count, batch = views.shape[:2]
            # (B, V, depth, 2) -> (V_g * B, depth, 2), in the order of the flattened views
            kept = None if keep is None else keep[:, first : first + count].transpose(0, 1).flatten(0, 1)
            mask = None if masked is None or as_teacher or first else _padded(masked.mask, count).flatten(0, 1)
            found = self.backbone(views.flatten(0, 1), keep=kept, cls_only=self.cls_only or first > 0, mask=mask)
            tokens.append(_by_view(found, count, batch))
            first += count
        logits = {
            name: head.project(getattr(self, head.module), tokens, masked)
            for name, head in self.heads.items()
            if head.of_teacher or not as_teacher
        }
        return Outputs(tokens, logits, masked)

    def published_state(self) -> dict[str, Tensor]:
        """The weights by facebookresearch/dino's names (``backbone.cls_token``, ``head.mlp.0…``)."""
        return {_published(name): tensor for name, tensor in self.state_dict().items()}

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`published_state` returned; every name must match."""
        own = {_published(name): name for name in self.state_dict()}
        self.load_state_dict({own.get(name, name): tensor for name, tensor in state.items()})


def _published(name: str) -> str:
    return name.replace("backbone.vit.", "backbone.", 1)


def _padded(mask: Tensor, views: int) -> Tensor:
    """A (G, B, N) mask for this many views, (V_g, B, N); of the further ones nothing is masked."""
    more = views - len(mask)
    return torch.cat([mask, mask.new_zeros(more, *mask.shape[1:])]) if more else mask


def _by_view(tokens: Tokens, count: int, batch: int) -> Tokens:
    """Tokens of (V_g * B, ...) inputs with leading dimensions (V_g, B)."""
    rest = (part if part is None else part.unflatten(0, (count, batch)) for part in (tokens.registers, tokens.patches))
    return Tokens(tokens.cls.unflatten(0, (count, batch)), *rest)


@dataclass
class Accumulated:
    """Results of one micro-batch, each scalar times its fraction of the step, without gradient.

    Attributes:
        loss: Weighted sum of the losses.
        losses: Losses by name, unweighted.
        diagnostics: Further numbers by name.
        features: (B, D) cls tokens of the first view: the teacher's, or the student's where nothing reads the teacher.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    diagnostics: dict[str, Tensor]
    features: Tensor


class SelfDistillation(nn.Module):
    """A student that is trained, and a teacher that is its moving average.

    Args:
        student: Network that is trained.
        teacher: Network of the same shape; it gets the student's weights here and never a gradient.
        objectives: Those that built the heads of both.
        device: Where all of them are.
        frozen: A further network that objectives learn from, if any.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        objectives: Sequence[Objective],
        device: torch.device,
        frozen: FrozenNetwork | None = None,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.frozen = student, teacher, frozen
        self.objectives: Sequence[Objective] = nn.ModuleList(objectives)  # type: ignore[assignment]
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self._parallel = [distributed.parallelize(self.student, device)]  # in a list: no second entry in state_dict

    def scheduled(self, step: int) -> dict[str, float]:
        """Scheduled values of all objectives at ``step``, counted from 0."""
        return {name: value for objective in self.objectives for name, value in objective.scheduled(step).items()}

    @property
    def whole_step(self) -> bool:
        """Whether an objective needs the teacher's outputs of all micro-batches before the student's."""
        return any(objective.whole_step for objective in self.objectives)

    @torch.no_grad()
    def teach(self, inputs: Inputs, span: Span = no_span) -> Outputs:
        """Outputs of the teacher and of the frozen network for the global views of a micro-batch."""
        views, outputs = inputs.global_views, Outputs([], {})
        with span(TEACHER):
            if any(objective.reads_teacher for objective in self.objectives):
                outputs = self.teacher([views], masked=inputs.masked, as_teacher=True)
            if self.frozen is not None:
                outputs.logits.update(self.frozen.targets(views))
        return outputs

    def prepare(self, teacher: Sequence[Outputs], values: Mapping[str, float]) -> None:
        """Targets that depend on all micro-batches of a step; needed where :attr:`whole_step`."""
        for objective in self.objectives:
            if objective.whole_step:
                objective.prepare(teacher, values)

    def accumulate(
        self,
        inputs: Inputs,
        values: Mapping[str, float],
        *,
        teacher: Outputs | None = None,
        fraction: float,
        last: bool,
        span: Span = no_span,
    ) -> Accumulated:
        """Forward and backward of one micro-batch; gradients add up.

        Args:
            inputs: The micro-batch.
            values: Scheduled values of the objectives.
            teacher: What :meth:`teach` returned for it; None to compute it here.
            fraction: Weight of this micro-batch in the step (1 / accumulation).
            last: Whether it is the step's last: only then are gradients averaged over processes.
            span: Measures each part of the work.
        """
        if teacher is None:
            teacher = self.teach(inputs, span)
        parallel = self._parallel[0]
        with distributed.without_gradient_sync(parallel, not last):
            with span(STUDENT):
                student = parallel(*inputs)
            with span(LOSS):
                terms = [objective(student, teacher, values) for objective in self.objectives]
                pairs = zip(self.objectives, terms, strict=True)
                weighted = [o.weight * loss for o, t in pairs for loss in t.losses.values()]
                loss = torch.stack(weighted).sum() * fraction
            with span(BACKWARD), torch.autocast(loss.device.type, enabled=False):
                loss.backward()
        losses = {name: x.detach() * fraction for t in terms for name, x in t.losses.items()}
        diagnostics = {name: x.detach() * fraction for t in terms for name, x in t.diagnostics.items()}
        features = (teacher.tokens or student.tokens)[0].cls[0].detach()
        return Accumulated(loss.detach(), losses, diagnostics, features)

    def freeze_last_layer(self) -> None:
        """Drop the gradients of the heads' last layers, so that the optimizer does not update them (as in DINO)."""
        for name, parameter in self.student.named_parameters():
            if ".last_layer." in name:
                parameter.grad = None

    def freeze_backbone(self) -> None:
        """Drop the gradients of the backbone; a mask token is trained, because start weights often have none."""
        for name, parameter in self.student.named_parameters():
            if name.startswith("backbone.") and name != "backbone.mask_token":
                parameter.grad = None

    @torch.no_grad()
    def update_teacher(self, momentum: float, finite: Tensor) -> None:
        """Teacher = momentum * teacher + (1 - momentum) * student, and the objectives' state; only if ``finite``."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student = [parameter.detach() for parameter in self.student.parameters()]
        pull = torch.where(finite, 1.0 - momentum, 0.0).to(teacher[0].dtype)
        if pull.device.type == "cpu":  # reading it costs nothing here, and saves a copy of all weights
            torch._foreach_lerp_(teacher, student, float(pull))
        else:
            torch._foreach_mul_(teacher, 1.0 - pull)
            torch._foreach_add_(teacher, torch._foreach_mul(student, pull))
        for objective in self.objectives:
            objective.step(finite)


def build_objectives(
    config: PretrainConfig, length: Length, seed: int, frozen: FrozenNetwork | None = None
) -> list[Objective]:
    """The objectives of a run, those with a weight; the only place that lists them.

    Args:
        config: Settings of the run.
        length: Converts epochs to steps.
        seed: Seed of the heads' initial weights.
        frozen: A network that further objectives learn from, if any.

    Raises:
        ConfigError: If a setting is out of range, or no objective has a weight.
    """
    model, weights, batch_size = config.model, config.objective, config.training.batch_size_per_gpu
    temp = Ramp(model.warmup_teacher_temp, model.teacher_temp, length.steps(model.warmup_teacher_temp_epochs))
    builders: dict[str, Callable[[], Objective]] = {
        "dino": lambda: DINO(model, temp, seed, weights.targets, weights.dino),
        "ibot": lambda: IBOT(model, weights, temp, seed + 1),
        "regression": lambda: Regression(weights, seed + 2),
        "koleo": lambda: KoLeo(weights.koleo, weights.spread_group, batch_size),
        "kde": lambda: KDE(weights.kde, weights.kde_concentration, weights.spread_group, batch_size),
    }
    for name in builders:
        if getattr(weights, name) < 0:
            raise ConfigError(f"expected objective.{name} of at least 0, found {getattr(weights, name)}")
    built = [build() for name, build in builders.items() if getattr(weights, name) > 0]
    built += frozen.objectives(seed + FROZEN_SEED) if frozen else []
    if all(objective.head is None for objective in built):
        raise ConfigError(
            "expected a weight above 0 for objective.dino, objective.ibot or objective.regression, or a teacher to "
            "distil, found none: set one"
        )
    return built


def needs_masks(weights: ObjectiveConfig) -> bool:
    """Whether an objective with a weight masks."""
    return any(getattr(weights, objective.name) > 0 for objective in (IBOT, Regression))


def build(
    config: PretrainConfig,
    spec: BackboneSpec,
    length: Length,
    device: torch.device,
    frozen: FrozenNetwork | None = None,
) -> SelfDistillation:
    """Student, teacher and objectives with their initial weights, on the device.

    Args:
        config: Settings of the run.
        spec: The backbone.
        length: Length of the run.
        device: Where to compute.
        frozen: A further network that the run learns from, if any; it is moved to the device.

    Raises:
        ConfigError: If a setting is out of range, or the architecture is unknown.
    """
    model, speed, dtype = config.model, config.speed, DTYPES[config.speed.precision]
    backbone = build_backbone(spec, config.seed)
    objectives = build_objectives(config, length, config.seed + 1, frozen)
    if model.init:
        loaded, masks = init_from(backbone, model.init, model.init_arch), any(part.masks for part in objectives)
        if masks:
            backbone.add_mask_token(loaded.mask_token)
        report_initial_weights(loaded, backbone.spec, masks)
    student = Network(backbone, objectives).to(device, dtype)
    student.backbone.checkpointing = speed.checkpointing
    if should_compile(speed.compile, device):
        for network in (student, frozen) if frozen else (student,):
            compile_blocks(network.backbone, progress.warn)
        progress.say("compiling the blocks: the first step takes longer; speed.compile=false does not compile")
    parts = [objective.to(device, dtype) for objective in objectives]
    return SelfDistillation(
        student, copy.deepcopy(student), parts, device, frozen.to(device, dtype) if frozen else None
    )
