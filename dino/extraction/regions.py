"""Level 1 over regions: every cell embedded once, one ``.pt`` of features per region."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino.extraction.pixels import RegionImage
from dino.extraction.stream import batches, read_ahead
from dino.files import atomic_path
from dino.slides.lattice import cells_of_region
from dino.slides.tables import RegionRecord

Embedder = Callable[[Iterable[Tensor]], Generator[Tensor, None, None]]


@dataclass(frozen=True)
class Plan:
    """What of one slide is read, and where each region finds its features among what was read.

    Attributes:
        units: What is read, in order: cells ``(x, y)``, or images of regions.
        rows: For each region the ``(h * w,)`` numbers of its cells, row-major.
        cells: How many cells there are in all units.
    """

    units: Sequence[Any]
    rows: Sequence[Tensor]
    cells: int


def plan_cells(records: Sequence[RegionRecord]) -> Plan:
    """Plan to read cell by cell: a cell that several regions share is read, and embedded, once."""
    number: dict[tuple[int, int], int] = {}
    rows = []
    for r in records:
        cells = [(int(x), int(y)) for x, y in cells_of_region(r.x, r.y, r.step_lv0, r.grid)]
        rows.append(torch.tensor([number.setdefault(cell, len(number)) for cell in cells]))
    return Plan(list(number), rows, len(number))


def plan_images(images: Sequence[RegionImage]) -> Plan:
    """Plan to read region image by region image."""
    rows, start = [], 0
    for image in images:
        count = image.record.grid[0] * image.record.grid[1]
        rows.append(torch.arange(start, start + count))
        start += count
    return Plan(list(images), rows, start)


@dataclass(frozen=True)
class Reading:
    """How pixels are read.

    Attributes:
        batch_size: Cells in a batch.
        workers: Threads that read ahead.
        ahead: Units read in advance at most.
    """

    batch_size: int
    workers: int
    ahead: int


def write_regions(
    plan: Plan,
    paths: Sequence[Path],
    read: Callable[[Any], Tensor],
    embedder: Embedder,
    reading: Reading,
    notice: Callable[[int], None] = lambda cells: None,
) -> None:
    """Embed the cells of one slide's regions; write each region as soon as its last cell is there.

    Args:
        plan: What to read, from :func:`plan_cells` or :func:`plan_images`.
        paths: The ``.pt`` of each region.
        read: Reads one unit to ``(n, 3, S, S)`` uint8.
        embedder: Batches ``(B, 3, S, S)`` to features ``(B, D)``, one by one.
        reading: Batch size and threads.
        notice: Called with the number of cells embedded since the last call.

    Raises:
        DataError: If pixels cannot be read. The regions written so far stay.
    """
    features, done, written = torch.empty(0), 0, 0
    # Closed here, not when the garbage collector comes: no thread may read from a slide that its owner has closed.
    with closing(read_ahead(read, plan.units, reading.workers, reading.ahead)) as blocks:
        cells = (cell for block in blocks for cell in block)
        with closing(embedder(batches(cells, reading.batch_size))) as parts:
            for part in parts:
                if not done:
                    features = torch.empty(plan.cells, part.shape[1])  # (cells, D)
                features[done : done + len(part)] = part
                done += len(part)
                while written < len(paths) and int(plan.rows[written].max()) < done:
                    write_features(paths[written], features[plan.rows[written]])
                    written += 1
                notice(len(part))


def write_features(path: Path, features: Tensor) -> None:
    """Write one region, whole or not at all.

    Args:
        path: The ``.pt``; its folder is there, unless the disk has vanished.
        features: ``(h * w, D)``, row-major. A view is copied first: ``torch.save`` would write all of what it views.
    """
    own = features.to(torch.float32).clone(memory_format=torch.contiguous_format)
    # A file of Python's, because torch's own reports a full disk as a fault of the program.
    with atomic_path(path, make_folder=False) as temporary, temporary.open("wb") as file:
        torch.save(own, file)


def is_written(path: Path, cells: int, dim: int) -> bool:
    """Whether ``path`` holds the features of a region of ``cells`` cells, float32 ``(cells, dim)``."""
    if not path.is_file():
        return False
    try:
        features = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # damaged in whatever way: it is written again
        return False
    return isinstance(features, Tensor) and features.dtype == torch.float32 and features.shape == (cells, dim)
