"""Which files are the same, by path or by content: a copy under another name is found too."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from dino.errors import DataError
from dino.files import printable

READERS = 4


def content_hashes(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file.

    Raises:
        DataError: If a file cannot be read.
    """

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(digest, paths))
    except OSError as error:
        raise DataError(f"expected readable files, found {printable(error.filename)}: {error.strerror}") from None


def find_copies(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Files that are listed twice, or copied under another name.

    Only files of one size are read, so that most lists cost a look at each file's size.

    Args:
        paths: Existing files.

    Returns:
        ``(first, later)`` indices: of the first file with a content, and of each later one.

    Raises:
        DataError: If a file cannot be read.
    """
    by_size: dict[int, list[int]] = {}
    for index, size in enumerate(map(_size, paths)):
        by_size.setdefault(size, []).append(index)
    candidates = sorted(index for rows in by_size.values() if len(rows) > 1 for index in rows)
    first: dict[str, int] = {}
    copies = []
    for index, content in zip(candidates, content_hashes([paths[i] for i in candidates]), strict=True):
        if content in first:
            copies.append((first[content], index))
        else:
            first[content] = index
    return copies


def find_in_folder(paths: Sequence[Path], folder: Path, names: Iterable[str]) -> list[Path]:
    """Those of the paths that are files of a folder, or copies of its files.

    The size of every file of the folder is looked up; only those of the size of a path are read.

    Args:
        paths: Existing files.
        folder: The folder.
        names: Names of its files; one that does not exist any more is left out.

    Raises:
        DataError: If a file cannot be read.
    """
    own = {os.path.realpath(path) for path in paths}
    sizes = set(map(_size, paths))
    same, candidates = set(), []
    for name in names:
        file = folder / name
        try:
            size = file.stat().st_size
        except OSError:
            continue
        if size in sizes:
            candidates.append(file)
            same.update({os.path.realpath(file)} & own)
    contents = set(content_hashes([file for file in candidates if os.path.realpath(file) not in same]))
    others = [path for path in paths if os.path.realpath(path) not in same] if contents else []
    copied = {path for path, content in zip(others, content_hashes(others), strict=True) if content in contents}
    return [path for path in paths if os.path.realpath(path) in same or path in copied]


def find_in_stored(paths: Sequence[Path], sizes: np.ndarray, content: Callable[[int], bytes]) -> list[Path]:
    """Those of the paths that are copies of stored files, of which only those of the size of a path are read.

    Args:
        paths: Existing files.
        sizes: ``(N,)`` sizes of the stored files in bytes.
        content: Returns the bytes of one of them; OSError or DataError if it cannot be read, which leaves it out.

    Raises:
        DataError: If one of the paths cannot be read.
    """
    own = {path: _size(path) for path in paths}
    candidates = np.flatnonzero(np.isin(sizes, list({*own.values()})))
    contents: set[str] = set()
    for index in candidates.tolist():
        with suppress(OSError, DataError):
            contents.add(hashlib.sha256(content(index)).hexdigest())
    found = {int(size) for size in np.unique(sizes[candidates])}
    others = [path for path in paths if own[path] in found]
    copied = {path for path, one in zip(others, content_hashes(others), strict=True) if one in contents}
    return [path for path in paths if path in copied]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"expected readable files, found {printable(path)}: {error.strerror}") from None
