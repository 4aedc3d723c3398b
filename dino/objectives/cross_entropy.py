"""Cross-entropy with given targets, value and gradient in one pass: of views (DINO) and of masked tokens (iBOT)."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dino.errors import ConfigError
from dino.objectives.pieces import in_pieces, piece_size

# Returns the loss of logits and targets at a temperature; writes the gradient into the last argument, if given.
LossAndGradient = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]
TokenLossAndGradient = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]  # with weights first


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
    return _CrossEntropy.apply(student, targets, float(student_temp), overwrite, _fastest(student, targets))


def masked_loss(
    student: Tensor, targets: Tensor, weights: Tensor, student_temp: float, *, overwrite: bool = False
) -> Tensor:
    """Weighted cross-entropy of masked tokens with the teacher's targets (Zhou et al. 2021, arXiv 2111.07832, eq. 2).

    ::

        L = sum_m w_m [ logsumexp(z_m / temp) - q_m . z_m / temp ]
        dL/dz_m = w_m (softmax(z_m / temp) - q_m) / temp

    Args:
        student: (M, K) logits of the masked tokens, fp32 or fp64; M may be 0.
        targets: (M, K) teacher probabilities of the same tokens, each row with the sum 1; no gradient flows into them.
        weights: (M,) weight of each token.
        student_temp: Temperature of the student.
        overwrite: As in :func:`dino_loss`.

    Returns:
        The loss, a scalar, in nats.
    """
    compute = partial(_fastest_for_tokens(student, targets), weights.to(student.dtype))
    return _CrossEntropy.apply(student, targets, float(student_temp), overwrite, compute)


def _masked_tokens(weights: Tensor, student: Tensor, targets: Tensor, temp: float, gradient: Tensor | None) -> Tensor:
    """The loss of :func:`masked_loss`; its gradient is written to ``gradient``, which may be ``student`` itself."""
    count, prototypes = student.shape
    if not count:
        return student.sum()
    piece = piece_size(count, prototypes, student.device)
    losses = student.new_empty(count)

    def work(first: int, last: int) -> None:
        buffers = [student.new_empty(min(piece, last - first), prototypes) for _ in range(2)]
        for start in range(first, last, piece):
            part = slice(start, min(start + piece, last))
            scaled, probabilities = (buffer[: part.stop - start] for buffer in buffers)
            torch.div(student[part], temp, out=scaled)
            torch.softmax(scaled, -1, out=probabilities)
            losses[part] = log_sums(scaled, probabilities) - torch.linalg.vecdot(scaled, targets[part])
            if gradient is not None:
                torch.sub(probabilities, targets[part], out=gradient[part]).mul_(weights[part, None] / temp)

    in_pieces(work, count, piece, student.device)
    return (losses * weights).sum()


class _CrossEntropy(torch.autograd.Function):
    """The gradient is explicit, because autograd would keep three more tensors of the student's size."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, targets: Tensor, temp: float, overwrite: bool, compute: LossAndGradient
    ) -> Tensor:
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = student.detach() if overwrite else torch.empty_like(student)
            ctx.save_for_backward(gradient)
        ctx.overwrite = overwrite
        with torch.autocast(student.device.type, enabled=False):  # it would take the dot products in bf16
            return compute(student.detach(), targets, temp, gradient)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # Reading the value from a GPU would make the host wait.
        if gradient.device.type != "cpu" or float(grads[0]) != 1:
            gradient = gradient.mul_(grads[0]) if ctx.overwrite else gradient * grads[0]
        return gradient, None, None, None, None


def _fits_kernel(student: Tensor, targets: Tensor) -> bool:
    """Whether the logits are on a GPU, and as its kernels want them."""
    fits = all(x.dtype == torch.float32 and x.is_contiguous() for x in (student, targets))
    return student.device.type == "cuda" and fits and find_spec("triton") is not None


def _fastest(student: Tensor, targets: Tensor) -> LossAndGradient:
    """The GPU kernel where it is usable, else torch's operations."""
    if _fits_kernel(student, targets):
        from dino.objectives import kernel

        if kernel.usable(student.device, _loss_and_gradient):
            return kernel.loss_and_gradient
    return _loss_and_gradient


def _fastest_for_tokens(student: Tensor, targets: Tensor) -> TokenLossAndGradient:
    """As :func:`_fastest`, for masked tokens."""
    if _fits_kernel(student, targets):
        from dino.objectives import kernel

        if kernel.usable_for_tokens(student.device, _masked_tokens):
            return kernel.token_loss_and_gradient
    return _masked_tokens


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
                    total += count * log_sums(scaled, probabilities) - torch.linalg.vecdot(scaled, others)
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


def log_sums(scaled: Tensor, probabilities: Tensor) -> Tensor:
    """``logsumexp`` of (b, K) logits with a known softmax, (b,): the largest probability is exp(max) / sum."""
    return scaled.amax(-1) - probabilities.amax(-1).log_()
