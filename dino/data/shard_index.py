"""Where each tile lies in the shards of a folder: found once, kept beside the shards, and mapped into memory.

``<cache>/<kind>.json`` contains the key and what is damaged, ``<kind>-<key>.<array>.npy`` the arrays: 16 bytes and the
name of each tile. The key is a hash of names, sizes and modification times of the shards, so that the index is made
again after any change.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dino import progress
from dino.data.caches import cache_folders, locked
from dino.data.datasets import SlideRanges, slide_of
from dino.data.images import END, SEPARATOR, Names, walk
from dino.errors import DataError
from dino.files import atomic_path, printable, read_json, stamp, write_json

FORMAT = 1
PLACE = np.dtype([("shard", "<i4"), ("first", "<i8"), ("second", "<i4")])
ABSENT = -1  # as `first`: the tile is listed, but not in its shard
ARRAYS = ("places", "names", "ends", "slides", "slide_ends", "starts")


@dataclass(frozen=True)
class Shards:
    """The shards of a folder.

    Attributes:
        kind: ``tar`` or ``parquet``.
        root: The folder.
        paths: Their paths in it, in a fixed order.
        listed: Paths of files that list what is in them.
    """

    kind: str
    root: Path
    paths: Sequence[str]
    listed: Sequence[str] = ()

    @cached_property
    def stamps(self) -> list[tuple[int, int]]:
        """Size and modification time of each shard, as they were at the first access."""
        return [stamp(self.root / path) for path in self.paths]

    @cached_property
    def key(self) -> str:
        """Hash of everything that an index depends on, as it was at the first access."""
        stamps = [*self.stamps, *(stamp(self.root / path) for path in self.listed)]
        digest = hashlib.sha256(f"{FORMAT} {self.kind}".encode())
        for path, one in zip((*self.paths, *self.listed), stamps, strict=True):
            digest.update(os.fsencode(path) + f"\0{one}\0".encode())
        return digest.hexdigest()[:32]


@dataclass
class Found:
    """The tiles found in a shard.

    Attributes:
        names: Name of each.
        first: Where each begins; arrays, since numbers in lists take five times the memory.
        second: Where it ends, or is within what begins there.
        damage: What is wrong with the shard, if anything.
    """

    names: list[str] = field(default_factory=list)
    first: "array[int]" = field(default_factory=lambda: array("q"))
    second: "array[int]" = field(default_factory=lambda: array("q"))
    damage: str = ""

    def add(self, name: str, first: int, second: int) -> None:
        """Add a tile."""
        self.names.append(name)
        self.first.append(first)
        self.second.append(second)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The tiles of shards, sorted by name as the files of a folder are.

    Attributes:
        names: Name of each.
        places: ``(N,)`` of :data:`PLACE`: number of the shard, and where the tile is in it.
        ranges: Their slides.
        damage: What is wrong with shards, by their paths.
        source: The cache folder that contains it, and the shards; None if it is in memory only.
    """

    names: Names
    places: np.ndarray
    ranges: SlideRanges
    damage: dict[str, str]
    source: tuple[Path, Shards] | None = None

    def without(self, slides: Container[str | None]) -> "ShardIndex":
        """The index without the tiles of some slides; it is in memory only."""
        kept = [i for i, slide in enumerate(self.ranges.slide_ids) if slide not in slides]
        if len(kept) == len(self.ranges.slide_ids):
            return self
        starts = self.ranges.starts
        rows = [slice(int(starts[i]), int(starts[i + 1])) for i in kept]
        block, ends = self.names.block
        spans = [slice(int(ends[row.start - 1]) if row.start else 0, int(ends[row.stop - 1])) for row in rows]
        lengths = np.diff(ends, prepend=0)
        ranges = SlideRanges(
            [self.ranges.slide_ids[i] for i in kept],
            np.cumsum([0, *(row.stop - row.start for row in rows)], dtype=np.int64),
        )
        return replace(
            self,
            names=Names.of_block(_joined(block, spans), np.cumsum(_joined(lengths, rows))),
            places=_joined(self.places, rows),
            ranges=ranges,
            source=None,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself."""
        if self.source is not None:
            return _reopened, self.source
        return ShardIndex, (self.names, self.places, self.ranges, self.damage)


def _reopened(cache: Path, shards: Shards) -> ShardIndex:
    index = read_index(cache, shards)
    if index is None:
        raise DataError(
            f"expected the index of {shards.root} in {cache}, found that it was replaced; start the command again"
        )
    return index


def _joined(values: np.ndarray, pieces: Sequence[slice]) -> np.ndarray:
    return np.concatenate([values[piece] for piece in pieces]) if pieces else values[:0]


def find_shards(root: Path, suffix: str) -> list[str]:
    """Path within ``root`` of every file of a suffix that is not hidden, sorted."""
    found = [prefix + name for prefix, shown in walk(root) for name in shown if name.lower().endswith(suffix)]
    return [name.replace(SEPARATOR, os.sep) for name in sorted(found)]


def open_index(shards: Shards, members: Callable[[int], Found], cache_dir: str, *, may_write: bool) -> ShardIndex:
    """The index of shards: from the first cache folder that contains it, else made and written to the first possible.

    Args:
        shards: The shards.
        members: Returns what is in the shard of a number.
        cache_dir: Where it is kept: ``auto``, ``none`` or a folder.
        may_write: Whether it may be written.

    Raises:
        DataError: If a shard cannot be used, or two tiles have one name.
    """
    caches = cache_folders(shards.root, cache_dir)
    for cache in caches:
        found = read_index(cache, shards)
        if found is not None:
            return found
    for cache in caches if may_write else ():
        try:
            with locked(cache, "indexing shards") as alone:
                return read_index(cache, shards) or _make(cache, shards, members, tidy=alone)
        except OSError as error:
            progress.say(f"the index of shards cannot be written to {printable(cache)}: {printable(error)}")
    return build_index(shards, members)


def read_index(cache: Path, shards: Shards) -> ShardIndex | None:
    """The index of exactly these shards in a cache folder; None if there is none, or it is damaged."""
    try:
        facts = read_json(cache / f"{shards.kind}.json")
        if facts["key"] != shards.key:
            return None
        arrays = {name: np.load(_array(cache, shards, name), mmap_mode="r") for name in ARRAYS}
        names = Names.of_block(arrays["names"], arrays["ends"])
        slides = [slide or None for slide in Names.of_block(arrays["slides"], arrays["slide_ends"])]
        ranges, places = SlideRanges(slides, arrays["starts"]), arrays["places"]
        whole = len(arrays["names"]) == arrays["ends"][-1] and len(names) == len(places) == ranges.starts[-1]
        if not whole or places.dtype != PLACE or len(slides) + 1 != len(ranges.starts):
            return None
        return ShardIndex(names, places, ranges, dict(facts["damage"]), (cache, shards))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _array(cache: Path, shards: Shards, name: str) -> Path:
    return cache / f"{shards.kind}-{shards.key}.{name}.npy"


def _make(cache: Path, shards: Shards, members: Callable[[int], Found], *, tidy: bool) -> ShardIndex:
    """Make and write the index.

    Raises:
        OSError: If it cannot be written.
    """
    for old in (*cache.glob(f"{shards.kind}-*.npy"), *(cache.glob(f".{shards.kind}*.tmp") if tidy else ())):
        with suppress(OSError):  # a run that has mapped it can still read it
            old.unlink()
    made = build_index(shards, members)
    slides = Names(slide or "" for slide in made.ranges.slide_ids)
    arrays = (made.places, *made.names.block, *slides.block, made.ranges.starts)
    for name, values in zip(ARRAYS, arrays, strict=True):
        with atomic_path(_array(cache, shards, name)) as temporary, temporary.open("wb") as file:
            np.save(file, values)
    write_json(cache / f"{shards.kind}.json", {"key": shards.key, "damage": made.damage})
    index = read_index(cache, shards)
    if index is None:
        raise OSError("it cannot be read back")
    return index


def build_index(shards: Shards, members: Callable[[int], Found]) -> ShardIndex:
    """Make the index in memory.

    Args:
        shards: The shards.
        members: Returns what is in the shard of a number.

    Raises:
        DataError: If a shard cannot be used, or two tiles have one name.
    """
    shards.key  # noqa: B018 - taken first: a shard that changes from here on invalidates the index
    found = []
    with progress.bar("index shards", len(shards.paths)) as bar:
        for number in range(len(shards.paths)):
            found.append(members(number))
            bar.advance()
    damage = {path: one.damage for path, one in zip(shards.paths, found, strict=True) if one.damage}
    names = [name for one in found for name in one.names]
    if not names:
        where = f"the {len(found)} .{shards.kind} files under {printable(shards.root)}"
        reasons = [f"{printable(path)}: {reason}" for path, reason in list(damage.items())[:3]]
        raise DataError("; ".join([f"expected tiles in {where}, found none", *reasons]))
    if len(set(names)) < len(names):  # each shard counts by itself, as WebDataset allows
        prefixes = [os.path.splitext(path)[0] for path in shards.paths]  # noqa: PTH122 - a name, not a file
        names = [f"{prefix}/{name}" for prefix, one in zip(prefixes, found, strict=True) for name in one.names]
    # Not a key of each name beside it: these texts take most of the memory.
    order = sorted(range(len(names)), key=lambda i: names[i].replace(os.sep, SEPARATOR))
    _check_names(names, order)
    places = np.zeros(len(names), PLACE)
    places["shard"] = np.repeat(np.arange(len(found)), [len(one.names) for one in found])
    places["first"] = np.concatenate([np.asarray(one.first) for one in found])
    places["second"] = np.concatenate([np.asarray(one.second) for one in found])
    ordered = Names(names[i] for i in order)
    ranges = SlideRanges.of(slide_of(name) for name in ordered)
    return ShardIndex(ordered, places[order], ranges, damage)


def _check_names(names: Sequence[str], order: Iterable[int]) -> None:
    before = None
    for index in order:
        name = names[index]
        if name == before or END in name:
            wrong = "twice" if name == before else "with a zero byte in it"
            raise DataError(f"expected each tile of the shards once and under a name, found {printable(name)} {wrong}")
        before = name


def damage_of(index: ShardIndex) -> list[str]:
    """A warning if shards are damaged."""
    if not index.damage:
        return []
    (path, reason), more = next(iter(index.damage.items())), len(index.damage) - 1
    others = f", and {more} other damaged shards" if more else ""
    return [f"{printable(path)}{others}: {reason}; copy them again, or train on the tiles that are readable"]
