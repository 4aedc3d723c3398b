"""Where the time of a step goes: named spans of the loop, measured on the device's own clock."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
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

STARVING = 0.1  # share of the time spent waiting for data that is worth a word
WARMUP_LINES = 1  # lines of the log before the waiting counts: workers start, and what they prepared ahead is used up

Span = Callable[[str], AbstractContextManager[None]]
_NOTHING = nullcontext()


def no_span(name: str) -> AbstractContextManager[None]:
    """The span of a run that nobody measures."""
    return _NOTHING


class Clock(Protocol):
    """Marks moments, and tells the time between two of them."""

    def mark(self) -> Any:
        """This moment."""
        ...

    def between(self, first: Any, second: Any) -> float:
        """Seconds from one mark to the next."""
        ...


class HostClock:
    """The clock of this process, for a CPU."""

    def mark(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        """Seconds from one mark to the next."""
        return second - first


class CudaClock:
    """The clock of a GPU: events in its queue of work, which the host does not wait for until the times are read.

    The time between two events is the time the *device* spent between them: while it still has work queued, the host
    may wait for data without any loss, and no time is counted.

    Args:
        device: The GPU, which need not be torch's current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """An event behind all work that is queued by now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Seconds from one mark to the next; waits until the device has come to the second."""
        second.synchronize()
        return first.elapsed_time(second) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock by which work on ``device`` is measured."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


class Stopwatch:
    """Splits time into named parts that add up to the whole.

    Every moment belongs to one part: that of the innermost span that is open, or ``rest``.

    Args:
        clock: Measures.
        only: The spans to measure; the time of all others is ``rest``. None for all.
    """

    def __init__(self, clock: Clock, only: Collection[str] | None = None) -> None:
        self.clock, self.only = clock, only
        self._open = [REST]
        self._marks = [(REST, clock.mark())]  # what the time up to each mark was spent on

    def span(self, name: str) -> AbstractContextManager[None]:
        """Count the time of the block as ``name``."""
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
        """Seconds of every part since the last take, or since the beginning; counts anew from here."""
        self._mark()
        parts: dict[str, float] = {}
        for (_, first), (name, second) in pairwise(self._marks):
            parts[name] = parts.get(name, 0.0) + self.clock.between(first, second)
        del self._marks[:-1]
        return parts


def share(parts: Mapping[str, float], name: str) -> float:
    """Share of a part in all of them; 0 when no time has passed."""
    return parts.get(name, 0.0) / max(sum(parts.values()), 1e-9)


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def feeding_advice(waiting: float, workers: int, available: int, processes: int = 1) -> str:
    """What to change when the device waits for data.

    Args:
        waiting: Share of the time that it waits.
        workers: ``speed.num_workers``, of each process.
        available: Cores of the machine.
        processes: Training processes on this machine.

    Returns:
        A sentence.
    """
    told = f"the device waited {waiting:.0%} of each step for data: "
    among = f" for {processes} processes" if processes > 1 else ""
    if workers and workers * processes >= available:
        return (
            f"{told}the {workers} workers (speed.num_workers) of each process have no more cores to run on "
            f"({available}{among}): speed.ram_cache=GB (level 1), data on a local disk, or a machine with more cores"
        )
    more = f"more speed.num_workers ({workers} now, {available} cores{among})"
    return f"{told}{more}, speed.ram_cache=GB (level 1), or data on a local disk"


class StarvationWatch:
    """Tells, once, when a run waits for data.

    Args:
        advice: What to say of a share of waiting.
    """

    def __init__(self, advice: Callable[[float], str]) -> None:
        self.advice = advice
        self._lines, self._said = 0, False

    def __call__(self, line: Mapping[str, float]) -> list[str]:
        """What to say after a line of the log; nothing as long as all is well.

        Args:
            line: ``data_wait``, share of the time since the line before spent waiting for data.
        """
        self._lines += 1
        if self._said or self._lines <= WARMUP_LINES or line["data_wait"] <= STARVING:
            return []
        self._said = True
        return [self.advice(line["data_wait"])]
