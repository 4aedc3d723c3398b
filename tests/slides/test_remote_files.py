"""Files of object stores: names, downloads with faults, and the cache that processes share."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from forked import exit_codes, fork
from store_server import Store, serving

from dino.errors import CacheError, ConfigError, DataError
from dino.slides import remote, remote_cache
from dino.slides.remote import (
    RemoteFile,
    StoreError,
    find_remote,
    look_up,
    parse_location,
    redacted,
    sizes_of,
    try_look_up,
)
from dino.slides.remote_cache import SlideCache

CONTENT = np.random.default_rng(0).integers(0, 256, 60_000, dtype=np.uint8).tobytes()
SIGNED = "?X-Amz-Credential=KEY&X-Amz-Signature=SECRET"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    pytest.importorskip("aiohttp", reason="needs the extra [remote]")
    folder = tmp_path_factory.mktemp("store")
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(remote, "PIECE", 10_000)
    monkeypatch.setattr(remote, "PROGRESS", 10_000)
    monkeypatch.setattr(remote_cache, "_failed", {})
    monkeypatch.setattr(remote, "_down", {})


def put(store: Store, name: str, content: bytes = CONTENT) -> None:
    (store.folder / name).write_bytes(content)


def at(store: Store, fault: str, name: str, query: str = "") -> RemoteFile:
    found = parse_location(f"{store.address}/{fault}/{name}{query}")
    assert isinstance(found, RemoteFile)
    return found


def names(folder: Path) -> set[str]:
    """Files of a cache without its locks."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_uris_are_told_from_paths() -> None:
    assert parse_location("slides/a.svs") == Path("slides/a.svs")
    assert parse_location("file:///data/a%20b.svs") == Path("/data/a b.svs")
    found = parse_location("https://user:word@host:8080/x/a%20b.svs?token=SECRET#top")
    assert isinstance(found, RemoteFile) and str(found) == "https://host:8080/x/a%20b.svs"
    assert (found.name, found.stem, found.suffix, found.scheme) == ("a b.svs", "a b", ".svs", "https")
    assert "SECRET" not in repr(found) and "word" not in repr(found)
    assert str(parse_location("s3://bucket/odd?name#1.svs")) == "s3://bucket/odd?name#1.svs"
    for bad in ("ftp://host/a.svs", "s3://", "https:///"):
        with pytest.raises(DataError, match="expected a path or a URI"):
            parse_location(bad)


def test_signatures_do_not_identify_a_file_but_other_queries_do() -> None:
    def identity(query: str) -> str:
        found = parse_location(f"https://host/a.svs{query}")
        assert isinstance(found, RemoteFile)
        return found.identity

    assert identity("?X-Amz-Signature=1&X-Amz-Date=2") == identity("?X-Amz-Signature=3") == identity("")
    assert identity("?sv=1&se=2&sig=3") == identity("?Expires=1&Signature=2&Key-Pair-Id=3")
    assert len({identity("?id=1"), identity("?id=2"), identity("")}) == 3


def test_messages_contain_no_credentials() -> None:
    text = "404, message='Not Found', url='https://me:word@host/a.svs?X-Amz-Signature=SECRET&b=1'"
    assert redacted(text) == "404, message='Not Found', url='https://host/a.svs'"


@pytest.mark.parametrize("fault", ["plain", "whole", "truncated", "reset", "silent", "busy"])
def test_faults_are_waited_for_and_downloads_go_on_where_they_ended(store: Store, tmp_path: Path, fault: str) -> None:
    put(store, f"{fault}.tiff")
    with SlideCache(str(tmp_path)).local_path(at(store, fault, f"{fault}.tiff")) as path:
        assert path.read_bytes() == CONTENT and path.suffix == ".tiff"
    asked = store.requests("GET", f"/{fault}/{fault}.tiff")
    if fault == "truncated":  # each answer ends halfway; what it brought is not asked for again
        assert len(asked) > 2 and asked == sorted(asked) and asked[-1] >= len(CONTENT) // 2
    assert len([name for name in names(tmp_path) if name.endswith(".tiff")]) == 1
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_a_slow_connection_is_given_up_and_the_next_one_goes_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SLOW_SECONDS", 0.4)
    put(store, "drip.tiff")
    with SlideCache(str(tmp_path)).local_path(at(store, "drip", "drip.tiff")) as path:
        assert path.read_bytes() == CONTENT
    first, second = store.requests("GET", "/drip/drip.tiff")
    assert first == 0 and 0 < second < 30_000


