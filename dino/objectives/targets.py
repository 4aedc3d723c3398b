"""Targets of self-distillation: the teacher's logits as probabilities, by centring or by Sinkhorn-Knopp."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from dino import distributed
from dino.errors import ConfigError
from dino.objectives.cross_entropy import log_sums
from dino.objectives.pieces import in_pieces, piece_size

TARGETS = ("centring", "sinkhorn")


class Targets(nn.Module):
    """Base of what turns the teacher's logits into targets.

    Attributes:
        whole_step: Whether :meth:`prepare` needs the logits of all micro-batches of a step.
    """

    whole_step: ClassVar[bool] = False

    def prepare(self, teacher_logits: Sequence[Tensor], temp: float) -> None:
        """Called once per step where ``whole_step``, before :meth:`targets`.

        Args:
            teacher_logits: Logits of each micro-batch, (..., K), which may be overwritten.
            temp: Temperature of the teacher.
        """

    def observe(self, teacher_logits: Tensor) -> None:
        """Take note of a micro-batch, (..., K), before its :meth:`targets` may overwrite it."""

    def targets(self, teacher_logits: Tensor, temp: float, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
        """Teacher probabilities and their entropies; near 0 or near ln K the teacher has collapsed.

        Args:
            teacher_logits: (..., N, K) logits, fp32 or fp64.
            temp: Temperature of the teacher.
            overwrite: Write the probabilities over the logits: for logits that nothing else reads.

        Returns:
            Probabilities of the shape of the logits, and the entropy of each row in nats, (..., N).
        """
        raise NotImplementedError

    def step(self, finite: Tensor) -> None:
        """Update the state after an optimizer step, unless ``finite``, a scalar bool on the device, is false."""


class Centre(Targets):
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
        """Centred and sharpened probabilities, and their entropies."""
        found = teacher_logits if overwrite else torch.empty_like(teacher_logits)
        rows, result = teacher_logits.flatten(0, -2), found.flatten(0, -2)  # (N, K)
        count, prototypes = rows.shape
        piece = piece_size(count, prototypes, found.device)
        entropies = found.new_empty(count)

        def work(first: int, last: int) -> None:
            buffer = found.new_empty(min(piece, last - first), prototypes)
            for start in range(first, last, piece):
                part = slice(start, min(start + piece, last))
                sharpened = buffer[: part.stop - start]
                torch.sub(rows[part], self.center, out=sharpened).div_(temp)
                torch.softmax(sharpened, -1, out=result[part])
                entropies[part] = log_sums(sharpened, result[part]) - torch.linalg.vecdot(result[part], sharpened)

        with torch.autocast(found.device.type, enabled=False):  # it would take the dot products in bf16
            in_pieces(work, count, piece, found.device)
        return found, entropies.view(found.shape[:-1])

    @torch.no_grad()
    def observe(self, teacher_logits: Tensor) -> None:
        """Add a micro-batch to the mean of the next :meth:`step`."""
        self.observed += teacher_logits.flatten(0, -2).sum(0)
        self.count += teacher_logits[..., 0].numel()

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """Move the centre by the mean of what was observed on all processes since the last step, if anything was.

        Args:
            finite: Scalar bool on the centre's device; where false the centre stays as it is. The host never waits
                for it.
        """
        sums = torch.cat([self.observed, self.observed.new_full((1, 1), self.count)], dim=1)  # (1, K + 1)
        sums = distributed.mean_over_ranks(sums)
        count = sums[:, -1:]
        mean = sums[:, :-1] / torch.where(count > 0, count, 1.0)
        moved = self.center * self.momentum + mean * (1 - self.momentum)
        self.center.copy_(torch.where(finite & (count > 0), moved, self.center))
        self.observed.zero_()
        self.count = 0


class SinkhornKnopp(Targets):
    """Assignments in which every prototype gets the same share (Caron et al. 2020, arXiv 2006.09882, algorithm 1).

    As in DINOv2, over all samples of a step, on all processes. With ``E = exp((z - max z) / temp)`` of N rows, vectors
    ``u`` (K) and ``v`` (N) are found such that ``N u_k E_nk v_n`` has rows with the sum 1 and columns with the sum
    N / K::

        u_k = 1 / (K sum_n v_n E_nk)        v_n = 1 / (N sum_k u_k E_nk)        (in turn, starting with v = 1 / N)

    One maximum is subtracted from all logits, because a maximum per row would change the result of the first step.
    There is no state.

    Args:
        iterations: Number of times that both are normalized.
    """

    whole_step = True

    def __init__(self, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations

    @torch.no_grad()
    def prepare(self, teacher_logits: Sequence[Tensor], temp: float) -> None:
        """Overwrite the logits of all micro-batches of a step with the assignments."""
        parts = [logits.flatten(0, -2) for logits in teacher_logits]  # (N_i, K)
        count = distributed.sum_over_ranks(parts[0].new_tensor([sum(len(part) for part in parts)]))
        lowest = parts[0].new_full((1,), -torch.inf)
        highest = distributed.max_over_ranks(torch.cat([lowest, *[part.amax().view(1) for part in parts if len(part)]]))
        exponentials = [part.sub_(highest).div_(temp).exp_() for part in parts]
        rows = [part.new_ones(len(part)) for part in parts]  # N v
        for _ in range(self.iterations):
            sums = torch.stack([v @ e for v, e in zip(rows, exponentials, strict=True)]).sum(0)  # (K,)
            columns = 1 / (len(sums) * distributed.sum_over_ranks(sums) / count)  # u
            rows = [1 / (e @ columns) for e in exponentials]
        for part, v in zip(exponentials, rows, strict=True):
            part.mul_(columns).mul_(v[:, None])

    @torch.no_grad()
    def targets(self, teacher_logits: Tensor, temp: float, *, overwrite: bool = False) -> tuple[Tensor, Tensor]:
        """The assignments that :meth:`prepare` wrote, and their entropies."""
        return teacher_logits, torch.special.entr(teacher_logits).sum(-1)


def build_targets(name: str, out_dim: int, center_momentum: float) -> Centre | SinkhornKnopp:
    """What ``objective.targets`` names.

    Args:
        name: ``centring`` or ``sinkhorn``.
        out_dim: Number of prototypes K.
        center_momentum: Momentum of the centre.

    Raises:
        ConfigError: If the name is neither.
    """
    if name not in TARGETS:
        raise ConfigError(f"expected objective.targets {' or '.join(TARGETS)}, found '{name}'")
    return Centre(out_dim, center_momentum) if name == "centring" else SinkhornKnopp()
