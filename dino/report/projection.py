"""Features as colours, nearest neighbours, and farthest-point sampling, in NumPy."""

import numpy as np

from dino.extraction.colours import ColourBasis


def pca_rgb(features: np.ndarray) -> np.ndarray:
    """The first three principal components of unit-length features as red, green and blue.

    Each component is scaled from its 2nd and 98th percentile to [0, 1], see :class:`ColourBasis`.

    Args:
        features: Float, (N, D).

    Returns:
        float64, (N, 3) in [0, 1]; 0.5 in a component without variance.
    """
    unit = unit_rows(features)
    return ColourBasis.fit(unit).scaled(unit)


def pca(features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first principal components of unit-length features.

    The sign of a component is arbitrary; the one with a positive third moment is used, so that equal features get equal
    components.

    Args:
        features: Float, (N, D).
        count: Number of components.

    Returns:
        float64, (N, count), and the fraction of the variance of each component; 0 for those that do not exist.
    """
    unit = unit_rows(features)
    centred = unit - unit.mean(0)
    # Left singular vectors times singular values are the scores; D is at most a few hundred, N a few thousand.
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    scores, fractions = np.zeros((len(features), count)), np.zeros(count)
    found = min(count, len(singular))
    scores[:, :found] = left[:, :found] * singular[:found]
    scores *= np.where((scores**3).sum(0) < 0, -1.0, 1.0)
    fractions[:found] = singular[:found] ** 2 / max((singular**2).sum(), np.finfo(float).tiny)
    return scores, fractions


def nearest_neighbours(
    features: np.ndarray, query: int, count: int, among: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` rows most similar to row ``query``, without that row.

    Args:
        features: Float, (N, D).
        query: Index of a row.
        count: Number of neighbours; fewer are returned where there are not as many rows.
        among: bool (N,): the rows that may be neighbours; None for all.

    Returns:
        Indices, most similar first, and their cosine similarities.
    """
    unit = unit_rows(features)
    similarity = unit @ unit[query]
    allowed = np.ones(len(features), dtype=bool) if among is None else among.copy()
    allowed[query] = False
    order = np.argsort(-np.where(allowed, similarity, -np.inf), kind="stable")[: min(count, int(allowed.sum()))]
    return order, similarity[order]


def farthest_points(features: np.ndarray, count: int) -> list[int]:
    """Farthest-point sampling by cosine similarity, starting at the row closest to the mean.

    Args:
        features: Float, (N, D).
        count: Number of rows to choose.

    Returns:
        ``min(count, N)`` distinct indices.
    """
    unit = unit_rows(features)
    chosen = [int(np.argmax(unit @ unit.mean(0)))]
    closest = unit @ unit[chosen[0]]
    while len(chosen) < min(count, len(features)):
        closest[chosen] = np.inf
        chosen.append(int(np.argmin(closest)))
        closest = np.maximum(closest, unit @ unit[chosen[-1]])
    return chosen


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, in float64; a row of zeros stays zero."""
    features = np.asarray(features, dtype=np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length == 0, 1.0, length)
