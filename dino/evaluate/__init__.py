"""Evaluation of features: kNN classification, self-retrieval, tables of labels, and the verdict on a run."""

from dino.evaluate.knn import capped_k, check_k, knn_scores, weighted_knn
from dino.evaluate.labels import LabelTable, join_slides, read_labels
from dino.evaluate.leakage import Pretraining, check_leakage
from dino.evaluate.results import MODEL
from dino.evaluate.retrieval import effective_rank, mean_pairwise_cosine, pixel_features, self_retrieval_accuracy
from dino.evaluate.selection import check_selection, recorded_selection
from dino.evaluate.verdict import INITIAL, RANDOM, Score, Signs, Verdict, difference_error, in_words

__all__ = [
    "INITIAL",
    "MODEL",
    "RANDOM",
    "LabelTable",
    "Pretraining",
    "Score",
    "Signs",
    "Verdict",
    "capped_k",
    "check_k",
    "check_leakage",
    "check_selection",
    "difference_error",
    "effective_rank",
    "in_words",
    "join_slides",
    "knn_scores",
    "mean_pairwise_cosine",
    "pixel_features",
    "read_labels",
    "recorded_selection",
    "self_retrieval_accuracy",
    "weighted_knn",
]
