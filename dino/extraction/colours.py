"""Features as colours that compare between slides: principal components and clusters, fitted over many slides."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LOW, HIGH = 2.0, 98.0  # percentiles of a component that become 0 and 255, so that outliers do not determine the range
SEED = 0  # of k-means
PASSES = 20  # of k-means over all rows
SETTLED = 1e-4  # distance that a centre moves in the last pass; features have length 1

# Distinct on pink tissue; the first seven also for most people with a colour vision deficiency (Okabe & Ito 2008).
PALETTE = (
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (240, 228, 66), (86, 180, 233), (213, 94, 0), (204, 121, 167)),
    *((102, 37, 6), (128, 205, 60), (110, 64, 170), (130, 235, 210), (0, 68, 27), (170, 30, 80), (150, 140, 60)),
    *((30, 20, 90), (187, 187, 187)),
)


@dataclass(frozen=True)
class ColourBasis:
    """Principal components of unit-length features, and the range of each.

    Attributes:
        mean: ``(D,)``.
        components: ``(D, 3)``.
        low: ``(3,)``, becomes 0.
        high: ``(3,)``, becomes 255.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def fit(cls, unit: np.ndarray) -> "ColourBasis":
        """Fit to unit-length rows ``(n, D)`` of all slides.

        The sign of a component is arbitrary; the one with a positive third moment is used, so that the same features
        get the same colours.
        """
        mean = unit.mean(0)
        centred = (unit - mean).astype(np.float64)
        _, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
        components = np.zeros((unit.shape[1], 3))
        found = min(3, unit.shape[1])
        components[:, :found] = vectors[:, ::-1][:, :found]
        scores = centred @ components  # (n, 3)
        components *= np.where((scores**3).sum(0) < 0, -1.0, 1.0)
        low, high = np.percentile(centred @ components, [LOW, HIGH], axis=0)
        return cls(mean, components.astype(unit.dtype), low, high)

    def rgb(self, unit: np.ndarray) -> np.ndarray:
        """Colours of unit-length rows: uint8 ``(n, 3)``; 128 in a component without variance."""
        return np.round(255 * self.scaled(unit)).astype(np.uint8)

    def scaled(self, unit: np.ndarray) -> np.ndarray:
        """Colours of unit-length rows: float64 ``(n, 3)`` in [0, 1]; 0.5 in a component without variance."""
        scores = (unit - self.mean) @ self.components
        constant = self.high - self.low < 1e-9
        scaled = np.clip((scores - self.low) / np.where(constant, 1.0, self.high - self.low), 0.0, 1.0)
        return np.where(constant, 0.5, scaled)


@dataclass(frozen=True)
class Clusters:
    """k-means of unit-length features; cluster 0 has the most tiles of those it was fitted to.

    Attributes:
        centres: ``(k, D)`` float32.
    """

    centres: np.ndarray

    @classmethod
    def fit(cls, unit: np.ndarray, count: int) -> "Clusters":
        """Fit ``count`` clusters, or as many as there are rows, to unit-length rows ``(n, D)``."""
        from sklearn.cluster import KMeans

        count = min(count, len(np.unique(unit, axis=0)))
        fitted = KMeans(count, n_init="auto", random_state=SEED).fit(unit)  # k-means++ from one start
        sizes = np.bincount(np.asarray(fitted.labels_), minlength=count)
        return cls(fitted.cluster_centers_[np.argsort(-sizes, kind="stable")].astype(np.float32))

    def refined(self, blocks: Callable[[], Iterator[np.ndarray]]) -> "Clusters":
        """Continue k-means over all rows, of which one block is in memory at a time.

        Each pass assigns all rows, then moves the centres to the means (Lloyd 1982), so that the result does not depend
        on how rows are divided into blocks, as it does with mini-batches.

        Args:
            blocks: Gives all unit-length rows, ``(n, D)`` each, anew at each call.
        """
        centres = self.centres.astype(np.float64)
        for _ in range(PASSES):
            current, sums, counts = Clusters(centres.astype(np.float32)), np.zeros_like(centres), np.zeros(len(centres))
            for rows in blocks():
                nearest = current.assign(rows)
                chosen = np.equal.outer(np.arange(len(centres)), nearest).astype(np.float32)  # (k, n)
                sums += chosen @ rows
                counts += np.bincount(nearest, minlength=len(centres))
            moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)
            distance = float(np.linalg.norm(moved - centres, axis=1).max())
            centres = moved
            if distance < SETTLED:
                break
        return Clusters(centres.astype(np.float32))

    def ordered(self, sizes: np.ndarray) -> "Clusters":
        """These with the largest first; those that no row is nearest to are left out.

        Args:
            sizes: ``(k,)`` number of rows of each.
        """
        order = np.argsort(-sizes, kind="stable")
        return Clusters(self.centres[order[sizes[order] > 0]])

    def __len__(self) -> int:
        return len(self.centres)

    def assign(self, unit: np.ndarray) -> np.ndarray:
        """The nearest centre of each row, int64 ``(n,)``."""
        return self.distances(unit).argmin(1)

    def distances(self, unit: np.ndarray) -> np.ndarray:
        """Squared distance to each centre, up to the constant of unit length: ``(n, k)``."""
        return (self.centres**2).sum(1) - 2 * (unit @ self.centres.T)

    @property
    def colours(self) -> Sequence[tuple[int, int, int]]:
        """RGB of each cluster: those of the palette, then lighter, darker and paler ones."""
        return [_shade(PALETTE[i % len(PALETTE)], i // len(PALETTE)) for i in range(len(self))]


def _shade(colour: tuple[int, int, int], number: int) -> tuple[int, int, int]:
    """A colour that is different for each ``number``, which is the colour itself for 0."""
    towards, fraction = ((0, 0.0), (255, 0.45), (0, 0.4), (255, 0.7))[number % 4]
    red, green, blue = (round(value + (towards - value) * fraction) for value in colour)
    return red, green, blue
