"""Reused memory for views on a CPU: allocating new pages takes three times as long as filling them."""

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KEPT = 4  # number of blocks: the views of two sizes, for two batches


class MemoryPool:
    """Blocks of memory; a block is reused once no tensor shares its memory any more."""

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []  # with the last array that was returned

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor, in reused memory if possible."""
        size = math.prod(shape) * dtype.itemsize
        return self._allocate(size).view(dtype).view(*shape) if size else torch.empty(*shape, dtype=dtype)

    def gather(self, table: Tensor, index: Tensor) -> Tensor:
        """Rows of a table.

        Args:
            table: (n, D) contiguous tensor.
            index: (...) int64 row numbers, on the same device.

        Returns:
            (..., D) tensor; on a CPU in reused memory.
        """
        if table.device.type != "cpu":
            return table[index]
        result = self.empty((index.numel(), table.shape[1]), table.dtype)
        torch.index_select(table, 0, index.flatten(), out=result)
        return result.view(*index.shape, table.shape[1])

    def _allocate(self, size: int) -> Tensor:
        """``size`` bytes; the returned array lives as long as any tensor that shares its memory."""
        fitting = [n for n, (block, user) in enumerate(self._blocks) if block.size == size and user() is None]
        block = self._blocks.pop(fitting[0])[0] if fitting else np.empty(size, np.uint8)
        array = block[:]
        self._blocks = [*self._blocks[1 - KEPT :], (block, weakref.ref(array))]
        return torch.from_numpy(array)

    def __getstate__(self) -> dict[str, list]:
        """Blocks are not sent to other processes."""
        return {"_blocks": []}
