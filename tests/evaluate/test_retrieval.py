import math

import pytest
import torch

from dino.errors import DataError
from dino.evaluate import retrieval
from dino.evaluate.retrieval import effective_rank, mean_pairwise_cosine, pixel_features, self_retrieval_accuracy


def test_self_retrieval():
    reference = torch.eye(4)
    query = torch.tensor([[2.0, 0.1, 0, 0], [0, 1, 0.5, 0], [0.9, 0, 0.1, 0], [0, 0, 0, 3]])
    assert self_retrieval_accuracy(query, reference) == 0.75
    assert self_retrieval_accuracy(query * 1000, reference) == 0.75  # the length of a feature does not matter


def test_features_all_alike_score_chance():
    assert self_retrieval_accuracy(torch.ones(5, 3), torch.ones(5, 3)) == pytest.approx(0.2)


def test_self_retrieval_does_not_depend_on_chunks(monkeypatch):
    torch.manual_seed(0)
    query, reference = torch.randn(11, 4), torch.randn(11, 4)
    whole = self_retrieval_accuracy(query, reference)
    monkeypatch.setattr(retrieval, "SIMILARITIES_AT_ONCE", 22)
    assert self_retrieval_accuracy(query, reference) == whole


def test_self_retrieval_needs_equal_shapes():
    with pytest.raises(DataError):
        self_retrieval_accuracy(torch.ones(3, 2), torch.ones(4, 2))


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    assert effective_rank(torch.zeros(5, 3)) == 1
    shares = [0.5, 0.25, 0.25]
    entropy = -sum(s * math.log(s) for s in shares)
    assert effective_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(math.exp(entropy))


def test_mean_pairwise_cosine_is_the_mean_over_pairs():
    torch.manual_seed(0)
    features = torch.randn(6, 3).double()
    pairs = [
        torch.cosine_similarity(features[i], features[j], dim=0).item() for i in range(6) for j in range(6) if i != j
    ]
    assert mean_pairwise_cosine(features) == pytest.approx(sum(pairs) / len(pairs))
    with pytest.raises(DataError):
        mean_pairwise_cosine(features[:1])


def test_pixel_features_know_no_colour():
    images = torch.randint(0, 200, (2, 3, 32, 48), dtype=torch.uint8)
    features = pixel_features(images)
    assert features.shape == (2, 192)
    torch.testing.assert_close(pixel_features(images + 40), features, rtol=0, atol=1e-4)
