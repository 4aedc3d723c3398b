"""The prototypes of a DINO head as clusters of the tiles' features."""

from pathlib import Path

import numpy as np
import torch

from dino.errors import ConfigError
from dino.extraction.colours import Clusters
from dino.extraction.encoder_features import BLOCK_ROWS, EncoderFeatures
from dino.extraction.folders import tile_folder
from dino.extraction.record import EARLIER, RECORD, read_record
from dino.models.checkpoint import resolve_run
from dino.models.head import DINOHead, load_head

HEAD_ROWS = 1024  # tiles whose logits are computed at a time


def head_of_features(model: str, root: Path, encoder: str) -> DINOHead:
    """The DINO head of the model whose features there are.

    Args:
        model: Run folder or checkpoint.
        root: ROOT.
        encoder: Name of its features.

    Raises:
        ConfigError: If there is none, or the features are not what it takes.
        CheckpointError: If it cannot be read.
    """
    path = Path(model)
    head = load_head(resolve_run(path) if path.is_dir() else path)
    if head is None:
        raise ConfigError(
            f"expected a run or a checkpoint with a DINO head for method=prototypes, found none in {model}; use "
            "method=kmeans"
        )
    kind = (EARLIER | read_record(tile_folder(root, encoder) / RECORD))["features"]
    if kind != "cls":
        raise ConfigError(
            f"expected features of the cls token for method=prototypes, found features={kind}; use method=kmeans"
        )
    return head


def mean_of_prototypes(head: DINOHead, features: EncoderFeatures, count: int) -> Clusters:
    """The mean features of the tiles whose largest logit is that of one of the most used prototypes.

    Args:
        head: The head.
        features: The features.
        count: Number of prototypes.
    """
    size = len(head.last_layer.weight_v)
    chosen = [
        np.concatenate([chosen_prototypes(head, rows) for rows in features.slide(slide).blocks()])
        for slide in features.slide_ids
    ]
    used = np.bincount(np.concatenate(chosen), minlength=size)
    most = np.argsort(-used, kind="stable")[:count]
    most = most[used[most] > 0]
    sums = np.zeros((len(most), features.slide(features.slide_ids[0]).rows.shape[1]))
    for slide, found in zip(features.slide_ids, chosen, strict=True):
        for start, rows in zip(range(0, len(found), BLOCK_ROWS), features.slide(slide).unit_blocks(), strict=True):
            sums += np.equal.outer(most, found[start : start + BLOCK_ROWS]).astype(np.float32) @ rows
    return Clusters((sums / used[most, None]).astype(np.float32))


def chosen_prototypes(head: DINOHead, rows: np.ndarray) -> np.ndarray:
    """The prototype with the largest logit of each row, ``(n,)`` int64."""
    with torch.inference_mode():
        return np.concatenate([head(part).argmax(1).numpy() for part in torch.tensor(rows).split(HEAD_ROWS)])
