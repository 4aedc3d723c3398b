"""Tiles in shards: tar files, as ``dino tile storage=tar`` and WebDataset write them, and parquet files.

Each tile is read where it lies; nothing is unpacked or copied. Where that is, is looked up in the shards' index.
"""

import csv
import os
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from torch import Tensor

from dino.data.datasets import ChangedData, EncodedTiles, SlideRanges
from dino.data.images import LARGEST_BYTES, SUFFIXES, Names, decode_bytes, walk
from dino.data.shard_index import ABSENT, Found, ShardIndex, Shards, find_shards, open_index
from dino.environment import import_extra
from dino.errors import ConfigError, DataError
from dino.files import printable
from dino.slides.tables import TILES_FOLDER

TAR, PARQUET = "tar", "parquet"
OPEN_SHARDS = 64  # that each process keeps open
GROUP_BYTES = 64 * 2**20  # of row groups that each process keeps, besides the last one
LARGEST_GROUP = 2**28  # bytes of tiles in a row group that is read for one of them
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
OF_SLIDE, MANIFEST = ".tiles.tar", ".tiles.manifest.csv"  # as hs2p names them
DAMAGED = "it is cut off or damaged after"
IMAGE_COLUMNS = ("jpeg", "image")
PLACE_COLUMNS = ("slide_id", "x", "y")
OF_LEVEL = re.compile(
    r"(?P<folder>(?:.*/)?)(?P<slide>[^/]+)/(?P<x>\d+)_(?P<y>\d+)_(?P<level>\d{1,2})(?P<suffix>\.\w+)", re.DOTALL
)


def shard_folder(root: Path, *, tiled: bool, kind: str) -> Path:
    """The folder of the shards of a data folder: that in which ``dino tile`` writes them, else itself."""
    return root / TILES_FOLDER / {TAR: "tars", PARQUET: "parquet"}[kind] if tiled else root


def shard_kind(root: Path) -> str | None:
    """The kind of the shards in a folder without images; None if it has images, or no shards.

    Raises:
        ConfigError: If there are shards of two kinds.
    """
    kinds = set()
    for _, names in walk(root):
        suffixes = {os.path.splitext(name)[1].lower() for name in names}  # noqa: PTH122 - a Path takes 20 times as long
        if suffixes & SUFFIXES:
            return None
        kinds |= {kind for kind in (TAR, PARQUET) if f".{kind}" in suffixes}
        kinds |= {TAR for name in names if name.endswith(COMPRESSED)}
    if len(kinds) > 1:
        raise ConfigError(
            f"expected tar or parquet files in {printable(root)}, found both; add source=tar or source=parquet"
        )
    return next(iter(kinds), None)


