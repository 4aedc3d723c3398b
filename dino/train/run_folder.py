"""Run folders: :class:`RunReader` reads any, also one that another process is writing; :class:`RunFolder` writes."""

import csv
import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dino import distributed, progress
from dino.config.load import load_config
from dino.config.schema import LEVEL_CONFIGS, PatchConfig, RegionConfig
from dino.errors import CheckpointError, ConfigError
from dino.files import (
    append_text,
    csv_text,
    leftovers,
    oserror_to_data_error,
    read_json,
    read_json_lines,
    sync,
    write_json,
    write_text,
)
from dino.lock import LOCK, RunLock
from dino.models.checkpoint import resolve_run
from dino.models.grid_source import KEY, UNKNOWN, GridSource, check_same_source
from dino.train.checkpoint import START
from dino.train.optimizer import SEGMENTS, Segment

IDENTITY = "identity.json"
RESULT_FILE = "{evaluation}_{labels}.json"  # one file per evaluation and table of labels
LENGTHS = {"training.nepochs", "training.max_steps"}
COMPLETE = {"finished", "early_stopped"}
FINAL_STATES = COMPLETE | {"stopped", "failed"}

# Keys of status.json that are there from the first write on.
DEFAULT_STATUS: dict[str, Any] = {
    "eta_seconds": None,
    "last_checkpoint": None,
    "last_checkpoint_step": 0,
    "bad_files": 0,
    "warnings": [],
}


def result_file(evaluation: str, labels: str) -> str:
    """Name of the file of an evaluation in a run folder.

    Args:
        evaluation: ``knn``, ``linear``, ...
        labels: Name of the table, without its ending.
    """
    return RESULT_FILE.format(evaluation=evaluation, labels=labels)


