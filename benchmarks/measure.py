"""Measuring side by side: two contestants in turn, A B A B, the machine's limits, and the peak of memory."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """What every benchmark is told.

    Attributes:
        device: Where to compute.
        folder: A folder for tiles and grids, gone when the benchmarks end.
        quick: Tiny sizes and a single round: shows that everything runs, measures nothing.
        facebook_dino: Checkout of facebookresearch/dino as another comparator.
        notice: Called with a line on what is being done.
    """

    device: torch.device
    folder: Path
    quick: bool = False
    facebook_dino: Path | None = None
    notice: Callable[[str], None] = lambda line: None

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def rounds(self, count: int) -> int:
        """``count`` rounds, or one when quick."""
        return 1 if self.quick else count

    def size(self, cpu: int, gpu: int, quick: int) -> int:
        """The size of a problem for this setting."""
        return quick if self.quick else gpu if self.on_gpu else cpu


@dataclass
class Row:
    """One line of the table and of the results file.

    Attributes:
        name: Benchmark and variant, such as ``step vit_small``.
        unit: Unit of ``ours`` and ``theirs``; more is better.
        ours: Our figure, the median over the rounds.
        comparator: What ``theirs`` is.
        theirs: The comparator's figure.
        ratio: Median over the rounds of ours / theirs.
        spread: Least and greatest ratio of a round.
        rounds: How many rounds.
        target: Ratio (or ``ours``, without a comparator) that is to be reached; None where it is only recorded.
        limit: What the hardware would allow, in ``unit``.
        limited_by: What that limit is computed from.
        equality: What was asserted before anything was timed.
        note: A few words for the table.
        details: Everything else.
        skipped: Why it was not measured.
    """

    name: str
    unit: str = ""
    ours: float | None = None
    comparator: str = ""
    theirs: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    rounds: int = 0
    target: float | None = None
    limit: float | None = None
    limited_by: str = ""
    equality: str = ""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        reached = self.ratio if self.ratio is not None else self.ours
        return None if self.target is None or reached is None else reached >= self.target

    def to_dict(self) -> dict[str, Any]:
        """Plain values, what is empty left out."""
        values = {**asdict(self), "met": self.met}
        return {key: value for key, value in values.items() if value is False or value not in (None, "", {}, 0)}


@dataclass(frozen=True)
class Duel:
    """Seconds of two contestants, round by round.

    Attributes:
        ours: Seconds of ours in each round.
        theirs: Seconds of the comparator in each round.
    """

    ours: list[float]
    theirs: list[float]

    def row(self, name: str, items: float, unit: str, comparator: str, **more: Any) -> Row:
        """The row of a duel over ``items`` items a round."""
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        return Row(
            name,
            unit,
            items / statistics.median(self.ours),
            comparator,
            items / statistics.median(self.theirs),
            statistics.median(ratios),
            (min(ratios), max(ratios)),
            len(ratios),
            **more,
        )


def duel(
    ours: Work, theirs: Work, rounds: int, device: torch.device, warmup: int = 1, prepare: Work = lambda: None
) -> Duel:
    """Time two pieces of work in turn (:func:`in_turn`)."""
    return Duel(*in_turn([ours, theirs], rounds, device, warmup, prepare))


def in_turn(
    works: Sequence[Work], rounds: int, device: torch.device, warmup: int = 1, prepare: Work = lambda: None
) -> list[list[float]]:
    """Seconds of each piece of work in each round, A B C A B C.

    Args:
        works: What is timed.
        rounds: How often each.
        device: Where the work is done.
        warmup: Rounds before, which do not count.
        prepare: Called before each, untimed.
    """
    times: list[list[float]] = [[] for _ in works]
    for number in range(warmup + rounds):
        for work, seconds in zip(works, times, strict=True):
            prepare()
            spent = timed(work, device)
            if number >= warmup:
                seconds.append(spent)
    return times


def drain(results: Iterable) -> None:
    """Take everything and keep nothing, as a training run does."""
    for _ in results:
        pass


def timed(work: Work, device: torch.device) -> float:
    """Seconds that ``work`` takes, with all that it leaves running on the device."""
    gc.collect()
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most bytes of tensors that ``work`` holds at once beyond those that were there before.

    On a GPU by torch's own account; on a CPU by adding up the profiler's record of every allocation.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak


def flops(work: Work) -> float:
    """Floating-point operations of the matrix products and convolutions in ``work``, its backward pass included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def limits(setting: Setting) -> dict[str, float]:
    """What the machine gives at best: matrix products in bf16 and fp32 (GFLOP/s), and copies (GB/s, read and write)."""
    side = setting.size(cpu=2048, gpu=8192, quick=128)
    numbers = setting.size(cpu=2**26, gpu=2**29, quick=2**16)
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(side, side, device=setting.device).to(dtype) for _ in range(2))
        found[f"matmul_{name}_gflops"] = 2e-9 * side**3 / _best(lambda a=left, b=right: a @ b, setting.device)
    source = torch.zeros(numbers, device=setting.device)
    target = torch.empty_like(source)
    found["copy_gb_s"] = 8e-9 * numbers / _best(lambda: target.copy_(source), setting.device)
    return {name: round(value, 2) for name, value in found.items()}


def _best(work: Work, device: torch.device, tries: int = 5) -> float:
    work()
    return min(timed(work, device) for _ in range(tries))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def expect_close(what: str, error: float, largest: float) -> str:
    """Refuse to time two things that do not compute the same.

    Returns:
        A line for the record.

    Raises:
        RuntimeError: If the error is larger than ``largest``.
    """
    if not error <= largest:
        raise RuntimeError(f"{what}: expected the two to differ by at most {largest:g}, found {error:.3g}")
    return f"{what} within {error:.1e}"
