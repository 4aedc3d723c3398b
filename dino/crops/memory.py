"""Memory for views on a CPU, used again: to get fresh pages takes three times as long as to fill them."""

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KEPT = 4  # blocks: the views of two sizes, twice


class Memory:
    """Blocks of memory, each lent again once no tensor of it is left."""

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []  # each with the array that was lent last

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A CPU tensor of any values, in memory that may have been used before."""
        size = math.prod(shape) * dtype.itemsize
        return self._lend(size).view(dtype).view(*shape) if size else torch.empty(*shape, dtype=dtype)

    def gather(self, table: Tensor, places: Tensor) -> Tensor:
        """Rows of a table.

        Args:
            table: (n, D) contiguous tensor.
            places: (...) int64 row numbers, on the same device.

        Returns:
            (..., D) tensor; on a CPU in memory that may have been used before.
        """
        if table.device.type != "cpu":
            return table[places]
        result = self.empty((places.numel(), table.shape[1]), table.dtype)
        torch.index_select(table, 0, places.flatten(), out=result)
        return result.view(*places.shape, table.shape[1])

    def _lend(self, size: int) -> Tensor:
        """``size`` bytes; the array of the block lives as long as any tensor that shares its memory."""
        fitting = [n for n, (block, lent) in enumerate(self._blocks) if block.size == size and lent() is None]
        block = self._blocks.pop(fitting[0])[0] if fitting else np.empty(size, np.uint8)
        array = block[:]
        self._blocks = [*self._blocks[1 - KEPT :], (block, weakref.ref(array))]
        return torch.from_numpy(array)

    def __getstate__(self) -> dict[str, list]:
        """Blocks stay in their process."""
        return {"_blocks": []}
