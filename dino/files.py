"""Atomic file writing, used for all files that this package writes."""

import csv
import errno
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dino.errors import DataError

NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # errors of CIFS and exFAT


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's entries, to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in ns of a file, to detect changes; (-1, -1) if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


@contextmanager
def atomic_path(path: Path, *, check: Callable[[Path], None] | None = None, make_folder: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, and rename it to ``path`` when the block ends without an error.

    The file is synced before the rename and the folder after it. ``path`` therefore has either the old or the complete
    new content, also after a crash. When the block raises, the temporary file is removed.

    Args:
        path: Final path.
        check: Called with the synced temporary file before the rename; if it raises, the old file is kept.
        make_folder: Create the folder of ``path`` if absent. Pass False for a folder that existed before: if it is
            absent now, a mount was lost.

    Yields:
        The temporary path, unique to this process, for the block to write.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        if check is not None:
            check(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporary files that killed processes left in ``folder`` and below it; their final files are unchanged."""
    return (path for path in folder.rglob(".*.tmp") if path.is_file())


def tidy(folder: Path, name: str = "*") -> None:
    """Remove temporary files that killed processes left of files named ``name``.

    Call it only while no other process writes these files.
    """
    for left in folder.glob(f".{name}.*.tmp"):
        left.unlink(missing_ok=True)


@contextmanager
def oserror_to_data_error(folder: Path) -> Iterator[None]:
    """Convert an ``OSError`` of the block to a one-line :class:`DataError` about ``folder``.

    Raises:
        DataError: For an ``OSError`` of the operating system: a full disk, a read-only folder, a lost mount.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            raise
        path = f" ({printable(error.filename)})" if error.filename else ""
        raise DataError(
            f"expected to write to {folder}, found: {error.strerror}{path}; check the disk, then run the same command "
            "again to continue"
        ) from error


def printable(path: object) -> str:
    """A path or name as one line of valid text: line breaks and bytes that are not UTF-8 become escapes."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def csv_text(rows: Iterable[Sequence[str]]) -> str:
    """Rows as CSV; a cell that a spreadsheet would run as a formula gets a leading apostrophe."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerows([f"'{cell}" if is_formula(cell) else cell for cell in row] for row in rows)
    return text.getvalue()


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet would run the text of a cell as a formula."""
    if cell[:1] not in tuple("=+-@\t\r"):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False  # a negative number


def write_bytes(
    path: Path, content: bytes, *, check: Callable[[Path], None] | None = None, make_folder: bool = True
) -> None:
    """Write ``content`` to ``path`` atomically; ``check`` and ``make_folder`` as in :func:`atomic_path`."""
    with atomic_path(path, check=check, make_folder=make_folder) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 ``content`` to ``path`` atomically."""
    write_bytes(path, content.encode())


def append_text(path: Path, content: str) -> None:
    """Append UTF-8 ``content`` to ``path``: all of it or, if the disk is full, nothing.

    Raises:
        OSError: If it cannot be written.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(content)
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def create_text(path: Path, content: str) -> bool:
    """Write UTF-8 ``content`` to a new file; False if it exists. If several processes try, exactly one succeeds.

    Raises:
        OSError: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # other hosts may use the same PID
    try:
        temporary.write_text(content, encoding="utf-8")
        os.link(temporary, path)  # fails if `path` exists; the new file is complete from the start
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        return _create(path, content)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create(path: Path, content: str) -> bool:
    """:func:`create_text` without hard links: the file is empty for a moment."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def parse_json(text: str) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: If it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError as in :func:`parse_json`, OSError if it cannot be read."""
    return parse_json(path.read_text(encoding="utf-8"))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a log, one per line; incomplete lines that a killed process left are skipped."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            content = parse_json(line)
            if isinstance(content, dict):
                lines.append(content)
    return lines


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON to ``path`` atomically; paths become strings."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def hold_file(path: Path, *, shared: bool = False, wait: bool = True) -> IO[bytes] | None:
    """Lock a file against the other processes of this machine, until the result is closed or this process ends.

    Args:
        path: The file; created when absent.
        shared: Others may hold it too, if they share it.
        wait: Wait until others have released it.

    Returns:
        The open file, which is the lock; None if others hold it and ``wait`` is False.

    Raises:
        OSError: If it cannot be opened.
    """
    import fcntl  # not on Windows, which has nothing else of it

    file = path.open("ab")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file
