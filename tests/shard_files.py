"""Tiles of a folder packed as tar and parquet shards, by tarfile and pyarrow themselves."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest


def pack_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pack_parquet(path: Path, columns: dict[str, list], row_group_size: int = 64) -> Path:
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="none", row_group_size=row_group_size)
    return path


def contents(folder: Path) -> list[tuple[str, bytes]]:
    """Name and bytes of each file, not sorted."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in sorted(paths, reverse=True)]


def as_tars(folder: Path, target: Path, shards: int = 3) -> Path:
    """WebDataset: every image of a folder with a label beside it, over some shards."""
    files = contents(folder)
    for number in range(shards):
        members = [
            one
            for name, content in files[number::shards]
            for one in ((name, content), (f"{name.rpartition('.')[0]}.cls", b"1"))
        ]
        pack_tar(target / f"train-{number:06d}.tar", members)
    return target


def as_parquet(folder: Path, target: Path, shards: int = 3, row_group_size: int = 4) -> Path:
    """`path,jpeg`, as nanopath packs tiles."""
    files = contents(folder)
    for number in range(shards):
        names, images = zip(*files[number::shards], strict=True)
        columns = {"path": list(names), "jpeg": list(images)}
        pack_parquet(target / f"shard-{number:05d}.parquet", columns, row_group_size)
    return target


PACKERS = {"tar": as_tars, "parquet": as_parquet}