class RunReader:
    """Contents of a run folder; reading changes nothing, and files that are missing or damaged read as empty.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.failure = path / "failure"

    def status(self) -> dict[str, Any]:
        """Content of ``status.json``; empty when it is missing or damaged."""
        try:
            content = read_json(self.path / "status.json")
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def state(self) -> str:
        """``running``, ``finished``, ``early_stopped``, ``stopped``, ``failed`` or ``crashed``; "" when unknown."""
        return str(self.status().get("state", ""))

    def is_over(self) -> bool:
        """True when the run is complete: running the command again trains no further."""
        return self._is_complete(self.status())

    def _is_complete(self, status: Mapping[str, Any]) -> bool:
        """Whether a status is that of a complete run, with all its segments."""
        return status.get("state") in COMPLETE and status.get(SEGMENTS, 0) == len(self.segments())

    def is_running(self) -> bool:
        """True while the run holds the folder's lock; also after a process was killed, until the run is resumed."""
        return self.state() == "running" and (self.path / LOCK).exists()

    def log_lines(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; empty without that file."""
        log = self.path / "metrics.jsonl"
        return read_json_lines(log) if log.exists() else []

    def last_metrics(self) -> dict[str, float]:
        """Finite values of the newest line of ``metrics.jsonl`` whose loss is finite; empty without such a line."""
        losses = [line for line in self.log_lines() if _is_finite(line.get("loss"))]
        return {k: v for k, v in losses[-1].items() if _is_finite(v)} if losses else {}

    def scores(self) -> dict[str, dict[str, Any]]:
        """What ``dino evaluate`` wrote into the folder, by name of the file."""
        found = {}
        for path in sorted(self.path.glob(result_file("*", "*"))):
            with suppress(OSError, ValueError):
                content = read_json(path)
                if isinstance(content, dict) and ("evaluation" in content or isinstance(content.get("model"), dict)):
                    found[path.name] = content  # files of versions up to 0.1.0 have a model only
        return found

    def damaged_scores(self) -> list[str]:
        """Names of files that are named as results of evaluations, but cannot be read."""
        damaged = []
        for path in sorted(self.path.glob(result_file("*", "*"))):
            try:
                read_json(path)
            except (OSError, ValueError):
                damaged.append(path.name)
        return damaged

    def quarantine(self) -> list[tuple[str, str]]:
        """Name and reason of each sample that could not be read, from ``quarantine.csv``."""
        with suppress(OSError, ValueError, csv.Error), (self.path / "quarantine.csv").open(newline="") as file:
            return [(row[0], row[1]) for row in csv.reader(file) if len(row) == 2][1:]
        return []

    def identity(self) -> dict[str, Any]:
        """What the run computes, by dotted key.

        Raises:
            ConfigError: If there is no readable ``identity.json``.
        """
        try:
            return dict(read_json(self.path / IDENTITY))
        except (OSError, ValueError, TypeError):
            raise ConfigError(
                f"expected a run at {self.path}, found no readable identity.json; check the path"
            ) from None

    def segments(self) -> list[Segment]:
        """The segments after the first, see :class:`dino.train.optimizer.Segment`; none without a run.

        Raises:
            ConfigError: If what is recorded of them is damaged.
        """
        if not (self.path / IDENTITY).exists():
            return []
        try:
            return [Segment.from_dict(values) for values in self.identity().get(SEGMENTS, [])]
        except (KeyError, TypeError):
            raise ConfigError(f"expected segments in {self.path / IDENTITY}, found a damaged record of them") from None

    def level(self) -> str:
        """``patch`` or ``region``.

        Raises:
            ConfigError: If the folder holds no run, or one of neither level.
        """
        level = self.identity().get("level")
        if level not in LEVEL_CONFIGS:
            raise ConfigError(f"{self.path}: expected a run of level {' or '.join(LEVEL_CONFIGS)}, found {level!r}")
        return str(level)

    def config(self, overrides: Sequence[str] | Mapping[str, Any] = ()) -> PatchConfig | RegionConfig:
        """The run's resolved settings, of the class of its level.

        Args:
            overrides: Settings to replace, as for :func:`dino.config.load.load_config`.

        Raises:
            ConfigError: If the folder holds no run, or its ``config.yaml`` is missing or damaged.
        """
        return load_config(LEVEL_CONFIGS[self.level()], file=self.path / "config.yaml", overrides=overrides)

    def checkpoint(self) -> Path:
        """The checkpoint that RUN means in every command: ``best.pt`` if there is one, else ``last.pt``; printed.

        Raises:
            CheckpointError: If there is neither.
        """
        return resolve_run(self.path)

    def initial_checkpoint(self) -> Path:
        """The weights before the first step.

        Raises:
            CheckpointError: If there are none.
        """
        path = self.checkpoints / START
        if not path.exists():
            raise CheckpointError(f"expected the initial weights at {path}, found no such file; check the path")
        return path


class RunFolder(RunReader):
    """Writes a run folder. Every process holds one; only the main process writes.

    Args:
        path: The folder; created when absent.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.lock = RunLock(path)
        self._status: dict[str, Any] = self.status()
        self._unwritten: list[str] = []  # lines of the log
        self._quarantined = -1 if (path / "quarantine.csv").exists() else 0  # rows in the file; -1: unknown

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder's lock.

        Raises:
            ConfigError: If another process holds it.
            DataError: If the folder cannot be written to.
        """
        with oserror_to_data_error(self.path), self.lock.held():
            yield

    def is_over(self) -> bool:
        """True when the run was complete as this object last read or wrote its status, on every process alike."""
        return self._is_complete(self._status)

    def steps_done(self) -> int:
        """Steps done when the status was written."""
        return int(self._status.get("step") or 0)

    def was_ended_by_this_launch(self) -> bool:
        """True in workers that torchrun restarted after the run had reached a final state: they must exit at once."""
        # Hosts may see different versions of a file on a shared disk.
        self._status = distributed.broadcast(self._status)
        return (
            distributed.restarted()
            and self._status.get("run_id") == distributed.launch_id()
            and (self.is_over() or self._status.get("state") in FINAL_STATES - COMPLETE)
        )

    def safe_step(self) -> int:
        """The step of the last checkpoint, which a restart resumes from."""
        return int(self._status.get("last_checkpoint_step", 0))

    def check(self, identity: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Check that the folder is new or holds this run; nothing is written.

        Args:
            identity: What the run computes, by dotted key.
            defaults: Values of settings that the identity of an old run does not contain.

        Returns:
            The identity of the run: the one it was started with.

        Raises:
            ConfigError: If the folder holds another run, or files of something else.
            DataError: If the run was started on feature grids of another level-1 model.
        """
        started = dict(identity)
        if (self.path / IDENTITY).exists():
            started = {**(defaults or {}), **self.identity()}
            self._expect_same(started, json.loads(json.dumps(identity)))
        elif self.path.exists() and self._other_files():
            raise ConfigError(
                f"expected an empty folder or a run at {self.path}, found other files; name another folder"
            )
        distributed.barrier()  # no process writes before every process has checked
        return started

    def origin(self, started: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """The origin of the samples that the run was started with; it stays unknown in a run that did not record it.

        Args:
            started: The identity that :meth:`check` returned.
            found: The origin of the samples at hand.
        """
        recorded = {key: started.get(key, UNKNOWN) for key in found}
        for key, value in recorded.items():
            if value == UNKNOWN != found[key]:
                progress.say(f"{self.path}: no record of the model of its {key}; it stays unknown")
        return recorded

    def _other_files(self) -> set[Path]:
        """Everything in the folder except locks and temporary files of a process that was killed at its start."""
        return {path for path in self.path.iterdir() if LOCK not in path.name} - set(leftovers(self.path))

    def claim(self, identity: Mapping[str, Any], config_yaml: str) -> None:
        """Write ``identity.json`` and ``config.yaml``, which make the folder this run's.

        Args:
            identity: What the run computes, by dotted key.
            config_yaml: The resolved settings.
        """
        if distributed.is_main():
            for left in leftovers(self.path):
                if LOCK not in left.name:  # another process may be checking the lock
                    left.unlink(missing_ok=True)
            write_json(self.path / IDENTITY, dict(identity))
            write_text(self.path / "config.yaml", config_yaml)

    def _expect_same(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = [key for key in {**old, **new} if key not in (KEY, SEGMENTS) and old.get(key) != new.get(key)]
        if not changed:  # not even the grids' names, but perhaps the model that they were extracted with
            before, now = (GridSource.from_dict(identity.get(KEY)) for identity in (old, new))
            check_same_source(before, now, str(self.path), "its data folder")
            return
        shown = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in changed[:4])
        resume = f"dino resume {shlex.quote(str(self.path))} training.nepochs=+10"
        longer = f"`{resume}` extends a finished run. " if set(changed) <= LENGTHS else ""
        raise ConfigError(
            f"{self.path} belongs to another run ({shown}); resuming needs the same settings. {longer}For a new run "
            f"name another folder; model.init={self.path} starts it from this one's weights"
        )

    def update_status(self, **changes: Any) -> None:
        """Rewrite ``status.json`` with ``changes``; the file is complete at any time."""
        self._status = {
            **DEFAULT_STATUS,
            **self._status,
            **changes,
            "run_id": distributed.launch_id(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if distributed.is_main() and not self.lock.is_taken_over():
            with self.tolerate_write_errors("status.json"):
                if not self.path.is_dir():  # a lost mount: do not recreate the run below its mount point
                    raise FileNotFoundError(2, "the folder has vanished")
                write_json(self.path / "status.json", self._status)

    def note_status(self, **changes: Any) -> None:
        """Change ``status.json`` with its next update."""
        self._status.update(changes)

    def warn(self, message: str) -> None:
        """Print a warning once, and list it under ``warnings`` of ``status.json``; the run continues."""
        known = self._status.get("warnings", [])
        if message not in known:
            self._status["warnings"] = [*known, message]
            progress.warn(message)

    @contextmanager
    def tolerate_write_errors(self, name: str) -> Iterator[None]:
        """Turn an ``OSError`` of the block into a warning: a full disk does not end the run.

        Args:
            name: The file that the block writes, relative to the run folder.
        """
        try:
            yield
        except OSError as error:
            self.warn(f"cannot write {self.path / name}: {error.strerror or error}; the run goes on, check the disk")

    def write_quarantine(self, quarantine: Mapping[str, str]) -> None:
        """Write ``quarantine.csv``, the samples that could not be read, if there are new ones.

        Args:
            quarantine: Reason by name of the sample.
        """
        if distributed.is_main() and len(quarantine) != self._quarantined:
            with self.tolerate_write_errors("quarantine.csv"):
                write_text(self.path / "quarantine.csv", csv_text([("path", "reason"), *quarantine.items()]))
                self._quarantined = len(quarantine)

    def cut_log(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of ``metrics.jsonl`` after ``step``, which a resumed run writes again; with 0 all of them.

        Returns:
            The kept lines with a loss (not the evaluations) on the main process; empty on the others.
        """
        log = self.path / "metrics.jsonl"
        if not distributed.is_main() or not log.exists():
            return []
        lines = read_json_lines(log) if step > 0 else []
        kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
        kept = [line for line in kept if "segment" not in line or line["step"] < step]  # written again at its start
        write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
        return [line for line in kept if "loss" in line]

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; if that fails it is kept and written with the next."""
        if distributed.is_main():
            self._unwritten.append(json.dumps(line) + "\n")
            with self.tolerate_write_errors("metrics.jsonl"):
                self._append_lines()

    def sync_log(self) -> None:
        """Write and fsync every line of the log."""
        with self.tolerate_write_errors("metrics.jsonl"):
            self._append_lines()
            if (self.path / "metrics.jsonl").exists():
                sync(self.path / "metrics.jsonl")

    def _append_lines(self) -> None:
        if self._unwritten:
            append_text(self.path / "metrics.jsonl", "".join(self._unwritten))
            self._unwritten.clear()


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
