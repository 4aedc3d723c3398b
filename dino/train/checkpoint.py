"""Checkpoints that survive: written aside, synced, checked, renamed; the one before stays until the new one stands."""

import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dino import progress
from dino.errors import CheckpointError
from dino.files import atomic_path, tidy
from dino.models.weights import read_checkpoint

LAST, PREVIOUS, BEST, START = "last.pt", "previous.pt", "best.pt", "start.pt"


def check_archive(path: Path) -> None:
    """Read a written checkpoint back and compare its checksums.

    Raises:
        CheckpointError: If it is no archive, or an entry does not have the CRC it was written with.
        OSError: If it cannot be read at all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # flipped bits also look like passwords and unknown compressions, each with its error
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

    def save(self, content: dict[str, Any], name: str = LAST) -> Path:
        """Write ``content`` as ``name``; the file it replaces is kept as ``previous.pt`` when it is the last one.

        Args:
            content: What ``torch.load(weights_only=True)`` can read back.
            name: File name.

        Returns:
            Path of the checkpoint, which stands whole on disk.
        """
        path = self.folder / name

        def check(temporary: Path) -> None:
            check_archive(temporary)
            if name == LAST and path.exists():
                self._link(path, PREVIOUS)

        # A file of Python's, because torch's own reports a full disk as a fault of the program.
        with atomic_path(path, check=check) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
        return path

    def tidy(self) -> None:
        """Remove what a killed process left half-written; only for the process that writes here."""
        tidy(self.folder)

    def keep_last_as(self, name: str) -> None:
        """Let ``name`` be the checkpoint that ``last.pt`` is now, at no cost in space where the disk has hard links."""
        self._link(self.folder / LAST, name)

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, on the CPU; None when there is none.

        Raises:
            CheckpointError: If there are checkpoints but none can be read.
        """
        reason = ""
        for name in (LAST, PREVIOUS):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                check_archive(path)
                return read_checkpoint(path)
            except (CheckpointError, OSError) as error:
                reason = f"{reason}; {error}" if reason else str(error)
                progress.warn(f"{path} is damaged and is not used: {error}")
        if reason:
            raise CheckpointError(f"expected a whole checkpoint in {self.folder}, found none: {reason}")
        return None

    def _link(self, source: Path, name: str) -> None:
        with atomic_path(self.folder / name) as temporary:
            with suppress(OSError):
                os.link(source, temporary)
                return
            shutil.copyfile(source, temporary)
