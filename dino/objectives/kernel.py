"""The losses of DINO and iBOT with their gradients as GPU kernels, which read each row of logits twice.

Imported only where triton is installed; :func:`usable` and :func:`usable_for_tokens` return whether they work on a
device.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # prototypes per iteration
WARPS = 8
TOLERANCE = 1e-5  # relative, of the check before the first use

LossAndGradient = Callable[[Tensor, Tensor, float, Tensor | None], Tensor]
TokenLossAndGradient = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


@triton.jit
def _others(own, view, columns, prototypes, stride, teachers: tl.constexpr, block: tl.constexpr):
    """Sum of a sample's targets of teacher views other than ``view``, (block,); ``own`` are the first view's."""
    others = tl.zeros([block], tl.float32)
    for teacher in tl.static_range(teachers):  # pyright: ignore[reportGeneralTypeIssues]
        wanted = (columns < prototypes) & (view != teacher)
        others += tl.load(own + teacher * stride + columns, mask=wanted, other=0.0)
    return others


@triton.jit
def _sums(logits, own, view, prototypes, stride, temp, teachers: tl.constexpr, block: tl.constexpr):
    """``logsumexp(z)`` and ``Q . z`` of a row of logits, z = logits / temp."""
    highest = tl.full([block], -1e38, tl.float32)  # of each lane; sums: its sum of exp(z - highest)
    sums = tl.zeros([block], tl.float32)
    product = tl.zeros([block], tl.float32)
    for first in range(0, prototypes, block):
        columns = first + tl.arange(0, block)
        inside = columns < prototypes
        scaled = tl.load(logits + columns, mask=inside, other=0.0) / temp
        product += scaled * _others(own, view, columns, prototypes, stride, teachers, block)
        higher = tl.where(inside, tl.maximum(highest, scaled), highest)
        sums = sums * tl.exp(highest - higher) + tl.where(inside, tl.exp(scaled - higher), 0.0)
        highest = higher
    top = tl.max(highest, 0)
    return top + tl.log(tl.sum(sums * tl.exp(highest - top), 0)), tl.sum(product, 0)


@triton.jit
def _cross_entropy(  # noqa: PLR0913, PLR0917 (a kernel takes pointers and numbers only)
    logits,
    own,
    gradient,
    view,
    count,
    factor,
    prototypes,
    stride,
    temp,
    teachers: tl.constexpr,
    block: tl.constexpr,
    with_gradient: tl.constexpr,
):
    """A row of logits: ``n logsumexp(z) - Q . z``; writes ``factor (n softmax(z) - Q)``."""
    log_sum, product = _sums(logits, own, view, prototypes, stride, temp, teachers, block)
    if with_gradient:
        for first in range(0, prototypes, block):
            columns = first + tl.arange(0, block)
            inside = columns < prototypes
            scaled = tl.load(logits + columns, mask=inside, other=0.0) / temp
            others = _others(own, view, columns, prototypes, stride, teachers, block)
            tl.store(gradient + columns, (count * tl.exp(scaled - log_sum) - others) * factor, mask=inside)
    return count * log_sum - product


@triton.jit
def _row(  # noqa: PLR0913, PLR0917
    student,
    targets,
    gradient,
    losses,
    prototypes,
    views,
    temp,
    teachers: tl.constexpr,
    block: tl.constexpr,
    with_gradient: tl.constexpr,
):
    """One view of one sample, against the teacher views other than itself."""
    # Programs of one sample are consecutive, so that its targets stay in the cache.
    sample, view = tl.program_id(0) // views, tl.program_id(0) % views
    batch = tl.num_programs(0) // views
    stride = batch.to(tl.int64) * prototypes  # from view to view
    own = targets + sample.to(tl.int64) * prototypes
    start = view * stride + sample.to(tl.int64) * prototypes
    count = teachers - tl.where(view < teachers, 1, 0)
    factor = 1.0 / (teachers * (views - 1) * batch * temp)
    logits, written = student + start, gradient + start
    loss = _cross_entropy(
        logits, own, written, view, count, factor, prototypes, stride, temp, teachers, block, with_gradient
    )
    tl.store(losses + view * batch + sample, loss)


@triton.jit
def _token(  # noqa: PLR0913, PLR0917
    student,
    targets,
    weights,
    gradient,
    losses,
    prototypes,
    temp,
    block: tl.constexpr,
    with_gradient: tl.constexpr,
):
    """One masked token, against the teacher's: of one view, which is none of the student's (-1)."""
    teachers: tl.constexpr = 1  # type: ignore[assignment]
    token = tl.program_id(0)
    start = token.to(tl.int64) * prototypes
    weight = tl.load(weights + token)
    logits, own, written = student + start, targets + start, gradient + start
    loss = _cross_entropy(
        logits, own, written, -1, 1, weight / temp, prototypes, 0, temp, teachers, block, with_gradient
    )
    tl.store(losses + token, weight * loss)


def loss_and_gradient(student: Tensor, targets: Tensor, temp: float, gradient: Tensor | None) -> Tensor:
    """The loss of :func:`dino.objectives.cross_entropy.dino_loss`; its gradient goes into ``gradient``.

    Args:
        student: (V, B, K) fp32 logits, contiguous.
        targets: (G, B, K) fp32 teacher probabilities, contiguous.
        temp: Temperature of the student.
        gradient: (V, B, K), may be ``student`` itself; None for the loss alone.

    Returns:
        The loss, a scalar.
    """
    views, batch, prototypes = student.shape
    pairs = len(targets) * (views - 1)
    losses = student.new_empty(views, batch)
    with torch.cuda.device_of(student):  # triton launches on torch's current GPU
        _row[(views * batch,)](
            student,
            targets,
            student if gradient is None else gradient,
            losses,
            prototypes,
            views,
            temp,
            teachers=len(targets),
            block=min(BLOCK, triton.next_power_of_2(prototypes)),
            with_gradient=gradient is not None,
            num_warps=WARPS,  # pyright: ignore[reportCallIssue]
        )
    return losses.sum() / (pairs * batch)


def token_loss_and_gradient(
    weights: Tensor, student: Tensor, targets: Tensor, temp: float, gradient: Tensor | None
) -> Tensor:
    """The loss of :func:`dino.objectives.cross_entropy.masked_loss`; its gradient goes into ``gradient``.

    Args:
        weights: (M,) fp32, contiguous.
        student: (M, K) fp32 logits, contiguous.
        targets: (M, K) fp32 teacher probabilities, contiguous.
        temp: Temperature of the student.
        gradient: (M, K), may be ``student`` itself; None for the loss alone.

    Returns:
        The loss, a scalar.
    """
    count, prototypes = student.shape
    losses = student.new_empty(count)
    if count:
        with torch.cuda.device_of(student):
            _token[(count,)](
                student,
                targets,
                weights,
                student if gradient is None else gradient,
                losses,
                prototypes,
                temp,
                block=min(BLOCK, triton.next_power_of_2(prototypes)),
                with_gradient=gradient is not None,
                num_warps=WARPS,  # pyright: ignore[reportCallIssue]
            )
    return losses.sum()


@cache
def usable(device: torch.device, reference: LossAndGradient) -> bool:
    """Whether the kernel of DINO compiles on ``device`` and agrees there with ``reference``; warns if not.

    Cached, because the check makes the host wait.
    """
    student, targets = _example(device, (3, 2, 5000), (2, 2, 5000))
    return _agree(device, loss_and_gradient, reference, student, targets)


@cache
def usable_for_tokens(device: torch.device, reference: TokenLossAndGradient) -> bool:
    """Whether the kernel of iBOT does, see :func:`usable`."""
    student, targets = _example(device, (3, 5000), (3, 5000))
    weights = torch.tensor([0.5, 0.0, 2.0], device=device)
    own, wanted = (partial(compute, weights) for compute in (token_loss_and_gradient, reference))
    return _agree(device, own, wanted, student, targets)


def _example(device: torch.device, student: tuple[int, ...], targets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits and probabilities of these shapes."""
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.rand(student, generator=generator)
    return logits.to(device), torch.rand(targets, generator=generator).softmax(-1).to(device)


def _agree(
    device: torch.device, own: LossAndGradient, reference: LossAndGradient, student: Tensor, targets: Tensor
) -> bool:
    found, wanted = torch.empty_like(student), torch.empty_like(student)
    try:
        loss = own(student, targets, 0.1, found)
        expected = reference(student, targets, 0.1, wanted)
        agrees = torch.isclose(loss, expected, rtol=TOLERANCE) & ((found - wanted).norm() <= TOLERANCE * wanted.norm())
        problem = "" if bool(agrees) else "its values differ from those of torch's operations"
    except Exception as error:  # no C compiler, an old GPU or driver: triton raises many types
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        warnings.warn(f"the loss does not use its GPU kernel on {device}: {problem}", stacklevel=3)
    return not problem
