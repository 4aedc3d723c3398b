"""A cache of decoded tiles in memory that a process shares with its workers."""

import mmap
import multiprocessing
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino.data.images import decode
from dino.errors import ConfigError
from dino.files import stamp

CGROUP = Path("/sys/fs/cgroup")  # memory limits of a container or batch job
MEMINFO = Path("/proc/meminfo")


class TileCache:
    """Tiles by index, decoded when they are first requested; those beyond the budget are decoded each time.

    Forked workers fill and read the same memory. In a worker that is started in another way nothing is cached.

    Args:
        count: Number of tiles.
        budget: Largest number of bytes of pixels to keep.
    """

    def __init__(self, count: int, budget: int) -> None:
        # Anonymous and shared: a page takes memory once it is written to, and is visible in all processes.
        self._pixels = np.frombuffer(mmap.mmap(-1, budget), np.uint8)
        facts = np.frombuffer(mmap.mmap(-1, (count + 1) * 5 * 8), np.int64).reshape(count + 1, 5)
        self._facts, self._used = facts[:-1], facts[-1]  # of each tile: start, height, width, and the file's stamp
        self._lock = multiprocessing.Lock()

    def __call__(self, index: int, path: Path) -> Tensor:
        """``(3, H, W)`` uint8 pixels of a tile, as :func:`dino.data.images.decode` returns them.

        Raises:
            DataError: If the file cannot be decoded.
        """
        if self._pixels is None:
            return decode(path)
        now = stamp(path)
        with self._lock:
            start, height, width, *then = self._facts[index].tolist()
        if height and tuple(then) == now:  # a file that changed or vanished is decoded again
            return torch.from_numpy(self._pixels[start : start + 3 * height * width]).view(3, height, width)
        pixels = decode(path)
        if not height:
            self._keep(index, pixels, now)
        return pixels

    def _keep(self, index: int, pixels: Tensor, now: tuple[int, int]) -> None:
        with self._lock:
            start = int(self._used[0])
            if start + pixels.numel() > len(self._pixels):
                return
            self._used[0] += pixels.numel()
        self._pixels[start : start + pixels.numel()] = pixels.flatten().numpy()
        with self._lock:  # after the pixels: other processes may read them from now on
            self._facts[index] = start, *pixels.shape[1:], *now

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, since another process cannot access the memory."""
        return {"_pixels": None}


def tile_cache(count: int, gb: float) -> TileCache | None:
    """A cache of ``gb`` GB for ``count`` tiles; None for 0 GB.

    Raises:
        ConfigError: If that is more than is free.
    """
    free = free_memory()
    if gb < 0 or gb * 1e9 > free:
        raise ConfigError(
            f"expected speed.ram_cache of at most the {free / 1e9:.1f} GB of memory that are free, found {gb:g}; "
            "lower it (0 turns the cache off)"
        )
    return TileCache(count, int(gb * 1e9)) if gb * 1e9 >= 1 else None


def keep_decoded(paths: Sequence[Path], budget: int) -> Callable[[Path], Tensor]:
    """A function that decodes tiles as :func:`dino.data.images.decode`, and keeps them for when they are read again.

    Args:
        paths: The files.
        budget: Largest number of bytes of pixels to keep; at most a quarter of the free memory is used.
    """
    cache = TileCache(len(paths), max(1, min(budget, free_memory() // 4)))
    index = {path: i for i, path in enumerate(paths)}
    return lambda path: cache(index[path], path)


def free_memory() -> int:
    """Bytes that this process may still allocate: on the machine, and within the limit of its container or job."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, LookupError, ValueError):  # not Linux
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # no such limit, or "max"
        free.append(int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text()))
    return max(0, min(free))
