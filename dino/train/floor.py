"""What a run is measured against at its end, where no labels are needed: two views of a sample must find each other."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dino.data.loader import Batch
from dino.evaluate.retrieval import effective_rank, mean_pairwise_cosine, own_place_accuracy
from dino.evaluate.verdict import Score, Signs, Verdict, difference_error, verdict
from dino.models.backbone import Backbone
from dino.train.loop import Crops


@torch.no_grad()
def paired_features(backbone: Backbone, batches: Iterable[Batch], crops: Crops, device: torch.device) -> Tensor:
    """Features of the two global views of every sample.

    Args:
        backbone: In any mode; it is given back in the same.
        batches: Samples with drawn crops.
        crops: Applies them.
        device: Where the backbone lives.

    Returns:
        ``(2, N, D)`` float32 features on the CPU.
    """
    was_training = backbone.training
    backbone.eval()
    dtype = next(backbone.parameters()).dtype
    found = []
    for batch in batches:
        views = crops.apply(batch.inputs.to(device), batch.parameters)[0][:2].to(dtype)  # (2, B, C, h, w)
        found.append(backbone(views.flatten(0, 1), cls_only=True).cls.unflatten(0, views.shape[:2]).float().cpu())
    backbone.train(was_training)
    return torch.cat(found, dim=1)


def judge_run(
    teacher: Tensor, untrained: Tensor, *, entropy: float | None, loss: float | None, labelled: Score | None
) -> tuple[Verdict, dict[str, float]]:
    """The verdict on a finished run, with the numbers it rests on.

    Args:
        teacher: ``(2, N, D)`` features of pairs of views by the trained teacher.
        untrained: The same by the start weights.
        entropy: Teacher entropy relative to ln K.
        loss: Loss relative to ln K.
        labelled: kNN score, where labels were given; else pairs of views decide.
    """
    places = {"teacher": own_place_accuracy(*teacher), "untrained": own_place_accuracy(*untrained)}
    count = teacher.shape[1]
    error = difference_error(places["teacher"], places["untrained"], count)
    score = labelled or Score("share of samples whose second view is found", **places, standard_error=error)
    numbers = {
        "own_place_teacher": places["teacher"],
        "own_place_untrained": places["untrained"],
        "effective_rank": effective_rank(teacher[0]),
        "mean_cosine": mean_pairwise_cosine(teacher[0]),
    }
    signs = Signs(entropy, loss, numbers["effective_rank"], numbers["mean_cosine"], teacher.shape[-1], score)
    return verdict(signs), numbers
