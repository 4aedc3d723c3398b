"""Slides of object stores on the local disk: openslide reads local files only.

A folder of limited size holds the files. The processes of one machine share it: each file is downloaded once, by the
first that needs it; a file that is in use is never removed, and the least recently used ones are removed first. Files
appear complete or not at all, and locks end with the process that holds them, so that a killed process leaves nothing
but a hidden file that the next download removes.

In the folder, ``<key>.<suffix>`` is a file, ``<key>.json`` says what it is, and ``<key>.lock`` is locked by those that
use it; the time of its modification is that of the last use.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dino import files, progress
from dino.errors import CacheError, ConfigError, DataError
from dino.files import hold_file
from dino.slides.remote import SEVERAL_FILES, Location, RemoteFile, Stored, StoreError, download, look_up, with_attempts

DEFAULT_GB = 100.0
GB = 10**9
LIMIT, SPACE_LOCK = "limit.json", "space.lock"
POLL_SECONDS = 0.05
WAIT_SECONDS = 120.0  # for other processes to stop using a file
FORGET_SECONDS = 600.0  # after which a file that could not be downloaded is tried again
_failed: dict[str, tuple[float, StoreError]] = {}  # of this process: else each tile of a lost slide would wait anew


class Lease:
    """A local file that stays where it is until this is closed, or no longer referred to.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path, lock: IO[bytes] | None = None) -> None:
        self.path, self._lock = path, lock

    def close(self) -> None:
        """Let the file be removed."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Path:
        """The file."""
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let the file be removed."""
        self.close()


@dataclass(frozen=True)
class Need:
    """What the cache is asked for.

    Attributes:
        files: Number of remote files.
        total: Sum of their sizes in bytes, as far as they are known.
        missing: Sum of those that are not in the cache.
        unknown: Number of those whose size could not be looked up.
        largest: Sum of the largest ones that are in use at once.
    """

    files: int
    total: int
    missing: int
    unknown: int
    largest: int


