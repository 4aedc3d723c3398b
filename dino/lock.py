"""Allows one run at a time in a folder: a lock file whose modification time is a heartbeat.

Beside it, locks of single files between the processes of one machine.
"""

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
STALE_SECONDS = 60.0  # without a heartbeat for this long, a holder on another host is considered dead
POLL_SECONDS = 0.02  # between two checks of a lock that another process is taking over
NO_LAUNCH = {None, "none"}  # torchrun's default id, which does not identify a job


class RunLock:
    """Exclusive use of a folder by one run (a training, a tiling, an extraction).

    The holder is identified by host, PID and start time. On the same host, a dead holder is therefore recognised at
    once, also when its PID was reused. For a holder on another host the heartbeat decides: the modification time of the
    file. The file server sets it, and it is only checked for changes, so clocks need not agree.

    Args:
        folder: The folder; created when absent.
        beat_seconds: Time between heartbeats.
        stale_seconds: Age of the last heartbeat at which a holder on another host is considered dead.
        name: Name of the lock file; different kinds of runs that may use one folder at once have different names.
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
        self._text = json.dumps({**_own_identity(), "launch": distributed.launch_id(), "token": uuid.uuid4().hex})
        self._ended = threading.Event()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock during the block; the main process acquires it for all processes.

        Raises:
            ConfigError: On every process, if another live run holds it.
        """
        reason = distributed.broadcast(self._acquire() if distributed.is_main() else "")
        if reason:
            raise ConfigError(reason)
        if distributed.is_main():
            threading.Thread(target=self._heartbeat, daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()
            if self.is_mine():
                self.path.unlink(missing_ok=True)

    def is_mine(self) -> bool:
        """True while the lock is that of this process: not taken over, and the folder has not disappeared."""
        with suppress(OSError):
            return self.path.read_text(errors="replace") == self._text
        return False

    def is_taken_over(self) -> bool:
        """True once another process has taken over the lock, because this one had no heartbeat for too long."""
        with suppress(OSError):
            return self.path.read_text(errors="replace") != self._text
        return False

    def _acquire(self) -> str:
        """Acquire the lock; returns the reason if that is not possible, else an empty string."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._acquire_in_folder()
        except OSError as error:
            return f"expected to write to {self.path.parent}, found: {error.strerror}; check the disk"

    def _acquire_in_folder(self) -> str:
        """Acquire the lock unless a live process holds it; returns the reason if one does."""
        while not create_text(self.path, self._text) and not self.is_mine():
            found = _read(self.path)
            if found is None:
                continue  # released meanwhile
            holder = _parsed(found)
            if self._is_alive(holder):
                return (
                    f"expected {self.path.parent} to be unused, found that it is in use by PID {holder.get('pid')} on "
                    f"{holder.get('host')}; stop that run first, or use another folder"
                )
            self._take_over(found)
        return ""

    def _take_over(self, dead: str) -> None:
        """Replace the lock of a dead process; only one process at a time can do this."""
        claim = self.path.with_name(f".{self.path.name}.{hashlib.sha256(dead.encode()).hexdigest()[:16]}")
        if not create_text(claim, self._text):
            other = _read(claim)
            if other is not None and not self._is_alive(_parsed(other)):
                claim.unlink(missing_ok=True)
            time.sleep(POLL_SECONDS)
            return
        try:
            if _read(self.path) == dead:
                write_text(self.path, self._text)
        finally:
            claim.unlink(missing_ok=True)

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        own = _own_identity()
        if holder.get("host") == own["host"] and holder.get("boot") == own["boot"]:
            return _started(holder.get("pid")) == holder.get("started") is not None
        if distributed.launch_id() not in NO_LAUNCH and holder.get("launch") == distributed.launch_id():
            return False  # the same job, restarted on another host: its launcher has ended the old processes
        progress.say(
            f"{self.path.parent} was last used on {holder.get('host')}: waiting up to {self.stale_seconds:.0f} s "
            "to see whether a run there is alive"
        )
        return self._has_heartbeat()

    def _has_heartbeat(self) -> bool:
        """Wait for a heartbeat; False after ``stale_seconds`` without one."""
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

    def _heartbeat(self) -> None:
        while not self._ended.wait(self.beat_seconds):
            with suppress(OSError):  # a folder that has disappeared is reported at the next write
                if self.is_mine():
                    os.utime(self.path)


def _read(path: Path) -> str | None:
    """Content of a lock file, None if there is none."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _parsed(text: str) -> dict[str, Any]:
    """Content of a lock file as a dict; empty if it is damaged."""
    try:
        content = parse_json(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _own_identity() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot_id(), "pid": pid, "started": _started(pid)}


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: Any) -> str | None:
    """Start time of a process of this host in kernel ticks; None if there is no such process, or it is a zombie."""
    if not Path("/proc/self/stat").exists():
        return _accepts_signals(pid)
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _accepts_signals(pid: Any) -> str | None:
    """Where there is no /proc: ``unknown`` if a process accepts signals, else None."""
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError, TypeError):
        return None
    return "unknown"
