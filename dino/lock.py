"""One run at a time in a folder: a lock file whose modification time is a heartbeat."""

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dino import distributed, progress
from dino.errors import ConfigError
from dino.files import create_text, parse_json, write_text

LOCK = "lock.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # a host that has not beaten for so long is taken for dead
TURN_SECONDS = 0.02  # between looks at a lock that another process is taking over
NO_LAUNCH = {None, "none"}  # torchrun's id when nobody gave it one: it tells no job from another


class RunLock:
    """The lock by which a run (a training, a tiling, an extraction) has a folder to itself.

    Its holder is known by host, process and start time, so that on the same host a dead holder is recognised at once,
    also when its number was given to another process. On another host the heartbeat decides: the file's modification
    time, which the file server writes and this class only compares with itself, so that clocks need not agree.

    Args:
        folder: The folder; created when absent.
        beat_seconds: Time between heartbeats.
        stale_seconds: Age of the last heartbeat at which a holder on another host is taken for dead.
        name: The lock's file, its own for each kind of run where several may work in one folder.
    """

    def __init__(
        self,
        folder: Path,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        name: str = LOCK,
    ) -> None:
        self.path = folder / name
        self.beat_seconds, self.stale_seconds = beat_seconds, stale_seconds
        self._text = json.dumps({**_myself(), "launch": distributed.launch_id(), "token": uuid.uuid4().hex})
        self._ended = threading.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for the length of the block; the main process takes it for all.

        Raises:
            ConfigError: On every process, if another run that is alive holds it.
        """
        refusal = distributed.broadcast(self._take() if distributed.is_main() else "")
        if refusal:
            raise ConfigError(refusal)
        if distributed.is_main():
            threading.Thread(target=self._beat, daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()
            if self.is_mine():
                self.path.unlink(missing_ok=True)

    def is_mine(self) -> bool:
        """True while the file is there as this process wrote it: nobody took over, and the folder has not vanished."""
        with suppress(OSError):
            return self.path.read_text(errors="replace") == self._text
        return False

    def is_anothers(self) -> bool:
        """True once another process has taken the lock over, because this one was silent for too long."""
        with suppress(OSError):
            return self.path.read_text(errors="replace") != self._text
        return False

    def _take(self) -> str:
        """Take the lock; a reason where that is not possible, else an empty string."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._contend()
        except OSError as error:
            return f"expected to write in {self.path.parent}, found that it cannot be: {error.strerror}; check the disk"

    def _contend(self) -> str:
        """Take the lock as soon as nobody who is alive holds it; a reason when somebody does."""
        while not create_text(self.path, self._text) and not self.is_mine():
            found = _read(self.path)
            if found is None:
                continue  # given back meanwhile
            holder = _parsed(found)
            if self._is_alive(holder):
                return (
                    f"expected {self.path.parent} to be free, found the run of process {holder.get('pid')} on "
                    f"{holder.get('host')} in it; stop that one first, or name another folder"
                )
            self._take_over(found)
        return ""

    def _take_over(self, dead: str) -> None:
        """Put this lock in the place of a dead one; of several processes that found it dead, one at a time may."""
        turn = self.path.with_name(f".{self.path.name}.{hashlib.sha256(dead.encode()).hexdigest()[:16]}")
        if not create_text(turn, self._text):
            other = _read(turn)
            if other is not None and not self._is_alive(_parsed(other)):
                turn.unlink(missing_ok=True)
            time.sleep(TURN_SECONDS)
            return
        try:
            if _read(self.path) == dead:
                write_text(self.path, self._text)
        finally:
            turn.unlink(missing_ok=True)

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        mine = _myself()
        if holder.get("host") == mine["host"] and holder.get("boot") == mine["boot"]:
            return _started(holder.get("pid")) == holder.get("started") is not None
        if distributed.launch_id() not in NO_LAUNCH and holder.get("launch") == distributed.launch_id():
            return False  # the same job, started again elsewhere: its launcher has ended the old processes
        progress.say(
            f"{self.path.parent} was last used on {holder.get('host')}: waiting up to {self.stale_seconds:.0f} s "
            "to see whether a run there is alive"
        )
        return self._still_beats()

    def _still_beats(self) -> bool:
        """Watch until the heart beats or has been silent for too long."""
        until = time.monotonic() + self.stale_seconds
        try:
            first = self.path.stat().st_mtime_ns
            while time.monotonic() < until:
                time.sleep(self.beat_seconds / 20)
                if self.path.stat().st_mtime_ns != first:
                    return True
        except FileNotFoundError:
            pass
        return False

    def _beat(self) -> None:
        while not self._ended.wait(self.beat_seconds):
            with suppress(OSError):  # a vanished folder shows itself when something is to be saved
                if self.is_mine():
                    os.utime(self.path)


def _read(path: Path) -> str | None:
    """Content of a lock file, None when it is gone."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _parsed(text: str) -> dict[str, Any]:
    """What a lock file says; empty when it is damaged."""
    try:
        content = parse_json(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": pid, "started": _started(pid)}


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: Any) -> str | None:
    """When a process of this host started, in the kernel's ticks; None when there is none (or it is a zombie)."""
    if not Path("/proc/self/stat").exists():
        return _answers(pid)
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _answers(pid: Any) -> str | None:
    """Where there is no /proc: whether a process takes signals."""
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError, TypeError):
        return None
    return "unknown"
