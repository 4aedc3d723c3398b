"""Files of object stores and web servers: how they are named, and how sizes and bytes are read, through fsspec."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

from dino.environment import import_extra
from dino.errors import DataError, DinoError

URI = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
WEB = ("http", "https")
# The packages that each scheme needs beside fsspec, and the extra that installs them.
PACKAGES = {
    "s3": [("s3fs", "s3")],
    "gs": [("gcsfs", "gs")],
    **{scheme: [("aiohttp", "remote")] for scheme in WEB},
    "memory": [],
}
# Parameters of signed URLs, which differ each time that one is made: AWS, Google, CloudFront and Azure.
SIGNATURE = re.compile(
    r"x-(amz|goog)-.*|awsaccesskeyid|googleaccessid|signature|expires|key-pair-id|policy"
    r"|s(ig|e|p|v|r|t|pr|ip|kt|ke|ks|kv|koid|ktid)",
    re.IGNORECASE,
)
SEVERAL_FILES = {".mrxs", ".vms", ".vmu"}  # formats whose slides are more than one file
PIECE = 2**22  # bytes that are read at a time
PROGRESS = 2**20  # bytes after which the attempts are counted anew
ATTEMPTS = 6  # in a row that bring nothing new
FIRST_PAUSE_SECONDS = 1.0  # before the second attempt; doubled before each further one
SILENCE_SECONDS = 60.0  # without a byte, after which a connection is given up
SLOW_SECONDS, SLOW_BYTES = 60.0, 2**19  # a connection that brings less in that time is given up too
DOWN_SECONDS = 600.0  # for which a store that did not answer is not waited for again
CONNECTIONS = 32  # of looking up many sizes
PASSING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)  # of 4xx
_down: dict[str, float] = {}  # stores that did not answer, and when


class StoreError(DataError):
    """A file of a store that cannot be read.

    Attributes:
        permanent: Whether another attempt is useless.
    """

    def __init__(self, message: str, permanent: bool) -> None:
        super().__init__(message)
        self.permanent = permanent


@dataclass(frozen=True)
class RemoteFile:
    """A file of an object store or a web server.

    Attributes:
        address: Its URI without user, password and query, which may be credentials: for tables and messages.
        uri: Its complete URI.
    """

    address: str
    uri: str = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Its name without folders."""
        return self._path.name

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return self._path.stem

    @property
    def suffix(self) -> str:
        """Its suffix, with the dot."""
        return self._path.suffix

    @property
    def scheme(self) -> str:
        """``s3``, ``gs``, ``http``, ``https`` or ``memory``."""
        return self.address.partition("://")[0]

    @property
    def identity(self) -> str:
        """Its URI without credentials: the same each time that it is signed."""
        if self.scheme not in WEB:
            return self.address
        query = parse_qsl(urlsplit(self.uri).query, keep_blank_values=True)
        return "\n".join([self.address, *(f"{name}={value}" for name, value in query if not SIGNATURE.fullmatch(name))])

    @property
    def _path(self) -> PurePosixPath:
        path = self.address.partition("://")[2]
        return PurePosixPath(unquote(path) if self.scheme in WEB else path)

    def __str__(self) -> str:
        """Its address."""
        return self.address


Location: TypeAlias = Path | RemoteFile


def is_uri(text: object) -> bool:
    """Whether a text is a URI, not a path."""
    return isinstance(text, str) and URI.match(text) is not None


