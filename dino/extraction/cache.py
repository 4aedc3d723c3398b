"""One cache of features of files, by the encoder's weights, what it is given, and the files."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino import files, progress
from dino.errors import ConfigError

AUTO, NONE = "auto", "none"


def cache_folder(setting: str) -> Path | None:
    """The folder of a setting: ``auto`` (in the user's cache folder), ``none``, or a folder.

    Raises:
        ConfigError: If the setting is empty.
    """
    if not setting:
        raise ConfigError("expected a cache folder, auto or none, found an empty text")
    if setting == NONE:
        return None
    if setting != AUTO:
        return Path(setting).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "histodino" / "features"


class FeatureCache:
    """Features of a list of files, as ``.npy`` files that are memory-mapped.

    A file that has changed (its size or time of modification) is another one.

    Args:
        folder: Folder of the cache; None for no cache.
        paths: The files.
    """

    def __init__(self, folder: Path | None, paths: Sequence[Path]) -> None:
        self.folder = folder
        self._files = hashlib.sha256()
        for path in paths:
            self._files.update(json.dumps([str(path.absolute()), *files.stamp(path)]).encode())

    def load(self, encoder: Mapping[str, Any]) -> NDArray[np.float32] | None:
        """The features ``(N, D)`` of all files by an encoder; None if they are not there."""
        path = self._path(encoder)
        if path is None or not path.is_file():
            return None
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # damaged: computed again
            return None

    def store(self, encoder: Mapping[str, Any], features: NDArray[np.float32]) -> None:
        """Keep the features ``(N, D)`` of all files by an encoder; a folder that cannot be written is a warning."""
        path = self._path(encoder)
        if path is None:
            return
        try:
            with files.atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, np.ascontiguousarray(features))
        except OSError as error:
            progress.warn(f"features are not cached: {path.parent} cannot be written ({error.strerror})")

    def _path(self, encoder: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        key = hashlib.sha256(f"{self._files.hexdigest()} {json.dumps(encoder, sort_keys=True)}".encode())
        return self.folder / f"{key.hexdigest()[:32]}.npy"