class ShardTiles(EncodedTiles):
    """Tiles of the shards of a folder.

    Args:
        shards: The shards.
        index: Where each tile is in them.
    """

    kind: ClassVar[str]

    def __init__(self, shards: Shards, index: ShardIndex) -> None:
        self._shards, self._index = shards, index
        self._open: OrderedDict[int, Any] = OrderedDict()

    @property
    def names(self) -> Names:
        """Path of each tile, as if the shards were folders of files."""
        return self._index.names

    @property
    def ranges(self) -> SlideRanges:
        """Their slides."""
        return self._index.ranges

    def read(self, index: int) -> Tensor:
        """Decode a tile.

        Raises:
            DataError: If it cannot be decoded, or its shard cannot be read.
            ChangedData: If its shard has changed since it was indexed.
        """
        shard, first, second = self._index.places[index].tolist()
        path = self._shards.paths[shard]
        name = f"{path}: {self.names[index]}"
        if first == ABSENT:
            raise DataError(
                f"cannot use {printable(name)}: expected it in the shard, found that it is not; copy it again"
            )
        try:
            content = self._content(shard, first, second)
        except OSError as error:
            raise DataError(f"cannot read {printable(name)}: {printable(error)[:200]}") from None
        return decode_bytes(content, name)

    def content(self, index: int) -> bytes:
        """The bytes of the image file of a tile.

        Raises:
            OSError: If they cannot be read.
            DataError: If they are not as they were indexed.
        """
        return self._content(*self._index.places[index].tolist())

    def _content(self, shard: int, first: int, second: int) -> bytes:
        """The bytes of a tile in a shard; raises as :meth:`content`."""
        raise NotImplementedError

    def _check(self, shard: int, status: os.stat_result) -> None:
        """Raise ChangedData if a shard is not as it was indexed."""
        if (status.st_size, status.st_mtime_ns) != self._shards.stamps[shard]:
            path = printable(self._shards.root / self._shards.paths[shard])
            raise ChangedData(
                f"expected {path} as it was when it was indexed, found that it has changed; run the same command "
                "again, which indexes it again"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without open files."""
        return {**vars(self), "_open": OrderedDict()}


class TarTiles(ShardTiles):
    """Tiles in uncompressed tar files. A tile is read with one call at its offset, which processes share safely."""

    kind = TAR

    @property
    def sizes(self) -> np.ndarray:
        """Size of the image file of each tile in bytes, ``(N,)`` int32; 0 for those that are not in their shard."""
        return self._index.places["second"]

    def _content(self, shard: int, first: int, second: int) -> bytes:
        file = self._file(shard)
        self._check(shard, os.fstat(file.fileno()))
        if second > LARGEST_BYTES:
            raise DataError(f"expected a tile, found {second / 1e9:.1f} GB")
        content = os.pread(file.fileno(), second, first)
        if len(content) < second:
            raise OSError(f"{second} bytes were expected, {len(content)} are there: the shard is cut off")
        return content

    def _file(self, shard: int) -> BinaryIO:
        file = self._open.get(shard)
        if file is None:
            file = self._open[shard] = (self._shards.root / self._shards.paths[shard]).open("rb", buffering=0)
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return file


def open_tars(root: Path, cache_dir: str, *, of_slides: bool, may_write: bool) -> tuple[Shards, ShardIndex]:
    """Index the tar files of a folder.

    Args:
        root: The folder.
        cache_dir: Where the index is kept: ``auto``, ``none`` or a folder.
        of_slides: Whether ``dino tile`` wrote them, so that each needs its manifest.
        may_write: Whether the index may be written.

    Raises:
        DataError: If there are none, they are compressed, or one cannot be used.
    """
    paths = find_shards(root, ".tar")
    compressed = [path for suffix in COMPRESSED for path in find_shards(root, suffix)]
    if compressed:
        raise DataError(
            f"expected tar files that are not compressed in {printable(root)}, found {printable(compressed[0])}; "
            "tiles are compressed already: unpack it with gunzip, unxz or zstd -d"
        )
    if not paths:
        raise DataError(f"expected tar files in {printable(root)}, found none")
    lists = [path.removesuffix(OF_SLIDE) + MANIFEST for path in paths if path.endswith(OF_SLIDE)]
    shards = Shards(TAR, root, paths, lists if of_slides else [path for path in lists if (root / path).is_file()])

    def members(number: int) -> Found:
        path = paths[number]
        found = _members(root / path)
        if not path.endswith(OF_SLIDE):
            return _images(path, found)
        manifest = path.removesuffix(OF_SLIDE) + MANIFEST
        return _of_slide(path, root / manifest, found) if manifest in shards.listed else _images(path, found)

    return shards, open_index(shards, members, cache_dir, may_write=may_write)


def _members(path: Path) -> Found:
    """All regular files in a tar.

    Raises:
        DataError: If it is none.
    """
    found = Found()
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined] - it would keep what it knows of every file
                if member.issparse():
                    raise DataError(
                        f"expected a tar without sparse files at {printable(path)}, found one; pack it again"
                    )
                if member.isreg():
                    name = os.path.normpath(member.name)
                    found.add(name, member.offset_data, min(member.size, LARGEST_BYTES + 1))
            if _byte_after(path, tar.offset) != b"\0":  # the end is marked by blocks of zeros
                found.damage = f"{DAMAGED} {len(found.names):,} files"
    except tarfile.ReadError as error:
        if not found.names:
            raise DataError(f"expected an uncompressed tar file at {printable(path)}, found: {error}") from None
        found.damage = f"{DAMAGED} {len(found.names):,} files"
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(f"cannot read {printable(path)}: {printable(error)[:200]}") from None
    return found


def _byte_after(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(1)


def _images(path: str, found: Found) -> Found:
    """The images among the files of a tar: of the files ``key.*`` of a key the one image, such as ``key.jpg``.

    Raises:
        DataError: If a key has two.
    """
    images = Found(damage=found.damage)
    stems = [os.path.splitext(name) for name in found.names]  # noqa: PTH122 - names, not files
    counts = Counter(stem for stem, suffix in stems if suffix.lower() in SUFFIXES)
    for (stem, suffix), name, first, second in zip(stems, found.names, found.first, found.second, strict=True):
        if suffix.lower() not in SUFFIXES or _belongs_to_another(stem, counts):
            continue
        if counts[stem] > 1:
            raise DataError(f"{printable(path)}: expected one image of each key, found several of {printable(stem)}")
        images.add(name, first, second)
    return images


def _belongs_to_another(stem: str, images: Mapping[str, int]) -> bool:
    """Whether ``key.mask`` (of ``key.mask.png``) belongs to an image ``key.jpg``."""
    while "." in stem.rpartition("/")[2]:
        stem = stem.rpartition(".")[0]
        if stem in images:
            return True
    return False


def _of_slide(path: str, manifest: Path, found: Found) -> Found:
    """The tiles that the manifest of a slide's tar lists, with the names that they have as files.

    Raises:
        DataError: If it cannot be read.
    """
    slide = path.rpartition("/")[2].removesuffix(OF_SLIDE)
    at = {name: (first, second) for name, first, second in zip(found.names, found.first, found.second, strict=True)}
    tiles = Found(damage=found.damage)
    try:
        with manifest.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                place = at.get(f"{int(row['tile_index']):06d}.jpg", (ABSENT, 0))
                tiles.add(f"{slide}/{slide}_{int(row['x'])}_{int(row['y'])}.jpg", *place)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"expected the manifest of {printable(path)} (tile_index,x,y) at {printable(manifest)}, found: "
            f"{printable(error)[:200]}; copy it too, or tile the slide again"
        ) from None
    return tiles


class ParquetTiles(ShardTiles):
    """Tiles in a column of parquet files. The row group of a tile is read, and the last ones are kept."""

    kind = PARQUET

    def __init__(self, shards: Shards, index: ShardIndex) -> None:
        super().__init__(shards, index)
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._process = os.getpid()

    def _content(self, shard: int, first: int, second: int) -> bytes:
        if self._process != os.getpid():  # a forked worker opens its own
            self._open, self._groups, self._process = OrderedDict(), OrderedDict(), os.getpid()
        group = self._groups.get((shard, first))
        if group is None:
            group = self._groups[shard, first] = self._read_group(shard, first)
            while len(self._groups) > 1 and sum(one.nbytes for one in self._groups.values()) > GROUP_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end((shard, first))
        content = group[second].as_py()
        if content is None:
            raise DataError("expected bytes, found null")
        return content

    def _read_group(self, shard: int, group: int) -> Any:
        path = self._shards.root / self._shards.paths[shard]
        self._check(shard, path.stat())
        file = self._open.get(shard)
        if file is None:
            file = self._open[shard] = _parquet(path)
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        with _arrow_errors(path):
            column = image_column(file.schema_arrow, path)
            facts = file.metadata.row_group(group)
            size = facts.column(file.schema_arrow.get_field_index(column)).total_uncompressed_size
            if size > LARGEST_GROUP:
                raise DataError(
                    f"expected row groups of about 64 tiles in {printable(path)}, found one of {size / 1e6:.0f} MB; "
                    "write it again with 64 rows in each"
                )
            return file.read_row_group(group, columns=[column], use_threads=False).column(0)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files."""
        return {**super().__getstate__(), "_groups": OrderedDict()}


def open_parquet(root: Path, cache_dir: str, *, may_write: bool) -> tuple[Shards, ShardIndex]:
    """Index the parquet files of a folder.

    Args:
        root: The folder. Each file has the column ``jpeg`` (or ``image``: bytes of an image file), and either ``path``
            or ``slide_id,x,y``.
        cache_dir: Where the index is kept: ``auto``, ``none`` or a folder.
        may_write: Whether the index may be written.

    Raises:
        DataError: If there are none, or one cannot be used.
        ConfigError: If pyarrow is not installed.
    """
    import_extra("pyarrow", "parquet files", PARQUET)
    paths = find_shards(root, ".parquet")
    if not paths:
        raise DataError(f"expected parquet files in {printable(root)}, found none")
    shards = Shards(PARQUET, root, paths)
    return shards, open_index(shards, lambda number: _rows(root / paths[number]), cache_dir, may_write=may_write)


def _parquet(path: Path) -> Any:
    """An open parquet file.

    Raises:
        OSError: If it does not exist.
        DataError: If it is none.
    """
    pq = import_extra("pyarrow.parquet", "parquet files", PARQUET)
    path.stat()
    with _arrow_errors(path):
        return pq.ParquetFile(path, memory_map=False, pre_buffer=False)


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    pyarrow = import_extra("pyarrow", "parquet files", PARQUET)
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"cannot read {printable(path)}: {printable(error)[:200]}") from None


