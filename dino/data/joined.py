"""Several datasets as one."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from dino.data.datasets import BadSample, Dataset, Sample, SlideRanges


class JoinedDataset(Dataset):
    """The samples of several datasets, one dataset after the other.

    A name is that in its own dataset; from the second on it begins with the number of the dataset, ``2:``, so that no
    two are equal.

    Args:
        parts: The datasets.
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)

    def __len__(self) -> int:
        """Number of samples of all."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        """The sample at an index.

        Raises:
            BadSample: If the sample cannot be used.
        """
        return self._sample(index, None)

    def drawn(self, index: int, draw: int) -> Sample:
        """The sample at an index, as its dataset takes it for a draw.

        Raises:
            BadSample: If the sample cannot be used.
        """
        return self._sample(index, draw)

    def _sample(self, index: int, draw: int | None) -> Sample:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        part, inner = self._parts[number], index - int(self._starts[number])
        prefix = f"{number + 1}:" if number else ""
        try:
            sample = part[inner] if draw is None else part.drawn(inner, draw)
        except BadSample as error:
            raise BadSample(prefix + error.name, str(error)) from None
        return replace(sample, name=prefix + sample.name)

    def places(self, start: int, end: int) -> np.ndarray:
        """Where samples of a range lie, which are all of one dataset, see :meth:`Dataset.places`."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        before = int(self._starts[number])
        return self._parts[number].places(start - before, end - before)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of those of the datasets, in order."""
        return hashlib.sha256("\n".join(part.fingerprint for part in self._parts).encode()).hexdigest()

    @cached_property
    def ranges(self) -> SlideRanges:
        """The slides of all; one that several datasets have, has ranges in each."""
        return SlideRanges.joined([part.ranges for part in self._parts])
