"""The lock of a run folder: live holders, dead holders, and heartbeats."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dino import lock
from dino.errors import ConfigError
from dino.lock import LOCK, RunLock


def quick(folder: Path) -> RunLock:
    return RunLock(folder, beat_seconds=0.02, stale_seconds=0.4)


def leave(folder: Path, **changes: object) -> Path:
    """A lock file left by a process that ended without releasing it."""
    with RunLock(folder).held():
        content = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps({**content, **changes}))
    return folder / LOCK


def holder(folder: Path) -> subprocess.Popen:
    """Start another process that holds the lock until it is killed; returns once it holds the lock."""
    program = (
        "import sys, time; from pathlib import Path; from dino.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_released_lock_can_be_acquired_again(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path / "run").held():
            assert (tmp_path / "run" / LOCK).exists()
        assert os.listdir(tmp_path / "run") == []


def test_a_live_holder_is_respected_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(ConfigError, match=rf"PID {process.pid} on .*use another folder"), RunLock(tmp_path).held():
        pass
    process.kill()  # not waited for yet: a zombie counts as dead
    deadline = time.monotonic() + 10
    while lock._started(process.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    mine = RunLock(tmp_path)
    with mine.held():
        assert mine.is_mine()
    process.wait()


def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    leave(tmp_path, started="1")  # this process's PID, but another start time
    mine = RunLock(tmp_path)
    with mine.held():
        assert mine.is_mine()


@pytest.mark.parametrize("damaged", ["", "{", "[1]", '{"pid": "x"}'])
def test_a_damaged_lock_without_a_heartbeat_is_stale(tmp_path: Path, damaged: str) -> None:
    (tmp_path / LOCK).write_text(damaged)
    mine = quick(tmp_path)
    with mine.held():
        assert mine.is_mine()


def test_a_holder_on_another_host_is_dead_without_a_heartbeat(tmp_path: Path) -> None:
    path = leave(tmp_path, host="elsewhere")
    with quick(tmp_path).held():
        pass
    path = leave(tmp_path, host="elsewhere")
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on elsewhere"), RunLock(tmp_path, 0.02, 30.0).held():
            pass
    finally:
        done.set()
        thread.join()


def test_the_same_launch_on_another_host_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunLock, "_has_heartbeat", lambda self: True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    leave(tmp_path, host="elsewhere")
    with RunLock(tmp_path).held():
        pass
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default id
    leave(tmp_path, host="elsewhere")
    with pytest.raises(ConfigError), RunLock(tmp_path).held():
        pass


def test_the_heartbeat_updates_the_modification_time(tmp_path: Path) -> None:
    with quick(tmp_path).held():
        first = (tmp_path / LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_that_was_taken_over_or_deleted_is_not_mine(tmp_path: Path) -> None:
    mine = RunLock(tmp_path)
    with mine.held():
        other = (tmp_path / LOCK).read_text().replace(str(os.getpid()), "1")
        (tmp_path / LOCK).write_text(other)
        assert not mine.is_mine()
    assert (tmp_path / LOCK).read_text() == other  # the lock of another process is kept
    (tmp_path / LOCK).unlink()
    assert not mine.is_mine()


def test_only_one_of_many_threads_acquires_it(tmp_path: Path) -> None:
    leave(tmp_path, pid=2**22 + 1)  # dead, so that all try to take over
    outcomes: list[str] = []
    gate, hold = threading.Barrier(8), threading.Event()

    def attempt() -> None:
        gate.wait()
        try:
            with RunLock(tmp_path).held():
                outcomes.append("held")
                hold.wait(20)
        except ConfigError:
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(outcomes) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    hold.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * 7


def test_the_heartbeat_thread_does_not_keep_a_process_alive(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dino.lock import RunLock\n"
        "RunLock(Path(sys.argv[1])).held().__enter__(); print('end of the program')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0 and "end of the program" in done.stdout
