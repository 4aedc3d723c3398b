"""Self-distillation with no labels: objective, loss and centre (Caron et al. 2021, arXiv 2104.14294)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dino.config.schema import ModelConfig
from dino.distributed import mean_over_ranks
from dino.errors import ConfigError
from dino.evaluate.verdict import ALL_PROTOTYPES, ONE_PROTOTYPE
from dino.models.backbone import Tokens
from dino.models.head import DINOHead
from dino.objectives import Condition, Objective, Outputs, Terms
from dino.objectives.pieces import in_pieces, piece_size


class DINO(Objective):
    """Cross-entropy between centred, sharpened teacher and student (Caron et al. 2021, arXiv 2104.14294, eq. 1-3).

    Args:
        settings: Number of prototypes K, temperature of the student, momentum of the centre, and the head.
        teacher_temp: Temperature of the teacher at a step, counted from 0.
        seed: Seed of the head's initial weights.

    Raises:
        ConfigError: If there are less than two prototypes.
    """

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

    def __init__(self, settings: ModelConfig, teacher_temp: Callable[[int], float], seed: int) -> None:
        super().__init__()
        if settings.out_dim < 2:
            raise ConfigError(f"expected model.out_dim of at least 2, found {settings.out_dim}")
        self.settings, self.teacher_temp, self.seed = settings, teacher_temp, seed
        self.centre = Centre(settings.out_dim, settings.center_momentum)

    def build_head(self, embed_dim: int) -> nn.Module:
        """The projection head, with initial weights; it maps (N, D) tokens to (N, K) logits."""
        settings = self.settings
        return DINOHead(
            embed_dim,
            settings.out_dim,
            settings.hidden_dim,
            settings.bottleneck_dim,
            settings.use_bn_in_head,
            settings.norm_last_layer,
            self.seed,
        )

    @staticmethod
    def head_inputs(tokens: Sequence[Tokens]) -> Tensor:
        """The cls token of every view: (V, B, D)."""
        return torch.cat([group.cls for group in tokens])

    def scheduled(self, step: int) -> dict[str, float]:
        """The teacher's temperature."""
        return {"teacher_temp": self.teacher_temp(step)}

    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        """Loss and teacher entropy of a micro-batch, both in nats; the logits are overwritten.

        Args:
            student: With (V, B, K) logits.
            teacher: With (G, B, K) logits of the first G views.
            values: ``teacher_temp``.
        """
        logits = teacher.logits[self.head]
        self.centre.observe(logits)
        # Nothing else reads these logits: their memory takes the targets, and the student's the gradient.
        targets, entropy = self.centre.targets(logits, values["teacher_temp"], overwrite=True)
        loss = dino_loss(student.logits[self.head], targets, self.settings.student_temp, overwrite=True)
        return Terms({"dino": loss}, {"teacher_entropy": entropy})

    def step(self, finite: Tensor) -> None:
        """Move the centre by what was observed since the last step, if the step was ``finite``."""
        self.centre.step(finite)

    def log_values(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Loss and entropy relative to ln K, which a uniform distribution over the prototypes has."""
        uniform = math.log(self.settings.out_dim)
        return {
            "loss_relative": numbers["loss/dino"] / uniform,
            "teacher_entropy_relative": numbers["teacher_entropy"] / uniform,
        }


def dino_loss(student: Tensor, targets: Tensor, student_temp: float, *, overwrite: bool = False) -> Tensor:
    """Cross-entropy of every student view with every teacher view but its own (Caron et al. 2021, eq. 3).

    With ``z_v`` the student's logits, ``Q_v`` the sum of the targets of the teacher views other than ``v``, and
    ``n_v`` how many those are, the pairwise sum is linear in the views::

        L = 1 / (n_pairs B) sum_v [ n_v logsumexp(z_v / temp) - Q_v . z_v / temp ]
        dL/dz_v = (n_v softmax(z_v / temp) - Q_v) / (n_pairs B temp)

    so that 2 + 8 views cost ten terms instead of eighteen. Value and gradient use the same softmax and are computed
    together, on a CPU in pieces that fit into its cache.

    Args:
        student: (V, B, K) logits, fp32 or fp64 (bf16 has an error of 0.05 near ``|z| = 1`` after division by 0.04).
        targets: (G, B, K) teacher probabilities of the first G views; no gradient flows into them.
        student_temp: Temperature of the student.
        overwrite: Write the gradient over the logits: saves its memory, and on a CPU a third of the time. For logits
            that nothing else reads.

    Returns:
        The loss, a scalar, in nats.

    Raises:
        ConfigError: There is no pair of two different views.
    """
    views, teacher_views = len(student), len(targets)
    if teacher_views < 1 or views < max(2, teacher_views):
        raise ConfigError(
            f"the loss compares two different views, found {views} of the student and {teacher_views} of the teacher:"
            " give it at least two"
        )
    return _DinoLoss.apply(student, targets, float(student_temp), overwrite)


class _DinoLoss(torch.autograd.Function):
    """The gradient is explicit, because autograd would keep three more tensors of the student's size."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: Tensor, temp: float, overwrite: bool) -> Tensor:
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = student.detach() if overwrite else torch.empty_like(student)
            ctx.save_for_backward(gradient)
        ctx.overwrite = overwrite
        with torch.autocast(student.device.type, enabled=False):  # it would take the dot products in bf16
            return _fastest(student, targets)(student.detach(), targets, temp, gradient)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # Reading the value from a GPU would make the host wait.
        if gradient.device.type != "cpu" or float(grads[0]) != 1:
            gradient = gradient.mul_(grads[0]) if ctx.overwrite else gradient * grads[0]
        return gradient, None, None, None


def _fastest(student: Tensor, targets: Tensor) -> Callable[[Tensor, Tensor, float, Tensor | None], Tensor]:
    """The GPU kernel where it is usable, else torch's operations."""
    fits = all(x.dtype == torch.float32 and x.is_contiguous() for x in (student, targets))
    if student.device.type == "cuda" and fits and find_spec("triton") is not None:
        from dino.objectives import kernel

        if kernel.usable(student.device, _loss_and_gradient):
            return kernel.loss_and_gradient
    return _loss_and_gradient


def _loss_and_gradient(student: Tensor, targets: Tensor, temp: float, gradient: Tensor | None) -> Tensor:
    """The loss; its gradient is written to ``gradient``, which may be ``student`` itself."""
    views, batch, prototypes = student.shape
    pairs = len(targets) * (views - 1)
    piece = piece_size(batch, prototypes, student.device)
    factor = 1 / (pairs * batch * temp)
    losses = student.new_empty(batch)

    def work(first: int, last: int) -> None:
        buffers = [student.new_empty(min(piece, last - first), prototypes) for _ in range(3)]
        for start in range(first, last, piece):
            part = slice(start, min(start + piece, last))
            scaled, probabilities, pull = (buffer[: part.stop - start] for buffer in buffers)
            total = student.new_zeros(part.stop - start)  # (b,)
            for alike, others, count in _others(targets[:, part], views):
                if gradient is not None:
                    torch.mul(others, -factor, out=pull)
                for view in alike:
                    torch.div(student[view, part], temp, out=scaled)
                    torch.softmax(scaled, -1, out=probabilities)
                    total += count * _log_sums(scaled, probabilities) - torch.linalg.vecdot(scaled, others)
                    if gradient is not None:
                        torch.add(pull, probabilities, alpha=count * factor, out=gradient[view, part])
            losses[part] = total

    in_pieces(work, batch, piece, student.device)
    return losses.sum() / (pairs * batch)


def _others(targets: Tensor, views: int) -> Iterator[tuple[Iterable[int], Tensor, int]]:
    """For views with the same targets: the views, the sum of their targets (b, K), and the number of targets."""
    count = len(targets)
    for view in range(count):
        others = [targets[v] for v in range(count) if v != view]
        yield [view], sum(others[1:], others[0]) if others else torch.zeros_like(targets[0]), count - 1
    yield range(count, views), targets.sum(0), count


def _log_sums(scaled: Tensor, probabilities: Tensor) -> Tensor:
    """``logsumexp`` of (b, K) logits with a known softmax, (b,): the largest probability is exp(max) / sum."""
    return scaled.amax(-1) - probabilities.amax(-1).log_()


class Centre(nn.Module):
    """Moving average of the teacher's logits, subtracted from them against collapse (Caron et al. 2021, eq. 4).

    An optimizer step may have several micro-batches: each is observed, and the average moves once.

    Attributes:
        center: (1, K), the moving average; the only entry of the state dict, named as in facebookresearch/dino.
    """

    center: Tensor
    observed: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9) -> None:
        """Start at zero.

        Args:
            out_dim: Number of prototypes K.
            momentum: Weight of the old centre in each step.
        """
        super().__init__()
        self.momentum = momentum
        self.count = 0
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.register_buffer("observed", torch.zeros(1, out_dim), persistent=False)

    @torch.no_grad()
    def targets(self, teacher_logits: Tensor, temp: float, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
        """Centred and sharpened teacher probabilities.

        Args:
            teacher_logits: (G, B, K) logits, fp32 or fp64.
            temp: Temperature of the teacher.
            overwrite: Write the probabilities over the logits: for logits that nothing else reads, after
                :meth:`observe`.

        Returns:
            (G, B, K) probabilities, and their mean entropy in nats, a scalar; near 0 or near ln K the teacher has
            collapsed.
        """
        found = teacher_logits if overwrite else torch.empty_like(teacher_logits)
        batch, prototypes = teacher_logits.shape[-2:]
        piece = piece_size(batch, prototypes, found.device)
        entropies = found.new_empty(found.shape[:2])

        def work(first: int, last: int) -> None:
            buffer = found.new_empty(min(piece, last - first), prototypes)
            for start in range(first, last, piece):
                part = slice(start, min(start + piece, last))
                sharpened = buffer[: part.stop - start]
                for view, logits in enumerate(teacher_logits[:, part]):
                    result = found[view, part]
                    torch.sub(logits, self.center, out=sharpened).div_(temp)
                    torch.softmax(sharpened, -1, out=result)
                    entropies[view, part] = _log_sums(sharpened, result) - torch.linalg.vecdot(result, sharpened)

        with torch.autocast(found.device.type, enabled=False):  # it would take the dot products in bf16
            in_pieces(work, batch, piece, found.device)
        return found, entropies.mean()

    @torch.no_grad()
    def observe(self, teacher_logits: Tensor) -> None:
        """Add a micro-batch to the mean of the next :meth:`step`.

        Args:
            teacher_logits: (G, B, K) logits of the teacher.
        """
        self.observed += teacher_logits.flatten(0, -2).sum(0)
        self.count += teacher_logits[..., 0].numel()

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """Move the centre by the mean of what was observed on all processes since the last step.

        Args:
            finite: Scalar bool on the centre's device; where false the centre stays as it is. The host never waits
                for it.

        Raises:
            RuntimeError: Nothing was observed since the last step.
        """
        if not self.count:
            raise RuntimeError("Centre.step needs at least one Centre.observe before it")
        sums = torch.cat([self.observed, self.observed.new_full((1, 1), self.count)], dim=1)  # (1, K + 1)
        sums = mean_over_ranks(sums)
        mean = sums[:, :-1] / sums[:, -1:]
        moved = self.center * self.momentum + mean * (1 - self.momentum)
        self.center.copy_(torch.where(finite, moved, self.center))
        self.observed.zero_()
        self.count = 0
