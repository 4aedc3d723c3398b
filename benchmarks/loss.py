"""The loss alone, forward and backward, from given logits: time, and memory beyond the logits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Row, Setting, duel, expect_close, peak_bytes, relative_error
from benchmarks.reference.loss import PairwiseLoss
from dino.objectives.cross_entropy import dino_loss
from dino.objectives.targets import Centre

TITLE = "loss alone"
VIEWS, STUDENT_TEMP, TEACHER_TEMP = 10, 0.1, 0.04
COMPARATOR = "eighteen pairs, autograd"


class Ours:
    """This package's objective: targets, loss, gradient, entropy and centre.

    Args:
        out_dim: Number of prototypes K.
        device: Device to compute on.
        overwrite: Write the gradient over the logits.
    """

    def __init__(self, out_dim: int, device: torch.device, overwrite: bool = True) -> None:
        self.centre = Centre(out_dim).to(device)
        self.overwrite = overwrite
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and gradient (V, B, K)."""
        self.centre.observe(teacher)
        targets, _ = self.centre.targets(teacher, TEACHER_TEMP, overwrite=self.overwrite)
        loss = dino_loss(student, targets, STUDENT_TEMP, overwrite=self.overwrite)
        (gradient,) = torch.autograd.grad(loss, student)
        self.centre.step(self.finite)
        return loss.detach(), gradient


class Theirs:
    """The pairwise loss."""

    def __init__(self, out_dim: int, device: torch.device) -> None:
        self.objective = PairwiseLoss(out_dim, VIEWS, teacher_temp=TEACHER_TEMP).to(device)

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and gradient (V, B, K)."""
        loss = self.objective(student.flatten(0, 1), teacher.flatten(0, 1))
        (gradient,) = torch.autograd.grad(loss, student)
        return loss.detach(), gradient


def example(batch: int, out_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines like those of a head: student (10, B, K) and teacher (2, B, K)."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(VIEWS, batch, out_dim, generator=generator) / 16
    teacher = torch.randn(2, batch, out_dim, generator=generator) / 16
    return student.to(device).requires_grad_(), teacher.to(device)


def run(setting: Setting) -> Iterator[Row]:
    """Every batch size."""
    out_dim = 65536 if not setting.quick else 257
    sizes = [2] if setting.quick else [64, 128, 256] if setting.on_gpu else [64]
    for batch in sizes:
        setting.notice(f"{VIEWS} views x {out_dim:,} prototypes, batch {batch}")
        yield _measure(batch, out_dim, setting, overwrite=True)
    yield _measure(sizes[0], out_dim, setting, overwrite=False)


def _measure(batch: int, out_dim: int, setting: Setting, *, overwrite: bool) -> Row:
    ours, theirs = Ours(out_dim, setting.device, overwrite), Theirs(out_dim, setting.device)
    equality = check(ours, theirs, *example(min(batch, 8), out_dim, setting.device))
    student, teacher = example(batch, out_dim, setting.device)
    logits = student.detach().clone(), teacher.clone()

    def prepare() -> None:  # ours may overwrite them with the gradient and the targets
        with torch.no_grad():
            student.copy_(logits[0])
            teacher.copy_(logits[1])

    memory = [peak_bytes(lambda work=work: work(student, teacher), setting.device) for work in (ours, theirs)]
    rounds = setting.rounds(15)  # memory-bound: these times vary more than others
    result = duel(
        lambda: ours(student, teacher), lambda: theirs(student, teacher), rounds, setting.device, prepare=prepare
    )
    kept = "" if overwrite else ", logits kept"
    row = result.row(f"loss batch {batch}{kept}", batch, "img/s", COMPARATOR, equality=equality)
    row.target = None if setting.quick or not overwrite else 5.0 if setting.on_gpu else 3.0
    row.note = f"memory above the logits {memory[0] / memory[1]:.2f} of theirs (target 0.20)"
    row.details = {
        "out_dim": out_dim,
        "logits_mb": round((student.numel() + teacher.numel()) * 4e-6, 1),
        "our_mb_above_logits": round(memory[0] * 1e-6, 1),
        "their_mb_above_logits": round(memory[1] * 1e-6, 1),
        "memory_share": round(memory[0] / memory[1], 3),
        "memory_share_wanted": 0.2,
        "bytes_per_item": 4 * (2 * student.numel() + teacher.numel()) / batch,  # each logit read, each gradient written
    }
    return row


def check(ours: Ours, theirs: Theirs, student: Tensor, teacher: Tensor) -> str:
    """Loss, gradient and centre must agree.

    Raises:
        RuntimeError: If they do not.
    """
    loss, gradient = ours(student.detach().clone().requires_grad_(), teacher.clone())
    expected, expected_gradient = theirs(student.detach().clone().requires_grad_(), teacher.clone())
    centres = relative_error(ours.centre.center, theirs.objective.center)
    expect_close("centre", centres, 1e-5)
    expect_close("gradient", relative_error(gradient, expected_gradient), 1e-4)
    return expect_close("loss, gradient and centre (fp32; the loss)", float((loss / expected - 1).abs()), 1e-5)