def parse_location(text: str | Path) -> Location:
    """A path, or the file that a URI names; ``file://`` is a path.

    Raises:
        DataError: If the scheme is not supported.
    """
    match = URI.match(text) if isinstance(text, str) else None
    if match is None or not isinstance(text, str):
        return Path(text)
    scheme, rest = match[1].lower(), text[match.end() :]
    if scheme == "file":
        return Path(url2pathname(urlsplit(text).path))
    if scheme not in PACKAGES or not rest.strip("/"):
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise DataError(f"expected a path or a URI ({known}), found {redacted(text)}")
    if scheme in WEB:
        parts = urlsplit(text)
        address = urlunsplit((scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    else:
        address = f"{scheme}://{rest}"
    return RemoteFile(address, text)


def redacted(text: str) -> str:
    """A text in which URIs have neither user and password nor query."""
    text = re.sub(r"(?<=://)[^/\s@]*@", "", text)
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)


@dataclass(frozen=True)
class Stored:
    """What a store tells of a file: its size in bytes, and its version (ETag or time of modification, if any)."""

    size: int
    version: str


def look_up(file: RemoteFile) -> Stored:
    """Size and version of a file, in one attempt.

    Raises:
        StoreError: If there is no such file, it may not be read, or the store does not answer.
        ConfigError: If the package that reads its scheme is not installed.
    """
    with _errors_of(file):
        info = _filesystem(file).info(file.uri)
    if info.get("type") == "directory":
        raise StoreError(f"expected a file at {file}, found a folder", permanent=True)
    if info.get("size") is None:
        raise StoreError(f"expected {file} with its size, found that the server does not tell it", permanent=True)
    versions = ("ETag", "etag", "Last-Modified", "LastModified", "updated", "created")
    return Stored(int(info["size"]), next((str(info[name]) for name in versions if info.get(name)), ""))


def sizes_of(files: Iterable[RemoteFile]) -> dict[RemoteFile, int]:
    """Sizes in bytes of those files whose size can be looked up, several at a time."""
    files = list(dict.fromkeys(files))

    with ThreadPoolExecutor(min(CONNECTIONS, len(files)) or 1) as pool:
        found = pool.map(try_look_up, files)
        return {file: one.size for file, one in zip(files, found, strict=True) if one is not None}


def try_look_up(file: RemoteFile) -> Stored | None:
    """Size and version of a file, None if they cannot be had.

    A store that did not answer for one file is asked once only for others: else a list of many slides on a store that
    is down would take hours.
    """
    store = file.address.split("/")[2]
    is_down = time.monotonic() - _down.get(store, -DOWN_SECONDS) < DOWN_SECONDS
    try:
        return look_up(file) if is_down else with_attempts(file, lambda: look_up(file))
    except StoreError as error:
        if not error.permanent:
            _down[store] = time.monotonic()
        return None


def find_remote(text: str, suffixes: Iterable[str]) -> list[RemoteFile]:
    """The files that a URI names: one, those that match a pattern, or the slides below a folder (``…/``).

    Raises:
        DataError: If there are none, or a web server is asked for a list of files.
        ConfigError: If the package that reads its scheme is not installed.
    """
    file = parse_location(text)
    assert isinstance(file, RemoteFile)
    if file.suffix.lower() == ".csv":
        raise DataError(f"expected a slide or a folder of slides, found {file}; download lists of slides first")
    if file.scheme in WEB or not (text.endswith("/") or set(text) & set("*[")):
        if text.endswith("/"):
            raise DataError(f"expected the address of a slide, found {file}: web servers list no files; name each one")
        return [file]
    with _errors_of(file):
        system = _filesystem(file)
        system.invalidate_cache()  # of earlier lists
        found = system.find(text) if text.endswith("/") else system.glob(text)
    names = sorted(f"{file.scheme}://{name.lstrip('/')}" for name in found)
    slides = [parse_location(name) for name in names if PurePosixPath(name).suffix.lower() in suffixes]
    if not slides:
        raise DataError(f"expected slides ({', '.join(sorted(suffixes))}) at {file}, found none")
    return [slide for slide in slides if isinstance(slide, RemoteFile)]


def with_attempts(file: RemoteFile, work: Callable[[], Any], brought: Callable[[], int] = lambda: 0) -> Any:
    """Result of ``work``, which is repeated with growing pauses until it succeeds, or fails permanently.

    Args:
        file: The file, for the message.
        work: Raises StoreError if it fails.
        brought: Bytes that were brought so far; an attempt that brings enough does not count.

    Raises:
        StoreError: If it failed permanently, or too often.
    """
    failed, best = 0, 0
    while True:
        try:
            return work()
        except StoreError as error:
            if brought() >= best + PROGRESS:
                failed, best = 0, brought()
            failed += 1
            if error.permanent:
                raise
            if failed == ATTEMPTS:
                raise StoreError(f"{error} ({ATTEMPTS} attempts in a row)", permanent=False) from None
        time.sleep(FIRST_PAUSE_SECONDS * 2 ** (failed - 1))


def download(file: RemoteFile, target: Path, stored: Stored) -> Stored:
    """Download a file, going on where a connection ended.

    Args:
        file: The file.
        target: An existing file, which is overwritten.
        stored: What the store tells of the file.

    Returns:
        The same for what was downloaded, which differs if the file changed meanwhile.

    Raises:
        StoreError: If the file cannot be read.
        OSError: If ``target`` cannot be written.
    """
    state: dict[str, Any] = {"stored": stored, "position": 0, "attempts": 0}

    def attempt(output: BinaryIO) -> Stored:
        now = look_up(file) if state["attempts"] else stored
        state["attempts"] += 1
        if now != state["stored"]:
            state.update(stored=now, position=0)
        for start, piece in _pieces(file, state["position"], now):
            output.seek(start)
            output.write(piece)
            state["position"] = start + len(piece)
        if state["position"] != now.size:
            raise StoreError(
                f"expected {now.size:,} bytes of {file}, found {state['position']:,}: the connection ended early",
                permanent=False,
            )
        output.truncate(now.size)
        return now

    with target.open("r+b", buffering=0) as output:
        return with_attempts(file, lambda: attempt(output), lambda: state["position"])


def _pieces(file: RemoteFile, position: int, stored: Stored) -> Iterator[tuple[int, bytes]]:
    """Positions and bytes of a file from a position on, or from 0 if the server does not send parts of files."""
    with _errors_of(file):
        stream, start = _open(file, position, stored)
    try:
        since, counted = time.monotonic(), 0
        while start < stored.size:
            with _errors_of(file):
                piece = stream.read(min(PIECE, stored.size - start))
            if not piece:
                return
            yield start, piece
            start, counted = start + len(piece), counted + len(piece)
            if time.monotonic() - since > SLOW_SECONDS:
                if counted < SLOW_BYTES:
                    raise StoreError(
                        f"expected {file} faster than {SLOW_BYTES / SLOW_SECONDS / 1000:.0f} kB/s, found "
                        f"{counted:,} bytes in {SLOW_SECONDS:g} s",
                        permanent=False,
                    )
                since, counted = time.monotonic(), 0
    finally:
        stream.close()


def _open(file: RemoteFile, position: int, stored: Stored) -> tuple[Any, int]:
    """A stream of a file, and where in the file it starts."""
    system = _filesystem(file)
    if file.scheme not in WEB:
        stream = system.open(file.uri, "rb", block_size=PIECE, cache_type="none")
        stream.seek(position)
        return stream, position
    headers = {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if position:
        headers["Range"] = f"bytes={position}-"
        if stored.version.startswith('"'):  # a strong ETag: of a changed file the server sends all
            headers["If-Range"] = stored.version
    stream = system.open(file.uri, "rb", block_size=0, size=stored.size, headers=headers)  # 0: one request
    return stream, position if stream.r.status == HTTPStatus.PARTIAL_CONTENT else 0


def _filesystem(file: RemoteFile) -> Any:
    """Fsspec's file system of a file; credentials and endpoints are those of its package and fsspec's configuration."""
    fsspec = import_extra("fsspec", f"{file.scheme}:// files", "remote")
    needed = [import_extra(package, f"{file.scheme}:// files", extra) for package, extra in PACKAGES[file.scheme]]
    options: dict[str, Any] = {}
    if file.scheme in WEB and "client_kwargs" not in fsspec.config.conf.get(file.scheme, {}):
        timeout = needed[0].ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies and .netrc
    return fsspec.filesystem(file.scheme, **options)


@contextmanager
def _errors_of(file: RemoteFile) -> Iterator[None]:
    """Turn errors of a store, which have many types, into StoreError without credentials."""
    try:
        yield
    except DinoError:
        raise
    except Exception as error:
        reason, permanent = _explained(error)
        raise StoreError(f"expected to read {file}, found {reason}", permanent) from None


def _explained(error: BaseException) -> tuple[str, bool]:
    """What happened, and whether it is permanent."""
    status = _status(error)
    if status is not None:
        phrase = next((one.phrase for one in HTTPStatus if one == status), "unknown")
        permanent = 400 <= status < 500 and status not in PASSING
        advice = {401: "; check the credentials", 403: "; check the credentials", 404: "; check the address"}
        return f"status {status} ({phrase})" + advice.get(status, ""), permanent
    if isinstance(error, FileNotFoundError):
        if error.__cause__ is not None:  # fsspec raises it whatever the reason for which a web server did not answer
            return _explained(error.__cause__)
        return "no such file; check the address", True
    if isinstance(error, PermissionError):
        return "no permission; check the credentials", True
    if "Credentials" in type(error).__name__:  # of botocore and google.auth
        return "no credentials; set them as the store's own tools expect them", True
    return redacted(" ".join(str(error).split())) or type(error).__name__, False


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or one that caused it, is about."""
    while error is not None:
        response = getattr(error, "response", None)  # of botocore
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
        of_google = type(error).__module__.partition(".")[0] in ("gcsfs", "google")  # others have codes of other things
        code = getattr(error, "code", None) if of_google else None
        for value in (getattr(error, "status", None), code, metadata.get("HTTPStatusCode")):
            if isinstance(value, int) and 400 <= value < 600:
                return value
        error = error.__cause__
    return None
