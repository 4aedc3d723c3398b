"""Signals that stop a run: from schedulers, which send them to every process of a job, and from the keyboard."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dino.distributed import is_main, launched
from dino.errors import Stopped

SCHEDULER_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # USR2 is submitit's
STOP_SIGNALS = (*SCHEDULER_SIGNALS, signal.SIGINT)
INTERRUPTED = "\ninterrupted: saving after this step; ctrl-C again ends at once\n"


class StopSignal:
    """Remembers the signal that asks a run to stop, so that the step in progress can be completed.

    Attributes:
        received: Number of the signal, None before any.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Catch the signals during the block; outside of the main thread signals cannot be caught.

        SIGTERM stays caught after an error in one of several processes: when one fails, torchrun sends it to the
        others, which must still print why they end.
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
        if number == signal.SIGINT:
            if self.received is not None:
                raise KeyboardInterrupt
            if is_main():
                os.write(2, INTERRUPTED.encode())  # print is not reentrant
        self.received = number


def ignore_signals_in_worker(worker: int) -> None:
    """Make a data-loader worker ignore all stop signals but SIGTERM from the training process.

    Schedulers and terminals signal every process of a job. The training process completes its step then, for which it
    needs its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where no scheduler sends the others
        return

    def listen() -> None:
        while True:
            received = signal.sigwaitinfo(SCHEDULER_SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == os.getppid():
                os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, SCHEDULER_SIGNALS)
    threading.Thread(target=listen, daemon=True).start()
