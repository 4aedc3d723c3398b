"""Evaluation of features without labels: self-retrieval, effective rank and similarity."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dino.errors import DataError

SIMILARITIES_AT_ONCE = 1 << 24


def self_retrieval_accuracy(query: Tensor, reference: Tensor) -> float:
    """Fraction of queries whose nearest reference is of the same sample: the mean of :func:`self_retrieval_hits`."""
    return float(self_retrieval_hits(query, reference).mean())


def self_retrieval_hits(query: Tensor, reference: Tensor) -> Tensor:
    """Whether the nearest reference of each query, by cosine similarity, is of the same sample.

    Query i and reference i are two augmented views of sample i. Of n equally near references each counts 1/n, so that
    constant features have the accuracy of chance, 1/N.

    Args:
        query: ``(N, D)`` features.
        reference: ``(N, D)`` features in the same order.

    Returns:
        ``(N,)`` float64 on the CPU, in [0, 1].

    Raises:
        DataError: If the two are not of one shape, or empty.
    """
    if query.shape != reference.shape or query.ndim != 2 or not len(query):
        raise DataError(f"expected queries and references of one shape (N, D), found {query.shape}, {reference.shape}")
    reference, query = F.normalize(reference.float(), dim=1), F.normalize(query.float(), dim=1)
    size = max(1, SIMILARITIES_AT_ONCE // len(reference))
    hits = []
    for start in range(0, len(query), size):
        similarity = query[start : start + size] @ reference.T  # (m, N)
        rows = torch.arange(len(similarity), device=similarity.device)
        nearest = similarity == similarity.amax(1, keepdim=True)
        hits.append(nearest[rows, rows + start].double() / nearest.sum(1))
    return torch.cat(hits).cpu()


def effective_rank(features: Tensor) -> float:
    """Effective rank: the exponential of the entropy of the normalised singular values.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1. The features are not
    centred; subtract their mean first for the number of directions in which they *vary*.

    Args:
        features: ``(N, D)``.

    Returns:
        A number in [1, min(N, D)]; 1 for a matrix of zeros, NaN where a feature is not finite.
    """
    matrix = features.detach().cpu().double()
    if not matrix.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(matrix)
    total = values.sum()
    if total == 0:
        return 1.0
    return float(torch.special.entr(values / total).sum().exp())


def mean_pairwise_cosine(features: Tensor) -> float:
    """Mean cosine similarity of two different rows: 1 when all features have the same direction.

    Args:
        features: ``(N, D)`` with N >= 2.
    """
    count = len(features)
    if count < 2:
        raise DataError(f"expected at least two features to compare, found {count}")
    unit = F.normalize(features.detach().cpu().double(), dim=1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1)))


def pixel_features(images: Tensor, side: int = 8) -> Tensor:
    """A baseline without a network: each image averaged to 8 x 8 pixels, less its mean colour.

    Only differences within an image remain, so that its overall stain does not contribute.

    Args:
        images: uint8 or float ``(B, 3, H, W)``.
        side: Pixels along each axis.

    Returns:
        ``(B, 3 * side**2)`` float32.
    """
    small = F.adaptive_avg_pool2d(images.float(), side)
    return (small - small.mean((2, 3), keepdim=True)).flatten(1)
