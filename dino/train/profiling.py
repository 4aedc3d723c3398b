"""Time spent in each part of a step: named spans of the loop, measured by the device's clock."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

DATA = "waiting for data"
COPY = "copy to the device"
CROPS = "crops"
TEACHER = "forward, teacher"
STUDENT = "forward, student"
LOSS = "loss"
BACKWARD = "backward"
CLIP = "clip gradients"
OPTIMIZER = "optimizer"
AVERAGE = "teacher average"
REST = "rest"
PARTS = (DATA, COPY, CROPS, TEACHER, STUDENT, LOSS, BACKWARD, CLIP, OPTIMIZER, AVERAGE, REST)

BUSY = 0.75  # fraction of the cores in use before a run, above which there is a warning
STAT = Path("/proc/stat")  # the kernel's counts of what all cores have done
STARVING = 0.1  # fraction of the time spent waiting for data from which there is a warning

Span = Callable[[str], AbstractContextManager[None]]
_NOTHING = nullcontext()


def no_span(name: str) -> AbstractContextManager[None]:
    """A span that measures nothing."""
    return _NOTHING


class Clock(Protocol):
    """Records points in time, and the seconds between two of them."""

    def mark(self) -> Any:
        """The current time."""
        ...

    def between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to the next."""
        ...


class HostClock:
    """The clock of this process, for a CPU."""

    def mark(self) -> float:
        """Seconds since an arbitrary start."""
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        """Seconds from one mark to the next."""
        return second - first


class CudaClock:
    """The clock of a GPU: CUDA events, for which the host does not wait until the times are read.

    The time between two events is that of the *device*: while it still has work queued, time that the host waits for
    data is not counted, because none is lost.

    Args:
        device: The GPU, which need not be torch's current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """An event after all work that is queued by now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Seconds from one mark to the next; waits until the device has reached the second."""
        second.synchronize()
        return first.elapsed_time(second) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock of ``device``."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Stopwatch:
    """Splits time into named parts that add up to the whole.

    Time belongs to the innermost open span, or to ``rest``.

    Args:
        clock: Measures.
        only: The spans to measure; the time of all others is ``rest``. None for all.
    """

    def __init__(self, clock: Clock, only: Collection[str] | None = None) -> None:
        self.clock, self.only = clock, only
        self._open = [REST]
        self._marks = [(REST, clock.mark())]  # the part that each mark ends

    def span(self, name: str) -> AbstractContextManager[None]:
        """Measure the time of the block as ``name``."""
        return self._measured(name) if self.only is None or name in self.only else _NOTHING

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def _mark(self) -> None:
        self._marks.append((self._open[-1], self.clock.mark()))

    def take(self) -> dict[str, float]:
        """Seconds of every part since the last call, or since the beginning."""
        self._mark()
        parts: dict[str, float] = {}
        for (_, first), (name, second) in pairwise(self._marks):
            parts[name] = parts.get(name, 0.0) + self.clock.between(first, second)
        del self._marks[:-1]
        return parts


def fraction(parts: Mapping[str, float], name: str) -> float:
    """Fraction of all time that a part took; 0 when no time has passed."""
    return parts.get(name, 0.0) / max(sum(parts.values()), 1e-9)


def cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_cores(seconds: float = 0.2) -> float:
    """Number of the machine's cores that other processes use, measured while this one sleeps; 0 where unknown."""

    def read() -> tuple[int, int]:
        fields = [int(field) for field in STAT.read_text().split("\n", 1)[0].split()[1:]]
        return sum(fields[:8]), fields[3] + fields[4]  # all time, and that of idle and iowait, of all cores

    try:
        total, idle = read()
        time.sleep(seconds)
        later_total, later_idle = read()
    except (OSError, ValueError, IndexError):  # not Linux
        return 0.0
    fraction_idle = (later_idle - idle) / max(1, later_total - total)
    return (1 - fraction_idle) * (os.cpu_count() or 1)


def busy_cores_warning(device: torch.device) -> str:
    """A warning where other processes use the CPU that is to train; empty where they do not.

    Args:
        device: Where to train.
    """
    if device.type != "cpu":
        return ""
    busy, available = busy_cores(), os.cpu_count() or 1
    if busy <= BUSY * available:
        return ""
    return (
        f"other processes use about {busy:.1f} of the machine's {available} cores; runs that share cores slow each "
        f"other down: run one at a time, or each with fewer threads (OMP_NUM_THREADS={max(1, available // 2)})"
    )


def data_advice(waiting: float, workers: int) -> str:
    """What to change when the device waits for data; see :func:`feeding_advice`."""
    return feeding_advice(waiting, workers, cores(), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def feeding_advice(waiting: float, workers: int, available: int, processes: int = 1) -> str:
    """What to change when the device waits for data.

    Args:
        waiting: Fraction of the time that it waits.
        workers: ``speed.num_workers``, of each process.
        available: Cores of the machine.
        processes: Training processes on this machine.

    Returns:
        A sentence.
    """
    found = f"the device waited {waiting:.0%} of each step for data: "
    among = f" for {processes} processes" if processes > 1 else ""
    if workers and workers * processes >= available:
        return (
            f"{found}the {workers} workers (speed.num_workers) of each process have no more cores to run on "
            f"({available}{among}): speed.ram_cache=GB (level 1), data on a local disk, or a machine with more cores"
        )
    more = f"more speed.num_workers ({workers} now, {available} cores{among})"
    return f"{found}{more}, speed.ram_cache=GB (level 1), or data on a local disk"


class GpuUse:
    """Use and power of the GPU of this process as its driver reports them, which does not wait for the device.

    Args:
        device: The device; nothing is reported of a CPU, nor where the driver or the package nvidia-ml-py is missing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def __call__(self) -> dict[str, float]:
        """``gpu_use``, the fraction of the last sample period in which a kernel ran, and ``gpu_watts``; or nothing."""
        if self._device is None:
            return {}
        try:
            use, milliwatts = torch.cuda.utilization(self._device), torch.cuda.power_draw(self._device)
        except Exception:  # of the driver's library, whose errors are no class of torch: it is not asked again
            self._device = None
            return {}
        return {"gpu_use": use / 100, "gpu_watts": milliwatts / 1000}
