"""Named spans: the parts add up, and spans cost nothing unless measured."""

from pathlib import Path

import pytest
import torch

from dino.train.profiling import (
    DATA,
    PARTS,
    REST,
    GpuUse,
    HostClock,
    Stopwatch,
    busy_cores,
    busy_cores_warning,
    clock_of,
    feeding_advice,
    fraction,
    no_span,
)


class FakeClock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now, self.marks = 0, 0

    def mark(self) -> int:
        self.marks += 1
        return self.now

    def between(self, first: int, second: int) -> float:
        return float(second - first)


def test_parts_add_up_to_the_whole() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock)
    for _ in range(3):
        clock.now += 1
        with watch.span("data"):
            clock.now += 10
        with watch.span("forward"):
            clock.now += 100
            with watch.span("loss"):  # a span inside of another: its time is its own
                clock.now += 1000
            clock.now += 10_000
        clock.now += 2
    assert watch.take() == {REST: 9, "data": 30, "forward": 30_300, "loss": 3000}
    assert clock.now == 9 + 30 + 30_300 + 3000
    clock.now += 7
    assert watch.take() == {REST: 7}  # counted anew


def test_a_span_ends_where_its_block_fails() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock)
    with pytest.raises(KeyError), watch.span("data"):
        clock.now += 5
        raise KeyError
    clock.now += 3
    assert watch.take() == {"data": 5, REST: 3}


def test_spans_that_are_not_measured_are_rest_and_never_read_the_clock() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock, {"data"})
    with watch.span("data"):
        clock.now += 2
    before = clock.marks
    with watch.span("forward"):
        clock.now += 8
    assert clock.marks == before
    assert watch.take() == {"data": 2, REST: 8}
    assert no_span("data") is no_span("forward") is watch.span("forward")  # one object for all: nothing is made


def test_fractions() -> None:
    assert fraction({"data": 1.0, REST: 3.0}, "data") == 0.25
    assert fraction({}, "data") == 0 and fraction({REST: 0.0}, "data") == 0
    assert len(set(PARTS)) == len(PARTS) and PARTS[0] == DATA and PARTS[-1] == REST


def test_the_clock_is_the_devices() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    assert type(clock_of(torch.device("cuda", 0))).__name__ == "CudaClock"
    first, second = HostClock().mark(), HostClock().mark()
    assert HostClock().between(first, second) == second - first >= 0


def test_a_gpu_is_timed_by_events_of_its_own_queue_and_waited_for_only_when_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[tuple[str, object]] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            done.append(("record", stream))

        def synchronize(self) -> None:
            done.append(("wait", None))

        def elapsed_time(self, other: object) -> float:
            assert isinstance(other, Event)
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"queue of {device}")
    watch = Stopwatch(clock_of(torch.device("cuda", 1)))
    with watch.span("forward"):
        pass
    assert done == [("record", "queue of cuda:1")] * 3
    assert watch.take() == {REST: 0.5, "forward": 0.25}
    assert ("wait", None) in done[3:]


def test_a_cpu_in_use_by_others_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr("dino.train.profiling.STAT", stat)
    monkeypatch.setattr("dino.train.profiling.busy_cores", busy_cores)
    monkeypatch.setattr("os.cpu_count", lambda: 8)

    def others_use(cores: int) -> str:
        """The warning where other processes use so many of 8 cores."""
        stat.write_text("cpu  1000 0 500 8000 500 0 0 0 0 0\ncpu0 ...\n")
        later = f"cpu  {1000 + 100 * cores} 0 500 {8000 + 100 * (8 - cores)} 500 0 0 0 0 0\n"
        monkeypatch.setattr("time.sleep", lambda seconds: stat.write_text(later))
        return busy_cores_warning(torch.device("cpu"))

    warning = others_use(7)
    assert "7.0 of the machine's 8 cores" in warning and "OMP_NUM_THREADS=4" in warning
    assert not others_use(5)
    assert not busy_cores_warning(torch.device("cuda", 0))
    stat.unlink()
    assert not busy_cores_warning(torch.device("cpu"))


@pytest.mark.parametrize(
    ("workers", "available", "processes", "expected"),
    [
        (4, 16, 1, ["waited 31%", "more speed.num_workers (4 now, 16 cores)", "local disk"]),
        (0, 2, 1, ["more speed.num_workers (0 now, 2 cores)"]),
        (4, 16, 2, ["(4 now, 16 cores for 2 processes)"]),
        (8, 16, 2, ["no more cores to run on (16 for 2 processes)", "local disk"]),
    ],
)
def test_advice_names_what_to_change(workers: int, available: int, processes: int, expected: list[str]) -> None:
    advice = feeding_advice(0.31, workers, available, processes)
    assert all(words in advice for words in expected)
    assert ("more speed.num_workers" in advice) == (workers * processes < available)


def test_use_and_power_of_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: asked.append(device) or 87)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda _: 512_000)
    assert GpuUse(torch.device("cpu"))() == {} and asked == []
    assert GpuUse(torch.device("cuda:0"))() == {"gpu_use": 0.87, "gpu_watts": 512.0}


def test_a_driver_that_cannot_say_is_asked_once(monkeypatch):
    asked = []

    def fail(device):
        asked.append(device)
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", fail)
    use = GpuUse(torch.device("cuda:0"))
    assert (use(), use()) == ({}, {}) and len(asked) == 1