@pytest.mark.parametrize(("status", "words"), [("403", "check the credentials"), ("404", "check the address")])
def test_what_is_not_there_fails_at_once_and_without_credentials(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, words: str
) -> None:
    put(store, "a.tiff")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: pytest.fail("an attempt was repeated"))
    cache = SlideCache(str(tmp_path))
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{status} .*{words}") as error:
            cache.local_path(at(store, status, "a.tiff", SIGNED))
        assert "SECRET" not in str(error.value) and f"/{status}/a.tiff" in str(error.value)
    assert len(store.requests("GET", f"/{status}/a.tiff")) <= 1  # the second time it is known
    assert names(tmp_path) == set()


def test_a_server_that_goes_on_failing_is_given_up(store: Store, tmp_path: Path) -> None:
    put(store, "a.tiff")
    with pytest.raises(StoreError, match=r"status 500 .*6 attempts in a row"):
        SlideCache(str(tmp_path)).local_path(at(store, "500", "a.tiff"))
    nowhere = parse_location("http://127.0.0.1:9/a.tiff")
    assert isinstance(nowhere, RemoteFile)
    with pytest.raises(StoreError, match="attempts in a row"):
        SlideCache(str(tmp_path)).local_path(nowhere)
    assert sizes_of([nowhere, at(store, "plain", "a.tiff")]) == {at(store, "plain", "a.tiff"): len(CONTENT)}


def test_a_store_that_is_down_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def silent(file: RemoteFile) -> None:
        asked.append(file.name)
        raise StoreError("silence", permanent=False)

    monkeypatch.setattr(remote, "look_up", silent)
    monkeypatch.setattr(remote, "_down", {})
    for name in "abc":
        assert try_look_up(RemoteFile(f"s3://down/{name}.svs", "")) is None
    assert asked == ["a.svs"] * remote.ATTEMPTS + ["b.svs", "c.svs"]
    assert try_look_up(RemoteFile("s3://other/a.svs", "")) is None
    assert asked.count("a.svs") == 2 * remote.ATTEMPTS  # another store is waited for


def test_processes_that_ask_for_one_file_download_it_once(store: Store, tmp_path: Path) -> None:
    put(store, "shared.tiff")
    cache, file = SlideCache(str(tmp_path)), at(store, "drip", "shared.tiff")

    def ask() -> None:
        with cache.local_path(file) as path:
            assert path.read_bytes() == CONTENT

    assert exit_codes([fork(ask) for _ in range(3)]) == [0, 0, 0]
    assert store.requests("GET", "/drip/shared.tiff") == [0]


def test_a_killed_download_leaves_nothing_that_is_read(store: Store, tmp_path: Path) -> None:
    put(store, "killed.tiff")
    cache, file = SlideCache(str(tmp_path)), at(store, "drip", "killed.tiff")
    process = fork(lambda: cache.local_path(file))
    until = time.monotonic() + 30
    while not list(tmp_path.glob(".*.tmp")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert list(tmp_path.glob(".*.tmp")) and not cache.has(file)
    with cache.local_path(file) as path:
        assert path.read_bytes() == CONTENT
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_least_recently_used_files_are_removed_but_none_in_use(store: Store, tmp_path: Path) -> None:
    for name in "abcd":
        put(store, f"{name}.tiff")
    cache = SlideCache(str(tmp_path), gigabytes=3.5 * len(CONTENT) / 1e9)
    files = {name: at(store, "plain", f"{name}.tiff") for name in "abcd"}
    held = cache.local_path(files["a"])  # the oldest, but open
    for name in "bcb":  # b is used again after c
        cache.local_path(files[name]).close()
        time.sleep(0.02)
    cache.local_path(files["d"]).close()
    assert {name for name, file in files.items() if cache.has(file)} == {"a", "b", "d"}
    assert held.path.read_bytes() == CONTENT
    held.close()
    cache.local_path(files["c"]).close()
    assert {name for name, file in files.items() if cache.has(file)} == {"b", "c", "d"}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tiff")) <= cache.limit
    assert SlideCache(str(tmp_path)).limit == cache.limit  # as it was last given


def test_a_cache_full_of_files_in_use_is_an_error_of_the_cache(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_cache, "WAIT_SECONDS", 0.1)
    for name in "xy":
        put(store, f"{name}.tiff")
    cache = SlideCache(str(tmp_path), gigabytes=1.5 * len(CONTENT) / 1e9)
    with cache.local_path(at(store, "plain", "x.tiff")), pytest.raises(CacheError, match="in use"):
        cache.local_path(at(store, "plain", "y.tiff"))
    with cache.local_path(at(store, "plain", "y.tiff")) as path:
        assert path.read_bytes() == CONTENT
    small = SlideCache(str(tmp_path / "small"), gigabytes=0.5 * len(CONTENT) / 1e9)
    with pytest.raises(CacheError, match="found a limit of"):
        small.local_path(at(store, "plain", "x.tiff"))
    with pytest.raises(ConfigError, match="slide_cache_gb"):
        _ = SlideCache(str(tmp_path), gigabytes=0).limit
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="expected to write to the slide cache"):
        SlideCache(str(tmp_path / "file")).local_path(at(store, "plain", "x.tiff"))


