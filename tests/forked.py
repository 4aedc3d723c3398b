"""Runs in forked processes, which start at once and can be killed."""

import io
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dino.train.loop import Trainer

KILLED = -signal.SIGKILL


def fork(work: Callable[[], object], rank: int = 0, processes: int = 1, port: int = 0) -> BaseProcess:
    """Start ``work`` in a process, as ``rank`` of a process group if ``processes`` is more than one."""

    def run() -> None:
        if processes > 1:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in group.items()}})
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def fork_group(work: Callable[[], object], processes: int) -> list[BaseProcess]:
    """Start ``work`` in the given number of processes of one process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [fork(work, rank, processes, port) for rank in range(processes)]


def exit_codes(group: Sequence[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Wait for all processes; None for a process that hangs, which is then killed."""
    until = time.monotonic() + timeout
    for process in group:
        process.join(max(0.1, until - time.monotonic()))
    codes = [process.exitcode for process in group]
    for process in group:
        process.kill()
    return codes


def run_group(work: Callable[[], object], processes: int = 2) -> None:
    """Run ``work`` in a process group; it has to end without an error in every process."""
    codes = exit_codes(fork_group(work, processes))
    assert codes == [0] * processes, codes


@dataclass
class Point:
    """A point of a run: just before the first file operation of a kind after ``step`` steps.

    Attributes:
        step: Steps done.
        event: Python's audit event ``open`` (to write), ``os.rename`` or ``os.link``; or ``torn``: a checkpoint is
            half-written.
        name: Prefix of the name of the (target) file, without the leading dot of temporary files.
    """

    step: int
    event: str
    name: str

    def is_of(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """True for an operation of this kind."""
        if event != self.event or (event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            return False
        target = arguments[0] if event == "open" else arguments[1]
        return not isinstance(target, int) and Path(os.fsdecode(target)).name.lstrip(".").startswith(self.name)


def die_at(point: Point) -> None:
    """Kill this process at a point of the run that it is about to start."""
    trainers: list[Trainer] = []
    fit, save = Trainer.fit, torch.save

    def recorded_fit(self: Trainer) -> None:
        trainers.append(self)
        fit(self)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        now = event == point.event and (trainers[-1].step if trainers else 0) == point.step
        if now and point.is_of(event, arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    def torn_save(content: object, file: BinaryIO) -> None:
        if (trainers[-1].step if trainers else 0) == point.step:
            save(content, complete := io.BytesIO())
            file.write(complete.getvalue()[: complete.tell() // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    Trainer.fit = recorded_fit  # type: ignore[method-assign]
    if point.event == "torn":
        torch.save = torn_save  # type: ignore[assignment]
    sys.addaudithook(watch)  # cannot be removed, which is fine: the process does nothing else


def kill_at_random(group: Sequence[BaseProcess], log: Path, moments: random.Random, longest: float = 0.3) -> bool:
    """Kill processes a random time after they have changed the log; False if they had ended before."""
    before = log.stat().st_mtime_ns if log.exists() else 0
    while all(p.exitcode is None for p in group) and (not log.exists() or log.stat().st_mtime_ns == before):
        time.sleep(0.002)
    time.sleep(moments.random() * longest)
    for process in group:
        process.kill()
    for process in group:
        process.join()
    return any(process.exitcode == KILLED for process in group)
