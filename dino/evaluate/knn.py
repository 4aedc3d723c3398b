"""Weighted k-nearest-neighbour classification of frozen features."""

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dino import progress
from dino.errors import ConfigError, DataError
from dino.evaluate.metrics import accuracy, auc, balanced_accuracy

SIMILARITIES_AT_ONCE = 1 << 24  # 16 M values: 64 MB of similarities and 128 MB of sorting keys
ROWS_AT_ONCE = 1 << 15  # features of queries, and of references, as float32


class Vectors(Protocol):
    """Feature vectors that are read in slices: a tensor ``(N, D)``, or what makes one of each slice."""

    @property
    def shape(self) -> Sequence[int]:
        """``(N, D)``."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def weighted_knn(
    reference: Vectors,
    reference_labels: Tensor,
    query: Vectors,
    k: Sequence[int],
    temperature: float,
    classes: int,
) -> dict[int, Tensor]:
    """Class probabilities by the weighted votes of the nearest neighbours.

    As in DINO (Caron et al. 2021, arXiv 2104.14294, appendix F.1; the vote is that of Wu et al. 2018, arXiv
    1805.01978, eq. 7): among the k references of highest cosine similarity ``s``, each votes for its class with weight
    ``exp(s / temperature)``. Neighbours are found once, for the largest k; equal similarities are taken in the order
    of the reference set, so that the result is the same on every device. Queries and references are read in blocks of
    :data:`ROWS_AT_ONCE`, so that float32 copies of all of them are never in memory.

    Args:
        reference: ``(N, D)`` features of any floating-point type.
        reference_labels: ``(N,)`` class numbers in ``[0, classes)``.
        query: ``(M, D)`` features.
        k: Numbers of neighbours; each is capped to N with a warning.
        temperature: Temperature of the votes (0.07 in the paper).
        classes: Number of classes C.

    Returns:
        For every entry of ``k`` the ``(M, C)`` float64 probabilities, rows summing to 1.

    Raises:
        DataError: If the features are not two matrices of one width, or hold non-finite values.
        ConfigError: If a ``k`` or the temperature is not positive.
    """
    check_k(k, temperature)
    _check(reference, reference_labels, query)
    used = {wanted: capped_k(wanted, len(reference)) for wanted in k}
    results: dict[int, list[Tensor]] = {wanted: [] for wanted in used}
    for start in range(0, len(query), ROWS_AT_ONCE):
        rows = _unit(query[start : start + ROWS_AT_ONCE])
        similarity, index = _neighbours(reference, rows, max(used.values()))  # (m, k)
        votes = ((similarity - similarity[:, :1]).double() / temperature).exp()  # the largest is 1: never overflows
        labels = reference_labels.to(index.device)[index]  # (m, k)
        for wanted, count in used.items():
            summed = votes.new_zeros(len(rows), classes).scatter_add_(1, labels[:, :count], votes[:, :count])
            results[wanted].append(summed / summed.sum(1, keepdim=True))
    return {wanted: torch.cat(parts) for wanted, parts in results.items()}


def knn_scores(
    reference: Tensor,
    reference_labels: Sequence[Hashable],
    query: Tensor,
    query_labels: Sequence[Hashable],
    k: Sequence[int],
    temperature: float,
) -> dict[str, float | None]:
    """Score features by weighted kNN (:func:`weighted_knn`).

    Args:
        reference: ``(N, D)`` features of the labelled reference set.
        reference_labels: N labels of any kind.
        query: ``(M, D)`` features of the queries.
        query_labels: M labels. One that no reference has cannot be predicted, and counts as wrong.
        k: Numbers of neighbours.
        temperature: Temperature of the votes.

    Returns:
        ``knn_<k>_accuracy``, ``knn_<k>_balanced_accuracy`` and ``knn_<k>_auc`` for every k; None where undefined.
    """
    names = sorted({*reference_labels, *query_labels}, key=lambda label: (str(type(label)), label))  # type: ignore[type-var]
    number = {name: i for i, name in enumerate(names)}
    known = torch.tensor([number[label] for label in reference_labels], dtype=torch.long)
    truth = torch.tensor([number[label] for label in query_labels], dtype=torch.long)
    scores: dict[str, float | None] = {}
    for count, votes in weighted_knn(reference, known, query, k, temperature, len(names)).items():
        probabilities = votes.cpu()
        predicted = probabilities.argmax(1)
        scores[f"knn_{count}_accuracy"] = accuracy(truth, predicted)
        scores[f"knn_{count}_balanced_accuracy"] = balanced_accuracy(truth, predicted)
        scores[f"knn_{count}_auc"] = auc(truth, probabilities)
    return scores


def check_k(k: Sequence[int], temperature: float) -> None:
    """Check the settings of weighted kNN.

    Raises:
        ConfigError: If there is no ``k``, or a ``k`` or the temperature is not positive.
    """
    if not k or min(k) < 1:
        raise ConfigError(f"expected at least one k, each 1 or more, found {list(k)}")
    if not temperature > 0:
        raise ConfigError(f"expected a temperature above 0, found {temperature}")


@cache
def capped_k(k: int, references: int) -> int:
    """``k``, or the size of the reference set where that is smaller (with one warning)."""
    if k > references:
        progress.warn(f"k={k} is more than the {references} references; using k={references}")
    return min(k, references)


def _neighbours(reference: Vectors, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest cosine similarities ``(m, k)`` of queries of length 1, and the indices of their references."""
    best, index = query.new_empty(len(query), 0), query.new_empty(len(query), 0, dtype=torch.long)
    for start in range(0, len(reference), ROWS_AT_ONCE):
        block = _unit(reference[start : start + ROWS_AT_ONCE])
        chunks = query.split(max(1, SIMILARITIES_AT_ONCE // len(block)))
        found = [_nearest(chunk @ block.T, min(k, len(block))) for chunk in chunks]
        # Earlier references stand first, so that equal similarities stay in the order of the references.
        similarity = torch.cat([best, torch.cat([values for values, _ in found])], 1)
        rows = torch.cat([index, start + torch.cat([columns for _, columns in found])], 1)
        best, place = _nearest(similarity, min(k, similarity.shape[1]))
        index = rows.gather(1, place)
    return best, index


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their columns; equal values in the order of the columns."""
    bits = (similarity + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 and 0.0 one number
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))  # integers in the order of the floats
    columns = torch.arange(similarity.shape[1], device=similarity.device)
    index = (ordered * (1 << 32) - columns).topk(k, dim=1).indices  # no two keys are equal
    return similarity.gather(1, index), index


def _unit(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise DataError("kNN: expected finite features, found NaN or infinity; the training has diverged")
    return F.normalize(features.float(), dim=1)


def _check(reference: Vectors, labels: Tensor, query: Vectors) -> None:
    shapes = f"{tuple(reference.shape)} and {tuple(query.shape)}"
    if len(reference.shape) != 2 or len(query.shape) != 2 or reference.shape[1] != query.shape[1]:
        raise DataError(f"kNN: expected reference and query features (N, D) and (M, D), found {shapes}")
    if not len(reference) or not len(query) or len(labels) != len(reference):
        raise DataError(f"kNN: expected features and as many labels, found {shapes} and {len(labels)} labels")
