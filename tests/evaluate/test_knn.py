import math

import numpy as np
import pytest
import torch

from dino.errors import ConfigError, DataError
from dino.evaluate import knn
from dino.evaluate.knn import knn_scores, weighted_knn


def features(rows, dim, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, dim))).float()


def by_hand(reference, labels, query, k, temperature, classes):
    """The definition, one query and one neighbour at a time, in double precision."""
    unit_r = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in reference.double().tolist()]
    unit_q = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in query.double().tolist()]
    result = []
    for q in unit_q:
        similarity = [sum(a * b for a, b in zip(q, r, strict=True)) for r in unit_r]
        nearest = sorted(range(len(similarity)), key=lambda i: (-similarity[i], i))[:k]
        votes = [0.0] * classes
        for i in nearest:
            votes[int(labels[i])] += math.exp(similarity[i] / temperature)
        result.append([v / sum(votes) for v in votes])
    return np.array(result)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_agrees_with_the_definition(temperature):
    reference, query = features(50, 6, 0), features(17, 6, 1)
    labels = torch.arange(50) % 4
    found = weighted_knn(reference, labels, query, [1, 5, 20, 50], temperature, 4)
    for k, probabilities in found.items():
        wanted = by_hand(reference, labels, query, k, temperature, 4)
        np.testing.assert_allclose(probabilities.numpy(), wanted, atol=2e-5)  # similarities are float32


def test_chunks_do_not_matter(monkeypatch):
    reference, query, labels = features(40, 5, 0), features(23, 5, 1), torch.arange(40) % 3
    whole = weighted_knn(reference, labels, query, [7], 0.07, 3)[7]
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", 40 * 4)
    torch.testing.assert_close(weighted_knn(reference, labels, query, [7], 0.07, 3)[7], whole, rtol=0, atol=1e-6)


def test_blocks_of_references_and_queries_do_not_matter(monkeypatch):
    """Also where references of several blocks are equally similar, and where a block has fewer than k."""
    generator = np.random.default_rng(0)
    directions = torch.from_numpy(np.eye(5)[generator.integers(0, 5, 60)]).float()  # twelve of each, all equal
    reference = torch.cat([directions, features(17, 5, 1)])
    query, labels = torch.cat([torch.eye(5), features(9, 5, 2)]), torch.from_numpy(generator.integers(0, 4, 77))
    whole = weighted_knn(reference, labels, query, [3, 10, 60], 0.07, 4)
    monkeypatch.setattr(knn, "ROWS_AT_ONCE", 8)
    for k, found in weighted_knn(reference, labels, query, [3, 10, 60], 0.07, 4).items():
        torch.testing.assert_close(found, whole[k], rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.numpy(), by_hand(reference, labels, query, k, 0.07, 4), atol=2e-5)


def test_equal_similarities_are_taken_in_the_order_of_the_reference():
    direction = torch.tensor([[1.0, 2.0, 3.0]])
    reference = direction.repeat(9, 1)
    labels = torch.tensor([2, 2, 1, 1, 1, 1, 0, 0, 0])
    probabilities = weighted_knn(reference, labels, direction, [2, 3], 0.07, 3)
    assert probabilities[2].tolist() == [[0, 0, 1]]
    np.testing.assert_allclose(probabilities[3], [[0, 1 / 3, 2 / 3]])


def test_order_of_negative_and_positive_similarities():
    similarity = torch.tensor([[-0.5, 0.25, -0.0, 0.0, -0.25, 0.5]])
    values, index = knn._nearest(similarity, 6)
    assert index.tolist() == [[5, 1, 2, 3, 4, 0]]
    assert values.tolist() == [[0.5, 0.25, 0, 0, -0.25, -0.5]]


def test_a_small_temperature_does_not_overflow():
    reference, labels = features(10, 3, 0), torch.arange(10) % 2
    probabilities = weighted_knn(reference, labels, reference, [5], 1e-4, 2)[5]
    assert probabilities.isfinite().all()
    assert probabilities.argmax(1).tolist() == labels.tolist()


def test_k_is_capped_with_a_warning(capsys):
    reference, labels = features(10, 3, 0), torch.arange(10) % 2
    found = weighted_knn(reference, labels, features(4, 3, 1), [10, 200], 0.07, 2)
    torch.testing.assert_close(found[200], found[10])
    assert "k=200" in capsys.readouterr().out


def test_scores_take_labels_of_any_kind_and_count_an_unknown_class_as_wrong():
    reference = torch.eye(3)
    query = torch.cat([torch.eye(3), torch.tensor([[1.0, 0.0, 0.1]])])
    scores = knn_scores(reference, ["a", "b", "c"], query, ["a", "b", "c", "new"], [1], 0.07)
    assert scores["knn_1_accuracy"] == 0.75
    assert scores["knn_1_balanced_accuracy"] == 0.75
    booleans = knn_scores(reference, [True, False, False], query[:3], [True, False, False], [1, 2], 0.07)
    assert booleans["knn_1_accuracy"] == booleans["knn_1_auc"] == booleans["knn_2_accuracy"] == 1


def test_undefined_scores_are_none():
    scores = knn_scores(torch.eye(3), [0, 1, 1], torch.eye(3)[1:], [1, 1], [1], 0.07)
    assert scores == {"knn_1_accuracy": 1.0, "knn_1_balanced_accuracy": 1.0, "knn_1_auc": None}


def test_invalid_input_is_an_error():
    good, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(DataError, match="finite"):
        weighted_knn(good / 0, labels, good, [1], 0.07, 3)
    with pytest.raises(DataError, match=r"\(3, 3\) and \(2, 4\)"):
        weighted_knn(good, labels, torch.zeros(2, 4), [1], 0.07, 3)
    with pytest.raises(ConfigError, match="k"):
        weighted_knn(good, labels, good, [0], 0.07, 3)
    with pytest.raises(ConfigError, match="temperature"):
        weighted_knn(good, labels, good, [1], 0.0, 3)
