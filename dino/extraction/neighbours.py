"""Exact nearest neighbours of a tile among millions: bounds from a few principal directions, then the candidates.

Let P be an orthonormal basis of k directions. The cosine similarity of unit-length vectors x and q is the product of
their coordinates in P plus that of the rest, which is at most the product of the lengths of the rests (Cauchy-Schwarz).
So a matrix of k instead of D numbers per tile bounds all similarities from above; only tiles whose bound is higher than
the similarity of the best ones found are compared themselves. The result is that of a search through everything.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

DIRECTIONS = 64
FIRST = 2_048  # candidates that are compared first, those with the highest bounds
MOST = 0.1  # fraction of all rows above which comparing candidates one by one takes longer than comparing everything
SLACK = 1e-5  # of a float32 product of unit-length vectors


class Part(Protocol):
    """The rows of one slide, see :class:`~dino.extraction.encoder_features.SlideFeatures`."""

    def unit(self, rows: np.ndarray) -> np.ndarray:
        """Rows of unit length, float32."""
        ...

    def unit_blocks(self) -> Iterator[np.ndarray]:
        """All of them, block by block."""
        ...


class Bounds:
    """Upper bounds of the similarity of a vector to all rows; 4 (k + 1) bytes a row.

    Args:
        parts: The rows of each slide.
        sample: ``(n, D)`` unit-length rows that the directions are fitted to.
        directions: k.
    """

    def __init__(self, parts: Sequence[Part], sample: np.ndarray, directions: int = DIRECTIONS) -> None:
        _, vectors = np.linalg.eigh((sample.T @ sample).astype(np.float64))  # ascending
        self._basis = vectors[:, ::-1][:, :directions].astype(np.float32)  # (D, k)
        self._parts = parts
        coordinates = [[block @ self._basis for block in part.unit_blocks()] for part in parts]
        self.starts = np.cumsum([0, *(sum(map(len, blocks)) for blocks in coordinates)])
        self._coordinates = np.concatenate([block for blocks in coordinates for block in blocks])  # (N, k)
        self._rests = _rest(self._coordinates)  # (N,)

    def nearest(self, query: np.ndarray, count: int, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The rows that are most similar to a vector.

        Args:
            query: ``(D,)`` of unit length.
            count: Number of rows.
            excluded: ``(N,)`` bool, rows that are left out.

        Returns:
            Their numbers over all parts and similarities, the most similar first; None where the bounds exclude so few
            rows that comparing all of them is faster.
        """
        inside = query @ self._basis  # (k,)
        bounds = self._coordinates @ inside
        bounds += self._rests * _rest(inside[None])[0]
        bounds += SLACK
        bounds[excluded] = -np.inf
        first = min(len(bounds), max(FIRST, 8 * count))
        rows = np.argpartition(-bounds, first - 1)[:first]
        similar = self._similar(rows, query)
        least = np.partition(similar, -count)[-count] if len(rows) >= count else -np.inf
        bounds[rows] = -np.inf
        further = np.flatnonzero(bounds > least)
        if len(further) > MOST * len(bounds):
            return None
        rows, similar = np.concatenate([rows, further]), np.concatenate([similar, self._similar(further, query)])
        known = ~excluded[rows]
        rows, similar = rows[known], similar[known]
        order = np.lexsort((rows, -similar))[:count]
        return rows[order], similar[order]

    def _similar(self, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Similarity of some rows, in the given order, from their features."""
        order = np.argsort(rows)
        found = np.empty(len(rows), np.float32)
        part_of = np.searchsorted(self.starts, rows[order], side="right") - 1
        for part in np.unique(part_of):
            chosen = order[part_of == part]
            found[chosen] = self._parts[part].unit(rows[chosen] - self.starts[part]) @ query
        return found


def _rest(coordinates: np.ndarray) -> np.ndarray:
    """Length of what is outside the directions of unit-length vectors, rounded up."""
    return np.sqrt(np.maximum(0, 1 - (coordinates**2).sum(1)) + 1e-6)
