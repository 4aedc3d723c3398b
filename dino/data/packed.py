"""All feature grids of a folder in one memory-mapped file: a sample then costs no file, no unpacking and no copy.

``<place>/grids-<key>.bin`` holds the cells, ``grids.json`` what they are of. The key is made of names, sizes and
modification times of the files, so that whatever changes is packed anew.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import progress
from dino.data.grid_files import GridEntry, Survey, refuse_bad, survey
from dino.data.grids import read_cells
from dino.errors import DataError
from dino.files import atomic_path, read_json, stamp, write_json

FORMAT = 1
INDEX, LOCK = "grids.json", "lock"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # the first that holds every value exactly


class _Rounded(Exception):
    """A value that half precision does not hold."""


@dataclass(frozen=True)
class GridFiles:
    """The files to pack.

    Attributes:
        root: Their folder; names are relative to it.
        entries: The files, in a fixed order.
        order: Order of the rows in them, ``yx`` or ``xy``.
        dtype: What the values are rounded to: float32 for none of them, bfloat16 for a network whose first layer would
            do so anyway, which then reads half the bytes.
    """

    root: Path
    entries: Sequence[GridEntry]
    order: str = "yx"
    dtype: torch.dtype = torch.float32

    @cached_property
    def key(self) -> str:
        """Hash of everything that decides what is packed, as it was when this was first asked for."""
        digest = hashlib.sha256(f"{FORMAT} {self.order} {self.dtype}".encode())
        for entry in self.entries:
            name = os.fsencode(entry.path.relative_to(self.root))
            digest.update(name + f"\0{entry.shape} {stamp(entry.path)}\0".encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class PackedGrids:
    """Grids in one file.

    Attributes:
        path: The file.
        dtype: Type of its values: half precision where that was asked for, or holds every one of them exactly.
        survey: What was packed.
        bad: Numbers of the regions that cannot be used; their cells are zeros.
    """

    path: Path
    dtype: torch.dtype
    survey: Survey
    bad: frozenset[int]

    @cached_property
    def cells(self) -> Tensor:
        """``(n, h * w, D)`` memory-mapped tensor: the cells of each region, row-major. Not to be written to."""
        shape = (sum(self.survey.regions), self.survey.height * self.survey.width, self.survey.dim)
        return torch.from_file(str(self.path), shared=False, size=int(np.prod(shape)), dtype=self.dtype).view(shape)

    def __getstate__(self) -> dict[str, Any]:
        """Without the map: another process makes its own."""
        return {name: value for name, value in self.__dict__.items() if name != "cells"}


def find_packed(place: Path, files: GridFiles, max_bad_fraction: float) -> PackedGrids | None:
    """Open the packed grids of a folder, where they are those of its files as they are now.

    Args:
        place: Cache folder of these grids alone.
        files: What is wanted.
        max_bad_fraction: Share of the files that may be no grids.

    Raises:
        DataError: If too many files are no grids.
    """
    found = _read(place, files)
    if found is not None:
        refuse_bad(files.entries, found.survey.bad, max_bad_fraction)
    return found


def pack(place: Path, files: GridFiles, max_bad_fraction: float) -> PackedGrids:
    """Pack the grids of a folder. Of several processes that want the same one packs, and the others wait for it.

    Args:
        place: Cache folder of these grids alone; what was packed there from other files is removed.
        files: What is to be packed.
        max_bad_fraction: Share of the files that may be no grids.

    Raises:
        DataError: If too many files are no grids, or they differ in D or shape.
        OSError: If they cannot be packed there.
    """
    with _locked(place) as alone:
        found = find_packed(place, files, max_bad_fraction)
        if found is None:
            _remove_old(place, leftovers=alone)
            found = _pack(place, files, max_bad_fraction)
        return found


def _read(place: Path, files: GridFiles) -> PackedGrids | None:
    """What was packed from exactly these files, if anything."""
    try:
        facts = read_json(place / INDEX)
        if facts["key"] != files.key:
            return None
        found = PackedGrids(
            _data(place, files.key),
            getattr(torch, facts["dtype"]),
            Survey(**facts["survey"]),
            frozenset(facts["bad"]),
        )
        return found if found.cells.shape[0] else None  # maps the file: it must be there, and as large as it says
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        return None


def _data(place: Path, key: str) -> Path:
    return place / f"grids-{key}.bin"


@contextmanager
def _locked(place: Path) -> Iterator[bool]:
    """Let one process in at a time; the operating system frees the lock of a process that dies.

    Yields:
        Whether no other process can be in. Some cluster file systems know no locks: there each packs for itself, which
        is safe, because files appear whole, and only costs time.
    """
    place.mkdir(parents=True, exist_ok=True)
    with (place / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"another process is packing the feature grids into {place}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def _remove_old(place: Path, *, leftovers: bool) -> None:
    """Remove what was packed before (a run that has mapped it keeps it), and files that a killed process left."""
    for old in (*place.glob("grids-*.bin"), *(place.glob(".grids*.tmp") if leftovers else ())):
        with suppress(OSError):
            old.unlink()


def _pack(place: Path, files: GridFiles, max_bad_fraction: float) -> PackedGrids:
    path = _data(place, files.key)  # takes the dates before anything is read: what changes from here on is noticed
    with progress.bar("check grids", len(files.entries)) as bar:
        found = survey(files.root, files.entries, bar.advance, max_bad_fraction)
    for dtype in DTYPES if files.dtype == torch.float32 else (files.dtype,):
        with suppress(_Rounded):
            bad = _write(path, files, found, dtype)
            break
    name = str(dtype).removeprefix("torch.")
    write_json(place / INDEX, {"key": files.key, "dtype": name, "survey": vars(found), "bad": bad})
    grids = _read(place, files)  # maps it now, before another run may take the place
    if grids is None:
        raise OSError("what was written cannot be read back")
    return grids


def _write(path: Path, files: GridFiles, found: Survey, dtype: torch.dtype) -> list[int]:
    """Write the cells of all regions; the numbers of those that cannot be used.

    Raises:
        _Rounded: If the type does not hold a value exactly.
        OSError: If the disk does not take it.
    """
    shape, bad, number = (found.height, found.width), [], 0
    size = sum(found.regions) * found.height * found.width * found.dim * dtype.itemsize
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(f"{size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    with (
        progress.bar(f"pack grids ({size / 1e9:.1f} GB)", len(files.entries)) as bar,
        atomic_path(path) as temporary,
        temporary.open("wb") as target,
    ):
        for entry, regions in zip(files.entries, found.regions, strict=True):
            for region in range(regions):
                cells = _usable(entry.path, files.order, shape, region, found.dim)
                if cells is None:
                    bad.append(number)
                    cells = torch.zeros(shape[0] * shape[1], found.dim)
                target.write(_exactly(cells.to(files.dtype), dtype).data)
                number += 1
            bar.advance()
    return bad


def _usable(path: Path, order: str, shape: tuple[int, int], region: int, dim: int) -> Tensor | None:
    try:
        cells = read_cells(path, order, shape, region)
    except DataError:
        return None
    return cells if cells.shape[1] == dim else None


def _exactly(cells: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The bytes of values in another type."""
    packed = cells.to(dtype)
    if not torch.equal(packed.to(cells.dtype), cells):
        raise _Rounded
    return packed.view(torch.uint8).numpy()
