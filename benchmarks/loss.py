"""The losses alone, forward and backward, from given logits: time, and memory beyond the logits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Row, Setting, clock_of, duel, expect_close, peak_bytes, relative_error
from benchmarks.reference.loss import PairwiseLoss
from benchmarks.reference.parts import masked_cross_entropy
from dino.objectives.cross_entropy import dino_loss, masked_loss
from dino.objectives.targets import Centre

TITLE = "loss alone"
VIEWS, STUDENT_TEMP, TEACHER_TEMP = 10, 0.1, 0.04
COMPARATOR = "eighteen pairs, autograd"
MASKED_COMPARATOR = "softmax and log_softmax, autograd"


class Ours:
    """This package's objective of DINO: targets, loss, gradient, entropy and centre.

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
        loss = self.loss(student, targets)
        (gradient,) = torch.autograd.grad(loss, student)
        self.centre.step(self.finite)
        return loss.detach(), gradient

    def loss(self, student: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits with targets."""
        return dino_loss(student, targets, STUDENT_TEMP, overwrite=self.overwrite)

    @property
    def center(self) -> Tensor:
        """The centre, (1, K)."""
        return self.centre.center


class OursMasked(Ours):
    """The same for the masked tokens of iBOT, of (M, K) logits with weights (M,)."""

    def __init__(self, out_dim: int, weights: Tensor) -> None:
        super().__init__(out_dim, weights.device)
        self.weights = weights

    def loss(self, student: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits with targets."""
        return masked_loss(student, targets, self.weights, STUDENT_TEMP, overwrite=self.overwrite)


class TheirsMasked:
    """The plain loss of masked tokens."""

    def __init__(self, out_dim: int, weights: Tensor) -> None:
        self.center, self.weights = torch.zeros(1, out_dim, device=weights.device), weights

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and gradient (M, K)."""
        loss, self.center = masked_cross_entropy(
            student, teacher, self.center, self.weights, STUDENT_TEMP, TEACHER_TEMP
        )
        (gradient,) = torch.autograd.grad(loss, student)
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

    @property
    def center(self) -> Tensor:
        """The centre, (1, K)."""
        return self.objective.center


def example(batch: int, out_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines like those of a head: student (10, B, K) and teacher (2, B, K)."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(VIEWS, batch, out_dim, generator=generator) / 16
    teacher = torch.randn(2, batch, out_dim, generator=generator) / 16
    return student.to(device).requires_grad_(), teacher.to(device)


def masked_example(tokens: int, out_dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher (M, K), and weights (M,)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(tokens, out_dim, generator=generator) / 16 for _ in range(2))
    weights = torch.rand(tokens, generator=generator) / tokens
    return student.to(device).requires_grad_(), teacher.to(device), weights.to(device)


def run(setting: Setting) -> Iterator[Row]:
    """Every batch size, and masked tokens."""
    out_dim = 65536 if not setting.quick else 257
    sizes = [2] if setting.quick else [64, 128, 256] if setting.on_gpu else [64]
    for batch, overwrite in [*((size, True) for size in sizes), (sizes[0], False)]:
        setting.notice(f"{VIEWS} views x {out_dim:,} prototypes, batch {batch}")
        ours, theirs = Ours(out_dim, setting.device, overwrite), Theirs(out_dim, setting.device)
        equality = check(ours, theirs, *example(min(batch, 8), out_dim, setting.device))
        row = _measure(ours, theirs, example(batch, out_dim, setting.device), setting)
        row.name = f"loss batch {batch}" + ("" if overwrite else ", logits kept")
        row.equality, row.comparator = equality, COMPARATOR
        row.target = None if setting.quick or not overwrite else 5.0 if setting.on_gpu else 3.0
        yield row
    yield _masked_row(setting.size(600, 4000, 5), out_dim, setting)


def _masked_row(tokens: int, out_dim: int, setting: Setting) -> Row:
    setting.notice(f"{tokens:,} masked tokens x {out_dim:,} prototypes")
    student, teacher, weights = masked_example(tokens, out_dim, setting.device)
    ours, theirs = OursMasked(out_dim, weights), TheirsMasked(out_dim, weights)
    equality = check(ours, theirs, student, teacher)
    row = _measure(ours, theirs, (student, teacher), setting)
    row.name, row.unit, row.equality, row.comparator = "loss masked tokens", "tokens/s", equality, MASKED_COMPARATOR
    row.target = None if setting.quick else 3.0
    return row


def _measure(ours: Ours, theirs: Theirs | TheirsMasked, logits: tuple[Tensor, Tensor], setting: Setting) -> Row:
    """Time and memory for the logits of student (..., B, K) and teacher."""
    student, teacher = logits
    batch, out_dim = student.shape[-2:]
    before = student.detach().clone(), teacher.clone()

    def prepare() -> None:  # ours may overwrite them with the gradient and the targets
        with torch.no_grad():
            student.copy_(before[0])
            teacher.copy_(before[1])

    memory = [peak_bytes(lambda work=work: work(student, teacher), setting.device) for work in (ours, theirs)]
    rounds, clock = setting.rounds(15), clock_of(setting.device)  # memory-bound: these times vary more than others
    works = (lambda: ours(student, teacher)), (lambda: theirs(student, teacher))
    row = duel(*works, rounds, setting.device, prepare=prepare, clock=clock).row("", batch, "img/s", "")
    row.note = f"memory above the logits {memory[0] / memory[1]:.2f} of theirs (target 0.20)"
    row.details = {
        "clock": clock.__name__,
        "rows": student[..., 0].numel(),
        "out_dim": out_dim,
        "logits_mb": round((student.numel() + teacher.numel()) * 4e-6, 1),
        "our_mb_above_logits": round(memory[0] * 1e-6, 1),
        "their_mb_above_logits": round(memory[1] * 1e-6, 1),
        "memory_share": round(memory[0] / memory[1], 3),
        "memory_share_wanted": 0.2,
        "bytes_per_item": 4 * (2 * student.numel() + teacher.numel()) / batch,  # each logit read, each gradient written
    }
    return row


def check(ours: Ours, theirs: Theirs | TheirsMasked, student: Tensor, teacher: Tensor) -> str:
    """Loss, gradient and centre must agree.

    Raises:
        RuntimeError: If they do not.
    """
    loss, gradient = ours(student.detach().clone().requires_grad_(), teacher.clone())
    expected, expected_gradient = theirs(student.detach().clone().requires_grad_(), teacher.clone())
    expect_close("centre", relative_error(ours.center, theirs.center), 1e-5)
    expect_close("gradient", relative_error(gradient, expected_gradient), 1e-4)
    return expect_close("loss, gradient and centre (fp32; the loss)", float((loss / expected - 1).abs()), 1e-5)
