"""All feature grids of a folder in one memory-mapped file, so that reading a sample opens and copies nothing.

``<cache>/grids-<key>.bin`` contains the cells, ``grids.json`` the key, dtype and shapes. The key is a hash of the
names, sizes and modification times of the files and of the record of their model, so that the grids are packed again
after any change, also where grids of another model were copied over them with their modification times.
"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import distributed, progress
from dino.config.schema import RegionSpeedConfig
from dino.data.caches import cache_folders, locked
from dino.data.grids import GridEntry, Survey, check_bad_fraction, read_cells, survey
from dino.errors import ConfigError, DataError
from dino.files import atomic_path, printable, read_json, stamp, write_json
from dino.precision import casts_to_bf16

FORMAT = 1
INDEX = "grids.json"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # the first that represents every value exactly is used
AUTO_FRACTION = 0.25  # of the free GPU memory that grids may take where speed.gpu_cache is not set


class _RoundedError(Exception):
    """A value that half precision does not represent exactly."""


@dataclass(frozen=True)
class GridFiles:
    """The files to pack.

    Attributes:
        root: Their folder; names are relative to it.
        entries: The files, in a fixed order.
        order: Order of the rows in them, ``yx`` or ``xy``.
        dtype: Type that the values are rounded to: float32 (no rounding), or bfloat16 for a network whose first layer
            rounds to it anyway, which halves the bytes to read.
        source: What is recorded of the model that made the grids; empty if nothing is.
    """

    root: Path
    entries: Sequence[GridEntry]
    order: str = "yx"
    dtype: torch.dtype = torch.float32
    source: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of everything that the packed values depend on, as it was at the first access."""
        digest = hashlib.sha256(f"{FORMAT} {self.order} {self.dtype}{self.source}".encode())
        for entry in self.entries:
            name = os.fsencode(entry.path.relative_to(self.root))
            digest.update(name + f"\0{entry.shape} {stamp(entry.path)}\0".encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class PackedGrids:
    """Grids in one file.

    Attributes:
        path: The file.
        dtype: Type of its values: half precision where that was requested, or represents each of them exactly.
        survey: Shapes of the files that were packed.
        bad: Rows of the regions that cannot be used; their cells are zeros.
    """

    path: Path
    dtype: torch.dtype
    survey: Survey
    bad: frozenset[int]

    @cached_property
    def cells(self) -> Tensor:
        """``(n, h * w, D)`` memory-mapped tensor: the cells of each region, row-major; read only."""
        shape = (sum(self.survey.regions), self.survey.height * self.survey.width, self.survey.dim)
        return torch.from_file(str(self.path), shared=False, size=int(np.prod(shape)), dtype=self.dtype).view(shape)

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory map: another process maps the file itself."""
        return {name: value for name, value in self.__dict__.items() if name != "cells"}


def grid_dtype(speed: RegionSpeedConfig) -> torch.dtype:
    """Type of the grids of a run: that to which autocast rounds the input of the first layer, at half the bytes."""
    device = distributed.choose_device(speed.device)
    return torch.bfloat16 if casts_to_bf16(speed.precision, device) else torch.float32


def prepare_grids(
    files: GridFiles, speed: RegionSpeedConfig, max_bad_fraction: float, *, may_write: bool
) -> tuple[Survey, PackedGrids | None, Tensor | None]:
    """Make the grids of a run ready to be read.

    Args:
        files: Their files.
        speed: Where they are packed, and how much GPU memory they may take.
        max_bad_fraction: Largest fraction of the files that may not be grids.
        may_write: Whether grids may be packed; grids that are packed already are used in any case.

    Returns:
        The shapes; the packed grids, None where each file is read by itself; and the ``(n, h * w, D)`` cells for the
        crops to hold, None where batches contain their cells.

    Raises:
        DataError: If the grids cannot be trained on.
        ConfigError: If there is not as much memory as ``speed.gpu_cache``.
    """
    device = distributed.choose_device(speed.device)
    if all(entry.shape is None for entry in files.entries):
        progress.say(
            f"{files.root}: no regions.csv; grids are read as square, rows in the order {files.order} (grid_order)"
        )
    packed = _find_or_pack(files, speed.cache_dir, max_bad_fraction, may_write)
    if packed is None:
        with progress.bar("check grids", len(files.entries)) as bar:
            found = survey(files.root, files.entries, bar.advance, max_bad_fraction)
        gpu_budget(device, speed.gpu_cache)
        return found, None, None
    return packed.survey, packed, _cells_on(device, packed.cells, speed.gpu_cache)


def _find_or_pack(files: GridFiles, cache_dir: str, max_bad_fraction: float, may_write: bool) -> PackedGrids | None:
    """The packed grids from the first cache folder that contains them, else from the first that can be written to."""
    caches = cache_folders(files.root, cache_dir)
    for cache in caches:
        found = find_packed(cache, files, max_bad_fraction)
        if found is not None:
            return found
    for cache in caches if may_write else ():
        try:
            return pack(cache, files, max_bad_fraction)
        except OSError as error:
            progress.say(f"feature grids cannot be packed into {printable(cache)}: {printable(error)}")
    if caches and may_write:
        progress.warn("every feature grid is read from its own file, which is slow; speed.cache_dir=FOLDER packs them")
    return None


def _cells_on(device: torch.device, cells: Tensor, gpu_cache_gb: float | None) -> Tensor | None:
    """The cells for crops on ``device`` to hold; None where its memory is too small."""
    budget, needed = gpu_budget(device, gpu_cache_gb), cells.numel() * cells.element_size()
    if device.type == "cpu":
        return cells  # memory-mapped: the operating system keeps what fits in its page cache
    if needed > budget:
        progress.say(
            f"the feature grids take {needed / 1e9:.1f} GB, more than the {budget / 1e9:.1f} GB of the GPU for them "
            "(speed.gpu_cache): they are copied batch by batch"
        )
        return None
    return cells.to(device)


def gpu_budget(device: torch.device, gpu_cache_gb: float | None) -> float:
    """Bytes of a GPU's memory that grids may take.

    Args:
        device: Where the run computes.
        gpu_cache_gb: The setting ``speed.gpu_cache``; None for a fraction of the free memory.

    Raises:
        ConfigError: If that is more than is free, or the device is not a GPU.
    """
    if device.type == "cpu":
        if gpu_cache_gb:
            raise ConfigError(
                f"expected a GPU for speed.gpu_cache={gpu_cache_gb:g}, found the CPU, where grids are mapped into "
                "memory without it; leave it out"
            )
        return 0.0
    free = torch.cuda.mem_get_info(device)[0]
    if gpu_cache_gb is None:
        return AUTO_FRACTION * free
    if gpu_cache_gb < 0 or gpu_cache_gb * 1e9 > free:
        raise ConfigError(
            f"expected speed.gpu_cache of at most the {free / 1e9:.1f} GB that are free on {device}, "
            f"found {gpu_cache_gb:g}; lower it, or leave it out"
        )
    return gpu_cache_gb * 1e9


def find_packed(cache: Path, files: GridFiles, max_bad_fraction: float) -> PackedGrids | None:
    """Open the packed grids of a folder; None if there are none of its files as they are now.

    Args:
        cache: Cache folder of these grids alone.
        files: The files.
        max_bad_fraction: Largest fraction of the files that may not be grids.

    Raises:
        DataError: If too many files are not grids.
    """
    found = _read(cache, files)
    if found is not None:
        check_bad_fraction(files.entries, found.survey.bad, max_bad_fraction)
    return found


def pack(cache: Path, files: GridFiles, max_bad_fraction: float) -> PackedGrids:
    """Pack the grids of a folder. Where several processes need the same grids, one packs and the others wait for it.

    Args:
        cache: Cache folder of these grids alone; what was packed there from other files is removed.
        files: The files.
        max_bad_fraction: Largest fraction of the files that may not be grids.

    Raises:
        DataError: If too many files are not grids, or they differ in D or shape.
        OSError: If they cannot be packed there.
    """
    with locked(cache, "packing the feature grids") as alone:
        found = find_packed(cache, files, max_bad_fraction)
        if found is None:
            _remove_old(cache, temporary=alone)
            found = _pack(cache, files, max_bad_fraction)
        return found


def _read(cache: Path, files: GridFiles) -> PackedGrids | None:
    """The grids that were packed from exactly these files; None if there are none, or the index is damaged."""
    try:
        facts = read_json(cache / INDEX)
        if facts["key"] != files.key:
            return None
        found = PackedGrids(
            _data(cache, files.key),
            getattr(torch, facts["dtype"]),
            Survey(**facts["survey"]),
            frozenset(facts["bad"]),
        )
        return found if found.cells.shape[0] else None  # maps the file, which fails if it is too small
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        return None


def _data(cache: Path, key: str) -> Path:
    return cache / f"grids-{key}.bin"


def _remove_old(cache: Path, *, temporary: bool) -> None:
    """Remove grids packed before (a run that has mapped them can still read them) and files of killed processes."""
    for old in (*cache.glob("grids-*.bin"), *(cache.glob(".grids*.tmp") if temporary else ())):
        with suppress(OSError):
            old.unlink()


def _pack(cache: Path, files: GridFiles, max_bad_fraction: float) -> PackedGrids:
    path = _data(cache, files.key)  # computes the key first: a file that changes from here on invalidates it
    with progress.bar("check grids", len(files.entries)) as bar:
        found = survey(files.root, files.entries, bar.advance, max_bad_fraction)
    for dtype in DTYPES if files.dtype == torch.float32 else (files.dtype,):
        with suppress(_RoundedError):
            bad = _write(path, files, found, dtype)
            break
    name = str(dtype).removeprefix("torch.")
    write_json(cache / INDEX, {"key": files.key, "dtype": name, "survey": vars(found), "bad": bad})
    grids = _read(cache, files)  # maps the file now, before another run may replace it
    if grids is None:
        raise OSError("the packed grids cannot be read back")
    return grids


def _write(path: Path, files: GridFiles, found: Survey, dtype: torch.dtype) -> list[int]:
    """Write the cells of all regions; returns the rows of those that cannot be used.

    Raises:
        _RoundedError: If the type does not represent a value exactly.
        OSError: If they cannot be written.
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
    """The bytes of values converted to a type that represents them exactly."""
    packed = cells.to(dtype)
    if not torch.equal(packed.to(cells.dtype), cells):
        raise _RoundedError
    return packed.view(torch.uint8).numpy()
