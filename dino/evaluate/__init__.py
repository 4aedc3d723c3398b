"""Judging frozen features: tensors and tables in, numbers and words out (:func:`dino.evaluate.verdict.verdict`)."""

from dino.evaluate.knn import knn_scores, weighted_knn
from dino.evaluate.labels import LabelTable, check_leakage, read_labels
from dino.evaluate.retrieval import effective_rank, mean_pairwise_cosine, own_place_accuracy, pixel_features
from dino.evaluate.verdict import Score, Signs, Verdict, difference_error

__all__ = [
    "LabelTable",
    "Score",
    "Signs",
    "Verdict",
    "check_leakage",
    "difference_error",
    "effective_rank",
    "knn_scores",
    "mean_pairwise_cosine",
    "own_place_accuracy",
    "pixel_features",
    "read_labels",
    "weighted_knn",
]
