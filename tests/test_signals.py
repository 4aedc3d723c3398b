"""Signals that are caught during a run, and after it."""

import signal
from collections.abc import Iterator

import pytest

from dino.errors import DataError, Stopped
from dino.signals import STOP_SIGNALS, StopSignal, ignore_signals_in_worker


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict]:
    """The signal handlers before the test; they are restored after it."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_recorded_only_during_the_block(number: signal.Signals, handlers: dict) -> None:
    with StopSignal().listening() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received == number
    assert {n: signal.getsignal(n) for n in STOP_SIGNALS} == handlers


def test_a_second_interrupt_is_raised() -> None:
    with StopSignal().listening() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_workers_ignore_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(
        signal, "sigwaitinfo", raising=False
    )  # otherwise the other signals would stay blocked in this process
    ignore_signals_in_worker(0)
    signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("error", "processes", "caught"),
    [
        (DataError("lost"), 2, {signal.SIGTERM}),
        (Stopped("requested"), 2, set()),  # handled by the scheduler's handlers
        (DataError("lost"), 0, set()),
        (KeyboardInterrupt(), 2, set()),
    ],
)
def test_sigterm_does_not_interrupt_the_error_of_one_of_several_processes(
    error: BaseException, processes: int, caught: set, handlers: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": str(processes)}.items() if processes else ():
        monkeypatch.setenv(name, value)
    with pytest.raises(type(error)), StopSignal().listening():
        raise error
    assert {n for n in STOP_SIGNALS if signal.getsignal(n) != handlers[n]} == caught
