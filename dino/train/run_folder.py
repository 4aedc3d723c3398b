"""A run folder: its settings, log, status, and whether a command may go on in it."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dino import distributed, progress
from dino.errors import ConfigError
from dino.files import append_text, csv_text, leftovers, read_json, read_json_lines, sync, write_json, write_text
from dino.lock import LOCK, RunLock

FINAL_STATES = {"finished", "early_stopped", "stopped", "failed"}
OVER = {"finished", "early_stopped"}

# What status.json says from the first moment on.
EMPTY: dict[str, Any] = {
    "eta_seconds": None,
    "last_checkpoint": None,
    "last_checkpoint_step": 0,
    "bad_files": 0,
    "warnings": [],
}


class RunFolder:
    """Files of a run. Every process holds one; only the main process writes.

    Args:
        path: The folder; created when absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.failure = path / "failure"
        self.lock = RunLock(path)
        self._status: dict[str, Any] = self.status()
        self._unwritten: list[str] = []  # lines of the log
        self._quarantined = -1 if (path / "quarantine.csv").exists() else 0  # how many are listed; -1: not known

    def status(self) -> dict[str, Any]:
        """Content of ``status.json``; empty when there is none or it is damaged."""
        try:
            content = read_json(self.path / "status.json")
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def is_over(self) -> bool:
        """True when the run has come to its end."""
        return self._status.get("state") in OVER

    def was_ended_by_this_launch(self) -> bool:
        """True in workers that torchrun restarted after the run had reached a final state: they must end at once."""
        self._status = distributed.broadcast(self._status)  # a shared disk may show each host another one
        return (
            distributed.restarted()
            and self._status.get("run_id") == distributed.launch_id()
            and self._status.get("state") in FINAL_STATES
        )

    def safe_step(self) -> int:
        """Steps that the last checkpoint holds: where a restart goes on."""
        return int(self._status.get("last_checkpoint_step", 0))

    def check(self, identity: Mapping[str, Any]) -> None:
        """Make sure that the folder is new or this very run's; nothing is written.

        Args:
            identity: What the run computes, by dotted key.

        Raises:
            ConfigError: If the folder holds another run, or files that are no run.
        """
        known = self.path / "identity.json"
        if known.exists():
            self._refuse_other(self.identity(), json.loads(json.dumps(identity)))
        elif self.path.exists() and self._others():
            raise ConfigError(
                f"expected an empty folder or a run at {self.path}, found other files; name another folder"
            )
        distributed.barrier()  # nobody writes before everybody has looked

    def _others(self) -> set[Path]:
        """What lies in the folder beside locks and what a process killed in its first moments left."""
        return {path for path in self.path.iterdir() if LOCK not in path.name} - set(leftovers(self.path))

    def claim(self, identity: Mapping[str, Any], config_yaml: str) -> None:
        """Write ``identity.json`` and ``config.yaml``: from here on the folder is this run's.

        Args:
            identity: What the run computes, by dotted key.
            config_yaml: The resolved settings.
        """
        if distributed.is_main():
            for left in leftovers(self.path):
                if LOCK not in left.name:  # another process may just be looking at the lock
                    left.unlink(missing_ok=True)
            write_json(self.path / "identity.json", dict(identity))
            write_text(self.path / "config.yaml", config_yaml)

    def _refuse_other(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if not changed:
            return
        shown = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed[:4])
        raise ConfigError(
            f"{self.path} belongs to another run ({shown}); resuming needs the same settings. For a new run name "
            f"another folder; model.init={self.path} starts it from this one's weights"
        )

    def update_status(self, **changes: Any) -> None:
        """Rewrite ``status.json`` with ``changes``, so that scripts and people can look at any time."""
        self._status = {
            **EMPTY,
            **self._status,
            **changes,
            "run_id": distributed.launch_id(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if distributed.is_main() and not self.lock.is_anothers():
            with self.enduring("status.json"):
                if not self.path.is_dir():  # a lost mount: its mount point is no place for a run
                    raise FileNotFoundError(2, "the folder has vanished")
                write_json(self.path / "status.json", self._status)

    def warn(self, message: str) -> None:
        """Say once what is wrong, on the terminal and under ``warnings`` of ``status.json``; the run goes on."""
        known = self._status.get("warnings", [])
        if message not in known:
            self._status["warnings"] = [*known, message]
            progress.warn(message)

    @contextmanager
    def enduring(self, what: str) -> Iterator[None]:
        """Go on, with a warning, when the disk does not take what the block writes."""
        try:
            yield
        except OSError as error:
            self.warn(f"cannot write {self.path / what}: {error.strerror or error}; the run goes on, look at the disk")

    def write_quarantine(self, quarantine: Mapping[str, str]) -> None:
        """Write ``quarantine.csv``, the samples that could not be used, when it holds others than are written.

        Args:
            quarantine: Reason of each by its name.
        """
        if distributed.is_main() and len(quarantine) != self._quarantined:
            with self.enduring("quarantine.csv"):
                write_text(self.path / "quarantine.csv", csv_text([("path", "reason"), *quarantine.items()]))
                self._quarantined = len(quarantine)

    def cut_log(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of ``metrics.jsonl`` after ``step``, which a resumed run writes anew; from 0 that is all.

        Returns:
            The lines that are kept and are no evaluations, on the main process; elsewhere none.
        """
        log = self.path / "metrics.jsonl"
        if not distributed.is_main() or not log.exists():
            return []
        lines = read_json_lines(log) if step > 0 else []
        kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
        write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
        return [line for line in kept if "loss" in line]

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; one that the disk does not take is kept and written with the next."""
        if distributed.is_main():
            self._unwritten.append(json.dumps(line) + "\n")
            with self.enduring("metrics.jsonl"):
                self._append_lines()

    def sync_log(self) -> None:
        """Have every line of the log on disk, as far as it takes them."""
        with self.enduring("metrics.jsonl"):
            self._append_lines()
            if (self.path / "metrics.jsonl").exists():
                sync(self.path / "metrics.jsonl")

    def _append_lines(self) -> None:
        if self._unwritten:
            append_text(self.path / "metrics.jsonl", "".join(self._unwritten))
            self._unwritten.clear()

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; none when there is no such file."""
        log = self.path / "metrics.jsonl"
        return read_json_lines(log) if log.exists() else []

    def last_metrics(self) -> dict[str, float]:
        """The newest line of ``metrics.jsonl`` with a finite loss, without what is not finite; empty without any."""
        losses = [line for line in self.log_lines() if _is_finite(line.get("loss"))]
        return {k: v for k, v in losses[-1].items() if _is_finite(v)} if losses else {}

    def identity(self) -> dict[str, Any]:
        """What the folder's run computes, by dotted key.

        Raises:
            ConfigError: If the folder holds no run.
        """
        try:
            return dict(read_json(self.path / "identity.json"))
        except (OSError, ValueError, TypeError):
            raise ConfigError(
                f"expected a run at {self.path}, found no readable identity.json; check the path"
            ) from None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
