"""Signals that ask a run to stop: schedulers send them to every process of a job."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dino.distributed import launched
from dino.errors import Stopped

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # USR2 is submitit's


class StopSignal:
    """Remembers what asks a run to stop for the length of a block; the step in progress is finished first.

    Attributes:
        received: Number of the signal that came, None before one has.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Catch the signals while the block runs; outside of the main thread signals cannot be caught.

        SIGTERM stays caught where an error ends one of several processes: when one is lost, torchrun sends it to the
        others, which should still come to say why they end.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield self
        except Exception as error:
            if launched() and not isinstance(error, Stopped):
                del before[signal.SIGTERM]
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = number


def ignore_signals_in_worker(worker: int) -> None:
    """Let no signal but the training process's own SIGTERM end this worker.

    A scheduler sends its signals to every process of a job. The training process finishes its step then, and needs its
    workers for that.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS, which has no such schedulers
        return

    def listen() -> None:
        while True:
            received = signal.sigwaitinfo(STOP_SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=listen, daemon=True).start()