def test_a_file_that_changed_is_downloaded_again_where_that_is_checked(store: Store, tmp_path: Path) -> None:
    put(store, "changed.tiff")
    cache, file = SlideCache(str(tmp_path)), at(store, "plain", "changed.tiff")
    cache.local_path(file).close()
    put(store, "changed.tiff", CONTENT[::-1])
    with cache.local_path(file) as path:
        assert path.read_bytes() == CONTENT
    with cache.local_path(file, check=True) as path:
        assert path.read_bytes() == CONTENT[::-1]
    path.write_bytes(b"damaged")  # of another size than recorded
    with cache.local_path(file) as path:
        assert path.read_bytes() == CONTENT[::-1]


def test_any_file_system_of_fsspec_that_is_listed_is_read_and_searched(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("one.svs", "deep/two.svs", "notes.txt"):
        memory.pipe(f"/bucket/{name}", CONTENT)
    found = find_remote("memory://bucket/", [".svs"])
    assert [str(file) for file in found] == ["memory://bucket/deep/two.svs", "memory://bucket/one.svs"]
    assert [file.stem for file in find_remote("memory://bucket/*.svs", [".svs"])] == ["one"]
    with SlideCache(str(tmp_path)).local_path(found[0]) as path:
        assert path.read_bytes() == CONTENT
    with pytest.raises(StoreError, match="no such file"):
        SlideCache(str(tmp_path)).local_path(RemoteFile("memory://bucket/none.svs", "memory://bucket/none.svs"))
    with pytest.raises(DataError, match="one file"):
        SlideCache(str(tmp_path)).local_path(RemoteFile("memory://bucket/a.mrxs", "memory://bucket/a.mrxs"))
    with pytest.raises(DataError, match="found none"):
        find_remote("memory://bucket/*.ndpi", [".ndpi"])


@pytest.mark.parametrize("fault", ["plain", "busy"])
def test_s3(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    pytest.importorskip("s3fs", reason="needs the extra [s3]")
    options = {"endpoint_url": store.address, "key": "KEY", "secret": "SECRET"}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    put(store, f"s3-{fault}.tiff")
    file = parse_location(f"s3://{fault}/s3-{fault}.tiff")
    assert isinstance(file, RemoteFile)
    with SlideCache(str(tmp_path)).local_path(file) as path:
        assert path.read_bytes() == CONTENT
    assert len(store.requests("GET", f"/{fault}/s3-{fault}.tiff")) >= len(CONTENT) / 10_000  # in pieces
    for bucket, words in (("404", "no such file|404"), ("403", "check the credentials")):
        with pytest.raises(StoreError, match=words) as error:
            SlideCache(str(tmp_path)).local_path(RemoteFile(f"s3://{bucket}/x", f"s3://{bucket}/x"))
        assert "SECRET" not in str(error.value) and "attempts" not in str(error.value)
    assert f"s3://plain/s3-{fault}.tiff" in map(str, find_remote("s3://plain/*.tiff", [".tiff"]))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri, package, extra in (("https://host/a.svs", "aiohttp", "remote"), ("s3://bucket/a.svs", "s3fs", "s3")):
        file = parse_location(uri)
        assert isinstance(file, RemoteFile)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"pip install 'histodino\[{extra}\]'"):
            look_up(file)
