"""Checkpoints of a run: their content, and files that are synced, verified and renamed before they replace another."""

import os
import shutil
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dino import distributed, progress
from dino.environment import versions
from dino.errors import CheckpointError
from dino.files import atomic_path
from dino.models.checkpoint import Description, check_resumable, read_checkpoint
from dino.models.export import export_backbone
from dino.models.weights import load_backbone_file
from dino.train.loop import Trainer
from dino.train.optimizer import SEGMENTS

LAST, PREVIOUS, BEST, START = "last.pt", "previous.pt", "best.pt", "start.pt"


def initial_content(trainer: Trainer, about: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``start.pt``: the description and the teacher.

    Args:
        trainer: The run.
        about: ``transform``, ``geometry``, ``config``, and ``training``: what is recorded of the training data.
    """
    training = {
        "total_steps": trainer.length.total,
        "versions": versions(),
        **({SEGMENTS: [s.to_dict() for s in trainer.schedules.segments]} if trainer.schedules.segments else {}),
        **about["training"],
    }
    spec = trainer.model.teacher.backbone.spec
    description = Description(spec, about["transform"], trainer.step, about["geometry"], about["config"], training)
    return {**description.to_dict(), "teacher": trainer.model.teacher.published_state()}


def checkpoint_content(trainer: Trainer, about: Mapping[str, Any]) -> dict[str, Any]:
    """Content of every other checkpoint: that of :func:`initial_content`, and what resuming needs.

    Nothing random is part of it, because all randomness follows from the draw number, and so from ``step``.
    """
    return {
        **initial_content(trainer, about),
        "student": trainer.model.student.published_state(),
        "objectives": [objective.state_dict() for objective in trainer.model.objectives],
        "optimizer": trainer.optimizer.state_dict(),
        "state": {
            "quarantine": dict(trainer.quarantine),
            "callbacks": {callback.state_name: callback.state_dict() for callback in trainer.callbacks},
        },
    }


def restore(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Load a checkpoint into a new trainer, whose callbacks are set.

    Args:
        trainer: Freshly built.
        saved: What :func:`checkpoint_content` returned.

    Raises:
        CheckpointError: If it is no checkpoint of this version.
    """
    check_resumable(saved)
    trainer.model.teacher.load_published(saved["teacher"])
    trainer.model.student.load_published(saved["student"])
    for objective, state in zip(trainer.model.objectives, saved["objectives"], strict=True):
        objective.load_state_dict(state)
    trainer.optimizer.load_state_dict(saved["optimizer"])
    trainer.step = saved["step"]
    trainer.quarantine.update(saved["state"]["quarantine"])
    for callback in trainer.callbacks:
        callback.load_state_dict(saved["state"]["callbacks"].get(callback.state_name, {}))
    progress.say(f"resuming after step {trainer.step} of {trainer.length.total}")


def check_archive(path: Path) -> None:
    """Read a written checkpoint and compare its checksums.

    Raises:
        CheckpointError: If it is no archive, or the checksum of an entry differs.
        OSError: If it cannot be read at all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # flipped bits may look like encryption or an unknown compression
        raise CheckpointError(f"expected a whole archive in {path}, found a damaged one: {error}") from None
    if damaged is not None:
        raise CheckpointError(f"expected {path} to read back as written, found '{damaged}' damaged; check the disk")


class CheckpointFolder:
    """The ``checkpoints/`` folder of a run. Only one process writes to it.

    Args:
        folder: ``RUN/checkpoints``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest = LAST  # the newest that can be read; another one while LAST is damaged

    def save(self, content: dict[str, Any], name: str = LAST) -> Path:
        """Write ``content`` as ``name``; a ``last.pt`` that it replaces is kept as ``previous.pt``.

        Args:
            content: What ``torch.load(weights_only=True)`` can read.
            name: File name.

        Returns:
            Path of the checkpoint, which is complete and synced.
        """
        path = self.folder / name

        def check(temporary: Path) -> None:
            check_archive(temporary)
            if name == LAST and path.exists() and self.newest == LAST:
                self._link(path, PREVIOUS)

        # Python's own file: torch's writer reports a full disk as an internal error.
        with atomic_path(path, check=check) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
        if name == LAST:
            self.newest = LAST
        return path

    def keep_last_as(self, name: str) -> None:
        """Save the newest checkpoint as ``name`` too; takes no space where the file system has hard links."""
        self._link(self.folder / self.newest, name)

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, on the CPU; None without any. The main process chooses it.

        Raises:
            CheckpointError: If there are checkpoints but none can be read.
        """
        content, reason = self._newest() if distributed.is_main() else (None, "")
        self.newest, exists, reason = distributed.broadcast((self.newest, content is not None, reason))
        if not exists and reason:
            raise CheckpointError(f"expected a whole checkpoint in {self.folder}, found none: {reason}")
        return read_checkpoint(self.folder / self.newest) if exists and content is None else content

    def _newest(self) -> tuple[dict[str, Any] | None, str]:
        """The newest checkpoint that can be read, and why others cannot."""
        reasons = []
        for name in (LAST, PREVIOUS):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                content = read_checkpoint(path)
            except (CheckpointError, OSError) as error:
                reasons.append(str(error))
                progress.warn(f"{path} is damaged and is not used: {error}")
            else:
                self.newest = name
                return content, ""
        return None, "; ".join(reasons)

    def step_of(self, name: str) -> int | None:
        """Step after which a checkpoint was saved; None when it is missing or damaged."""
        try:
            return read_checkpoint(self.folder / name, mmap=True).get("step")
        except (CheckpointError, OSError):
            return None

    def _link(self, source: Path, name: str) -> None:
        with atomic_path(self.folder / name) as temporary:
            with suppress(OSError):
                os.link(source, temporary)
                return
            shutil.copyfile(source, temporary)


def export_teacher(files: CheckpointFolder, directory: Path, size_px: int) -> None:
    """Export the teacher's backbone of the checkpoint that RUN means: ``best.pt`` if it can be read, else ``last.pt``.

    Args:
        files: The checkpoints of a run.
        directory: Folder to write.
        size_px: Input size that the position table is resampled for.
    """
    best_is_whole = files.step_of(BEST) is not None  # a damaged one must not end the run
    loaded = load_backbone_file(files.folder / (BEST if best_is_whole else LAST))
    export_backbone(loaded, directory, size_px)
