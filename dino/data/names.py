"""A long list of file names in little memory, which worker processes share."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

END = "\0"  # no file name holds it


class Names(Sequence[str]):
    """File names as one block of bytes: half the memory of a list.

    A worker process shares the block with its parent. Of a list it would get a copy of its own bit by bit, because
    to look at a string of it is to write to its counter of references.

    Args:
        names: The names, in order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        joined = END.join(names)
        self._block = os.fsencode(joined + END) if joined else b""
        self._ends = np.flatnonzero(np.frombuffer(self._block, np.uint8) == 0) + 1

    def __len__(self) -> int:
        """How many there are."""
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """The name at an index, or those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index % len(self) else 0
        return os.fsdecode(self._block[start : end - 1])

    @property
    def fingerprint(self) -> str:
        """Hash of the names in order."""
        return hashlib.sha256(self._block).hexdigest()
