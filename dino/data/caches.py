"""Folders for what is computed once from a data folder: beside the data, else in the user's cache."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from dino import progress
from dino.files import hold_file

AUTO, NONE = "auto", "none"  # values of speed.cache_dir
CACHE_FOLDER = ".histodino"  # beside the data; hidden, so that lists of images and grids leave it out
LOCK = "lock"


def cache_folders(folder: Path, cache_dir: str) -> list[Path]:
    """Cache folders for the data of ``folder``, in order of preference.

    Args:
        folder: The data folder.
        cache_dir: The setting ``speed.cache_dir``: ``auto``, ``none``, or a folder.
    """
    if cache_dir == NONE:
        return []
    own = f"{folder.resolve().name}-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]}"
    if cache_dir != AUTO:
        return [Path(cache_dir) / own]
    home = Path(os.environ.get("HOME") or tempfile.gettempdir())
    user = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return [folder / CACHE_FOLDER, user / "histodino" / own]


@contextmanager
def locked(cache: Path, work: str) -> Iterator[bool]:
    """Lock a cache folder; the operating system releases the lock of a process that dies.

    Args:
        cache: The folder; it is created.
        work: What another process does that holds the lock, for the message.

    Yields:
        Whether the lock is held. Some cluster file systems do not support locks: there each process works by itself,
        which is safe, because files are written atomically, and only takes longer.

    Raises:
        OSError: If the folder cannot be written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    (cache / LOCK).touch()
    try:
        lock = hold_file(cache / LOCK, wait=False)
        if lock is None:
            progress.say(f"another process is {work} into {cache}; waiting for it")
            lock = hold_file(cache / LOCK)
    except OSError:
        lock = None
    with lock or nullcontext():
        yield lock is not None