@dataclass(frozen=True)
class SlideCache:
    """The local files of remote slides.

    Attributes:
        folder: Where they are; None for ``histodino/slides`` in the user's cache folder.
        gigabytes: Largest sum of their sizes; None for what was last given for this folder, else 100.
    """

    folder: str | None = None
    gigabytes: float | None = None

    @property
    def path(self) -> Path:
        """The folder."""
        if self.folder:
            return Path(self.folder).expanduser().absolute()
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "histodino" / "slides"

    @property
    def limit(self) -> int:
        """Largest sum of the sizes in bytes.

        Raises:
            ConfigError: If it is not positive.
        """
        if self.gigabytes is not None and not self.gigabytes > 0:
            raise ConfigError(f"expected slide_cache_gb to be a positive number of GB, found {self.gigabytes:g}")
        return round((self.gigabytes or self._recorded() or DEFAULT_GB) * GB)

    def local_path(self, location: Location, check: bool = False) -> Lease:
        """The local file of a location, downloaded if it is not there.

        Args:
            location: A path, which is taken as it is, or a remote file.
            check: Ask the store whether it still has the file that was downloaded; otherwise that is taken as it is.

        Raises:
            StoreError: If it cannot be downloaded.
            CacheError: If there is no room, or the folder cannot be written.
            ConfigError: If the package that reads the store is not installed.
        """
        if isinstance(location, Path):
            return Lease(location)
        if location.suffix.lower() in SEVERAL_FILES:
            raise DataError(
                f"expected a slide that is one file, found {location}: copy all files of {location.suffix} slides to "
                "a local folder"
            )
        since, error = _failed.get(location.identity, (-FORGET_SECONDS, None))
        if error is not None and time.monotonic() - since < FORGET_SECONDS and not check:
            raise StoreError(str(error), permanent=True)
        try:
            with self._disk_errors():
                self.path.mkdir(parents=True, exist_ok=True)
                return self._lease(location, check)
        except StoreError as failure:
            _failed[location.identity] = time.monotonic(), failure
            raise

    def has(self, file: RemoteFile) -> bool:
        """Whether a file is there."""
        entry = self._entry(file)
        return entry.is_file() and self._record(entry) is not None

    def need(self, sizes: dict[RemoteFile, int], asked: Iterable[RemoteFile], at_once: int) -> Need:
        """What reading some files takes.

        Args:
            sizes: Their sizes, as far as they are known.
            asked: The files.
            at_once: Number of files that are in use at the same time.
        """
        asked = list(dict.fromkeys(asked))
        missing = sum(sizes.get(file, 0) for file in asked if not self.has(file))
        return Need(len(asked), sum(sizes.values()), missing, len(asked) - len(sizes), largest_sum(sizes, at_once))

    def check_room(self, need: Need, setting: str, fewer: str) -> tuple[list[str], list[str]]:
        """Lines that say what will be downloaded, and that warn if files will be downloaded again and again.

        Args:
            need: What is asked for.
            setting: Name of the setting of the largest size.
            fewer: Settings that lower the number of files in use.

        Raises:
            ConfigError: If the files that are in use at once do not fit.
        """
        limit = self.limit
        unknown = f", {need.unknown} of unknown size" if need.unknown else ""
        if need.largest > limit:
            raise ConfigError(
                f"expected {setting} of at least {_up(need.largest)} for the slides that are open at once, found "
                f"{limit / GB:g}; raise it, or lower {fewer}"
            )
        said = (
            f"{need.files:,} slides of {need.total / GB:,.2f} GB are on object stores{unknown}; "
            f"{need.missing / GB:,.2f} GB to download into {self.path} (at most {limit / GB:g} GB)"
        )
        warnings = []
        if need.total > limit:
            warnings.append(
                f"the slides ({need.total / GB:,.2f} GB) do not fit into the slide cache ({limit / GB:g} GB): where "
                "tiles are drawn at random, slides will be downloaded again and again; "
                f"with {setting}={_up(need.total)} each is downloaded once"
            )
        return [said], warnings

    def _entry(self, file: RemoteFile) -> Path:
        key = hashlib.sha256(file.identity.encode()).hexdigest()[:32]
        return self.path / f"{key}{file.suffix if file.suffix[1:].isalnum() else ''}"

    def _lease(self, file: RemoteFile, check: bool) -> Lease:
        entry = self._entry(file)
        current = with_attempts(file, lambda: look_up(file)) if check else None
        while True:
            shared = _held(_lock_of(entry), shared=True)
            if (found := self._record(entry)) is not None and current in (None, found):
                os.utime(_lock_of(entry))
                return Lease(entry, shared)
            shared.close()
            with _held(_lock_of(entry), shared=False):
                found = self._record(entry)
                if found is None or current not in (None, found):
                    downloaded = self._download(file, entry)
                    current = current and downloaded

    def _download(self, file: RemoteFile, entry: Path) -> Stored:
        """Download a file; the lock of its entry is held."""
        stored = with_attempts(file, lambda: look_up(file))
        entry.unlink(missing_ok=True)
        files.tidy(self.path, entry.name)  # of a process that was killed
        with files.atomic_path(entry) as temporary:
            self._reserve(temporary, stored.size, file)
            stored = download(file, temporary, stored)
            record = {"address": file.address, "size": stored.size, "version": stored.version}
            files.write_json(_record_of(entry), record)
        return stored

    def _record(self, entry: Path) -> Stored | None:
        """What a complete file is; None if it is not there."""
        try:
            record = files.read_json(_record_of(entry))
            found = Stored(int(record["size"]), str(record["version"]))
            return found if entry.stat().st_size == found.size else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _recorded(self) -> float | None:
        try:
            return float(files.read_json(self.path / LIMIT)["gigabytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _reserve(self, temporary: Path, size: int, file: RemoteFile) -> None:
        """Make room, and create the file with its full size, which other processes count.

        Raises:
            CacheError: If there is no room.
        """
        limit = self.limit
        if size > limit:
            raise CacheError(f"expected a slide cache for {file} of {_up(size)} GB, found a limit of {limit / GB:g} GB")
        until, waiting = time.monotonic() + WAIT_SECONDS, False
        while True:
            with _held(self.path / SPACE_LOCK, shared=False):
                if self.gigabytes is not None and self.gigabytes != self._recorded():
                    files.write_json(self.path / LIMIT, {"gigabytes": self.gigabytes})
                if self._evict(limit - size):
                    with temporary.open("wb") as output:
                        output.truncate(size)
                    return
            if time.monotonic() > until:
                raise CacheError(
                    f"expected room for {size / GB:.2f} GB in {self.path}, found {limit / GB:g} GB of slides that are "
                    "in use; raise slide_cache_gb, or keep fewer slides open"
                )
            if not waiting:
                progress.say(f"{self.path} is full of slides in use: waiting for room")
                waiting = True
            time.sleep(POLL_SECONDS * 10)

    def _evict(self, limit: int) -> bool:
        """Remove files that are not in use, the least recently used first, until the others have ``limit`` bytes."""
        total, removable = 0, []
        with os.scandir(self.path) as entries:
            for one in entries:
                path = Path(one.path)
                if path.suffix in (".lock", ".json") or not one.is_file():
                    continue
                size = files.stamp(path)[0]
                total += max(size, 0)
                removable.append((*_last_use(path), size, path))
        for _, _, size, path in sorted(removable):
            unfinished = path.name.startswith(".")
            if total <= limit and not unfinished:
                continue
            lock = hold_file(_lock_of(path), wait=False)
            if lock is None:
                continue
            with lock:
                path.unlink(missing_ok=True)
                if not unfinished:
                    _record_of(path).unlink(missing_ok=True)
                total -= max(size, 0)
        return total <= limit

    @contextmanager
    def _disk_errors(self) -> Any:
        try:
            yield
        except OSError as error:
            raise CacheError(
                f"expected to write to the slide cache {self.path}, found: {error.strerror or error}; free space, or "
                "set another slide_cache"
            ) from None


def largest_sum(sizes: dict[RemoteFile, int], at_once: int) -> int:
    """Sum in bytes of the largest files that are in use at the same time."""
    return sum(sorted(sizes.values(), reverse=True)[:at_once])


def _held(path: Path, shared: bool) -> IO[bytes]:
    """A lock, once no other process holds it."""
    while (lock := hold_file(path, shared=shared, wait=False)) is None:
        time.sleep(POLL_SECONDS)  # not in the kernel: signals are handled meanwhile
    return lock


def _key(path: Path) -> str:
    """The key of a file, or of the hidden file of a download, ``.<key><suffix>.<process>.tmp``."""
    return path.name.lstrip(".").partition(".")[0]


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{_key(path)}.lock")


def _record_of(entry: Path) -> Path:
    return entry.with_name(f"{_key(entry)}.json")


def _last_use(path: Path) -> tuple[bool, int]:
    """Order of removal: what killed processes left first, then by the time of the last use."""
    return not path.name.startswith("."), files.stamp(_lock_of(path))[1]


def _up(size: int) -> str:
    """GB, rounded up to the next tenth."""
    return f"{-(-size * 10 // GB) / 10:g}"
