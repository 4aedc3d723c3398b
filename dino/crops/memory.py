"""Memory for views on a CPU, used again: to get fresh pages takes three times as long as to fill them."""

import weakref

import numpy as np
import torch
from torch import Tensor

KEPT = 4  # blocks: the views of two sizes, twice


class Memory:
    """Blocks of memory, each lent again once no tensor of it is left."""

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []  # each with the array that was lent last

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
        memory = self._lend(places.numel() * table.shape[1] * table.element_size())
        result = memory.view(table.dtype).view(-1, table.shape[1])
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
