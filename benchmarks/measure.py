"""Timing two implementations in alternation (A B A B), the hardware limits, and peak memory."""

import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dino.precision import casts_to_bf16

Work = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """Options shared by all benchmarks.

    Attributes:
        device: Device to compute on.
        folder: Temporary folder for tiles and grids.
        quick: Tiny sizes and one round: checks that everything runs, measures nothing.
        facebook_dino: Checkout of facebookresearch/dino as a second comparator.
        notice: Called with a line about the current work.
        deadline: Value of ``time.monotonic()`` after which no further round starts; the first round is always timed.
    """

    device: torch.device
    folder: Path
    quick: bool = False
    facebook_dino: Path | None = None
    notice: Callable[[str], None] = lambda line: None
    deadline: float = math.inf

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def has_bf16(self) -> bool:
        """Whether bf16 runs compute in bf16 on this device."""
        return casts_to_bf16("bf16", self.device)

    @property
    def original_precision(self) -> str:
        """Fastest precision of the original: fp16 with a loss scaler on a GPU; CPUs have no fast fp16, not all bf16."""
        return "fp16" if self.on_gpu else "bf16" if self.has_bf16 else "fp32"

    def rounds(self, count: int) -> Iterator[int]:
        """Up to ``count`` round numbers: one when quick, fewer once the deadline has passed."""
        for number in range(1 if self.quick else count):
            if number and time.monotonic() >= self.deadline:
                return
            yield number

    def size(self, cpu: int, gpu: int, quick: int) -> int:
        """The problem size for this setting."""
        return quick if self.quick else gpu if self.on_gpu else cpu


@dataclass
class Row:
    """One line of the table and of the results file.

    Attributes:
        name: Benchmark and variant, such as ``step vit_small``.
        unit: Unit of ``ours`` and ``theirs``; more is better.
        ours: Result of this package, the median over the rounds.
        comparator: Name of the implementation behind ``theirs``.
        theirs: Result of the comparator.
        ratio: Median over the rounds of ours / theirs.
        spread: Smallest and largest ratio of a round.
        rounds: Number of timed rounds.
        target: Required ratio (or ``ours``, without a comparator); None if the row is only recorded.
        limit: Upper bound given by the hardware, in ``unit``.
        limited_by: What that bound is computed from.
        equality: What was asserted before timing.
        note: Short text for the table.
        details: Further values.
        skipped: Reason why the row was not measured.
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
        """Whether the target is reached; None without a target."""
        reached = self.ratio if self.ratio is not None else self.ours
        return None if self.target is None or reached is None else reached >= self.target

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the empty ones."""
        values = {**asdict(self), "met": self.met}
        return {key: value for key, value in values.items() if value is False or value not in (None, "", {}, 0)}


@dataclass(frozen=True)
class Duel:
    """Times of two implementations per round.

    Attributes:
        ours: Seconds of this package in each round.
        theirs: Seconds of the comparator in each round.
    """

    ours: list[float]
    theirs: list[float]

    def row(self, name: str, items: float, unit: str, comparator: str, **more: Any) -> Row:
        """Row of a comparison over ``items`` items per round."""
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
    ours: Work,
    theirs: Work,
    rounds: Iterable[int],
    device: torch.device,
    warmup: int = 1,
    prepare: Work = lambda: None,
    clock: Clock = time.perf_counter,
) -> Duel:
    """Time two functions in alternation (:func:`in_turn`)."""
    return Duel(*in_turn([ours, theirs], rounds, device, warmup, prepare, clock))


def in_turn(
    works: Sequence[Work],
    rounds: Iterable[int],
    device: torch.device,
    warmup: int = 1,
    prepare: Work = lambda: None,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each function in each round, A B C A B C.

    Args:
        works: Functions to time.
        rounds: Round numbers (:meth:`Setting.rounds`).
        device: Device that the functions use.
        warmup: Untimed rounds before the first.
        prepare: Called before each function, untimed.
        clock: Returns the time in seconds.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(warmup):
        for work in works:
            prepare()
            timed(work, device)
    for _ in rounds:
        for work, seconds in zip(works, times, strict=True):
            prepare()
            seconds.append(timed(work, device, clock))
    return times


def drain(results: Iterable) -> None:
    """Consume an iterable without keeping its items, as a training run does."""
    for _ in results:
        pass


def clock_of(device: torch.device) -> Clock:
    """The clock for work that neither waits nor uses other processes: on a CPU with one thread its processor time.

    Other programs on the machine do not count in it. Several threads wait for each other in it.
    """
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def timed(work: Work, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds of ``work`` by a clock, including the kernels it has queued on the device."""
    gc.collect()
    _wait(device)
    started = clock()
    work()
    _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Work, device: torch.device) -> int:
    """Peak bytes of tensors that ``work`` allocates beyond those that existed before.

    On a GPU from torch's allocator; on a CPU from the allocations in the profiler's trace.
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
    """Floating-point operations of the matrix products and convolutions in ``work``, including its backward pass."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def limits(setting: Setting) -> dict[str, float]:
    """Measured limits of the machine: matrix products (GFLOP/s, bf16 where it has it) and copies (GB/s, both ways)."""
    side = setting.size(cpu=2048, gpu=8192, quick=128)
    numbers = setting.size(cpu=2**26, gpu=2**29, quick=2**16)
    found = {}
    for name, dtype in {**({"bf16": torch.bfloat16} if setting.has_bf16 else {}), "fp32": torch.float32}.items():
        left, right = (torch.randn(side, side, device=setting.device).to(dtype) for _ in range(2))
        found[f"matmul_{name}_gflops"] = 2e-9 * side**3 / _best(lambda a=left, b=right: a @ b, setting.device)
    source = torch.zeros(numbers, device=setting.device)
    target = torch.empty_like(source)
    found["copy_gb_s"] = 8e-9 * numbers / _best(lambda: target.copy_(source), setting.device)
    return {name: round(value, 2) for name, value in found.items()}


def _best(work: Work, device: torch.device, tries: int = 5) -> float:
    work()
    return min(timed(work, device, clock_of(device)) for _ in range(tries))


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute convolutions in fp32 instead of TF32, which rounds to 10 bits: needed where fp32 results are compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference divided by the norm of the expected tensor."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def expect_close(what: str, error: float, largest: float) -> str:
    """Check that two implementations compute the same before they are timed.

    Returns:
        A line for the results.

    Raises:
        RuntimeError: If the error is larger than ``largest``.
    """
    if not error <= largest:
        raise RuntimeError(f"{what}: expected the two to differ by at most {largest:g}, found {error:.3g}")
    return f"{what} within {error:.1e}"