def _rows(path: Path) -> Found:
    """The rows of a parquet file, by row group and number in it.

    Raises:
        DataError: If it cannot be read, or has other columns.
    """
    found = Found()
    try:
        file = _parquet(path)
    except OSError as error:
        raise DataError(f"cannot read {printable(path)}: {printable(error)[:200]}") from None
    with file, _arrow_errors(path):
        image_column(file.schema_arrow, path)
        named = "path" in file.schema_arrow.names
        columns = ["path"] if named else list(PLACE_COLUMNS)
        absent = sorted({*columns} - {*file.schema_arrow.names})
        if absent:
            raise DataError(
                f"expected the column path, or {','.join(PLACE_COLUMNS)}, in {printable(path)}, found "
                f"{','.join(file.schema_arrow.names)}"
            )
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns, use_threads=False).to_pydict()
            for row, values in enumerate(zip(*(rows[column] for column in columns), strict=True)):
                found.add(_name(values, named=named, path=path), group, row)
    found.names = _named_after_slides(found.names)
    return found


def _named_after_slides(names: list[str]) -> list[str]:
    """Names ``<slide>/<x>_<y>_<level>.jpg``, as nanopath has them, in the form ``<slide>/<level>/<slide>_<x>_<y>.jpg``.

    A name ``7_512_1024`` alone may be either; the names of a file are taken so if all are in folders of other names,
    and end with the number of a level.
    """
    matches = [OF_LEVEL.fullmatch(name) for name in names]
    if not all(match and match["slide"] != match["x"] for match in matches):
        return names
    return [
        match.expand(r"\g<folder>\g<slide>/\g<level>/\g<slide>_\g<x>_\g<y>\g<suffix>") for match in matches if match
    ]


def _name(values: Sequence[Any], *, named: bool, path: Path) -> str:
    if not all(values[:1]) or None in values:
        raise DataError(f"expected values in {printable(path)} for every tile, found an empty one")
    if named:
        return os.path.normpath(str(values[0]))
    slide, x, y = values
    return f"{slide}/{slide}_{x}_{y}.jpg"


def image_column(schema: Any, path: Path) -> str:
    """Name of the column of the images in a parquet file.

    Raises:
        DataError: If there is none of bytes.
    """
    types = {name: str(schema.field(name).type) for name in IMAGE_COLUMNS if name in schema.names}
    column = next((name for name, kind in types.items() if kind in ("binary", "large_binary")), None)
    if column is None:
        columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
        raise DataError(
            f"expected the column {' or '.join(IMAGE_COLUMNS)} with the bytes of image files in {printable(path)}, "
            f"found {columns}"
        )
    return column
