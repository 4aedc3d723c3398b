"""Feature grids: ``.pt`` files of level-1 features to ``(D, h, w)`` tensors.

A file of this project (and of the original system) holds one region, ``[npatch x D]``; HIPT keeps the regions of a
slide as ``[M x 256 x D]`` and slide2vec as ``(R, T, D)``. Rows are row-major (y, then x) unless ``order="xy"``.
"""

import math
import pickle
from pathlib import Path

import torch
from torch import Tensor

from dino.errors import ConfigError, DataError
from dino.files import printable

ORDERS = ("yx", "xy")
SMALLEST_SIDE = 4


def open_grids(path: Path) -> Tensor:
    """Map a ``.pt`` file and check its rank and type, without reading its values.

    Args:
        path: File that holds one tensor.

    Returns:
        ``(M, T, D)`` memory-mapped tensor: M regions of T cells.

    Raises:
        DataError: If the file is damaged, holds anything but one floating-point tensor, or has another rank.
    """
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise DataError(f"expected one tensor in {printable(path)}, found objects that need running code") from None
    except Exception as error:  # torch raises many types on damaged archives
        reason = f"{type(error).__name__}: {printable(error)[:200]}"
        raise DataError(f"cannot read {printable(path)}: {reason}") from None
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim not in (2, 3):
        found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise DataError(
            f"expected a float tensor [cells x D] or [regions x cells x D] in {printable(path)}, found {found}"
        )
    if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise DataError(f"expected all of {tuple(tensor.shape)} to lie in {printable(path)}, found less; save it whole")
    if 0 in tensor.shape:
        raise DataError(f"expected features in {printable(path)}, found an empty tensor {tuple(tensor.shape)}")
    return tensor if tensor.ndim == 3 else tensor[None]


def grid_shape(path: Path, cells: int, shape: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of a grid of ``cells`` rows.

    Args:
        path: The file, for the message.
        cells: Its row count.
        shape: ``(h, w)`` from ``regions.csv``, or None for a square grid.

    Raises:
        DataError: If the rows do not make up the grid, or a side is under 4 cells.
    """
    side = math.isqrt(cells)
    height, width = shape or (side, side)
    if height * width != cells:
        wanted = f"{height} x {width} = {height * width} rows" if shape else "a square number of rows"
        raise DataError(
            f"expected {wanted} in {printable(path)}, found {cells}; rectangular grids need a regions.csv beside them"
        )
    if min(height, width) < SMALLEST_SIDE:
        raise DataError(
            f"expected grids of at least 4 x 4 cells, found {height} x {width} in {printable(path)}; cut larger regions"
        )
    return height, width


def read_cells(path: Path, order: str = "yx", shape: tuple[int, int] | None = None, region: int = 0) -> Tensor:
    """The cells of one feature grid, row-major.

    Args:
        path: ``.pt`` file.
        order: ``yx`` for row-major rows, ``xy`` for column-major ones.
        shape: ``(h, w)``, or None for a square grid.
        region: Which region, where the file holds several.

    Returns:
        ``(h * w, D)`` float32 tensor with its own memory.

    Raises:
        DataError: If the file is not such a grid, or holds values that are not finite.
        ConfigError: If ``order`` is unknown.
    """
    if order not in ORDERS:
        raise ConfigError(f"expected grid_order yx or xy, found '{order}'")
    grids = open_grids(path)
    if region >= len(grids):
        raise DataError(f"expected region {region} in {printable(path)}, found only {len(grids)}; was it replaced?")
    rows = grids[region]  # (T, D)
    height, width = grid_shape(path, rows.shape[0], shape)
    if order == "xy":
        rows = rows.unflatten(0, (width, height)).transpose(0, 1).flatten(0, 1)  # (h * w, D)
    cells = rows.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if not bool(torch.isfinite(cells).all()):
        raise DataError(f"expected finite features in {printable(path)}, found NaN or infinity; extract it again")
    return cells


def read_grid(path: Path, order: str = "yx", shape: tuple[int, int] | None = None, region: int = 0) -> Tensor:
    """One feature grid as an image of D channels: what :func:`read_cells` gives, as ``(D, h, w)``."""
    cells = read_cells(path, order, shape, region)
    return cells.unflatten(0, grid_shape(path, len(cells), shape)).permute(2, 0, 1).contiguous()  # (D, h, w)
