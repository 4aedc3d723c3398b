"""Features as colours and as neighbours: arrays in, arrays out."""

import numpy as np

LOW, HIGH = 2.0, 98.0  # percentiles that become 0 and 1: a few odd tiles must not swallow the whole range


def pca_rgb(features: np.ndarray) -> np.ndarray:
    """The first three principal components of unit-length features as red, green and blue.

    Each component is stretched from its 2nd to its 98th percentile. The sign of a component is arbitrary, so the
    direction with the larger third moment is taken as positive: the same features always give the same colours.

    Args:
        features: Float, (N, D).

    Returns:
        float64, (N, 3) in [0, 1]; 0.5 throughout a component without variance.
    """
    unit = normalised(features)
    centred = unit - unit.mean(0)
    # Left singular vectors times singular values are the scores; D is at most a few hundred, N a few thousand.
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    scores = np.zeros((len(features), 3))
    count = min(3, len(singular))
    scores[:, :count] = left[:, :count] * singular[:count]
    scores *= np.where((scores**3).sum(0) < 0, -1.0, 1.0)
    low, high = np.percentile(scores, [LOW, HIGH], axis=0)
    flat = high - low < 1e-9
    stretched = np.clip((scores - low) / np.where(flat, 1.0, high - low), 0.0, 1.0)
    return np.where(flat, 0.5, stretched)


def nearest(features: np.ndarray, query: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` rows most similar to row ``query``, itself left out.

    Args:
        features: Float, (N, D).
        query: Index of the row that asks.
        count: How many to return, at most N - 1.

    Returns:
        Indices, most similar first, and their cosine similarities.
    """
    unit = normalised(features)
    similarity = unit @ unit[query]
    similarity[query] = -np.inf
    order = np.argsort(-similarity, kind="stable")[: min(count, len(features) - 1)]
    return order, similarity[order]


def spread_out(features: np.ndarray, count: int) -> list[int]:
    """Rows that differ most from one another: start at the one nearest the mean, then farthest-point steps.

    Args:
        features: Float, (N, D).
        count: How many rows to choose.

    Returns:
        ``min(count, N)`` distinct indices.
    """
    unit = normalised(features)
    chosen = [int(np.argmax(unit @ unit.mean(0)))]
    closest = unit @ unit[chosen[0]]
    while len(chosen) < min(count, len(features)):
        closest[chosen] = np.inf
        chosen.append(int(np.argmin(closest)))
        closest = np.maximum(closest, unit @ unit[chosen[-1]])
    return chosen


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, in float64; a row of zeros stays zero."""
    features = np.asarray(features, dtype=np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length == 0, 1.0, length)
