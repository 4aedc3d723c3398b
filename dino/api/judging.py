"""The evaluation of a run: what scores it while it trains, and the verdict at its end."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from dino import progress
from dino.api.measuring import labelled_measure
from dino.api.run import Run
from dino.crops.parameters import GLOBAL_VIEWS
from dino.evaluate.selection import recorded_selection
from dino.evaluate.verdict import FROZEN, INITIAL, RANDOM, TEACHER
from dino.models.backbone import Backbone, build_backbone
from dino.models.weights import load_backbone_file, read_training
from dino.train.callbacks import Checkpoints
from dino.train.evaluator import (
    SELF_RETRIEVAL,
    Evaluator,
    Measure,
    PairedFeatures,
    evaluate_run,
    label_free_scores,
    paired_features,
)
from dino.train.loop import Trainer

VERDICT_QUERIES = 256  # at most
VERDICT_BATCH = 16
EVALUATIONS = 10  # of a run without labels, at most, unless evaluate.every_steps says otherwise
SHARE = 0.05  # of the operations of training, that evaluations of labelled rows take at most
FEWEST = 4  # evaluations of labelled rows in a run
DECLINE_PATIENCE = 3  # default of evaluate.decline_patience with model.init and labels


def build_evaluator(run: Run, checkpoints: Checkpoints) -> Evaluator | None:
    """The callback that scores a run while it trains, and what the run records of the rows that choose its checkpoints.

    With ``evaluate.labels`` or ``evaluate.robustness`` it scores labelled images, see :mod:`.measuring`. Without, a run
    with ``model.init`` is scored by self-retrieval, and any other is not.

    Raises:
        ConfigError: If ``evaluate.select`` does not fit the other settings.
        DataError: If the labels are invalid, name missing files, or share slides or patients with the training data.
    """
    settings, init = run.config.evaluate, run.config.model.init
    run.inherited = run.selection = recorded_selection(read_training(init) if init else {}) or []
    if settings.labels is not None or settings.robustness is not None:
        folder = checkpoints.folder
        measure = labelled_measure(run, str(folder.path), resumed=folder.steps_done() > 0)
        every = _interval(run, measure.tokens)
    elif init:
        measure, every = _label_free_measure(run), max(run.length.steps(1), math.ceil(run.length.total / EVALUATIONS))
    else:
        return None
    decline_patience = settings.decline_patience
    if decline_patience is None:
        decline_patience = DECLINE_PATIENCE if init and measure.labelled else 0
    return Evaluator(
        measure,
        _baselines(run, checkpoints.folder.initial_checkpoint),
        settings.every_steps or every or 1,
        settings.early_stopping_patience,
        decline_patience,
        checkpoints,
    )


def _interval(run: Run, tokens: int) -> int:
    """Steps between evaluations of labelled rows, and a line if they take much of the time.

    One epoch; or as many steps as it takes until evaluating teacher and student needs at most :data:`SHARE` of the
    operations of training, but at least :data:`FEWEST` evaluations in a run of as many epochs. It follows from sizes
    alone, so that a resumed run evaluates at the same steps. Operations are counted as tokens times passes: of the
    student forward and backward, which is three times forward, and of the teacher and of evaluations forward.

    Args:
        run: The run.
        tokens: That one network embeds in an evaluation.
    """
    crops, length = run.level.crops, run.length
    counts = [int(np.prod(np.broadcast_to(size, 2))) // run.level.spec.patch_size**2 for size in crops.sizes]
    views = np.repeat(counts, crops.groups)
    step = length.global_batch * int(3 * views.sum() + views[:GLOBAL_VIEWS].sum())
    evaluation = 2 * tokens
    affordable = min(math.ceil(evaluation / (SHARE * step)), length.total // FEWEST)
    every = run.config.evaluate.every_steps or max(1, length.steps(1), affordable)
    if (share := evaluation / (every * step)) > SHARE:
        progress.say(
            f"evaluations every {every} steps take about {share:.0%} of the time of training: fewer labelled rows, or "
            "more evaluate.every_steps, take less"
        )
    return every


def _label_free_measure(run: Run) -> Measure:
    """Self-retrieval of training samples, as in the final verdict."""
    return Measure(
        lambda backbone: label_free_scores(_paired_features(run, {TEACHER: backbone})[TEACHER]),
        SELF_RETRIEVAL,
        "self-retrieval accuracy",
        verdict_rounds(run)[1],
        rows="training samples",
        labelled=False,
    )


def _baselines(run: Run, start: Callable[[], Path]) -> dict[str, Callable[[Trainer], Backbone]]:
    """What a run is compared with, by name; first what it started from, last the frozen teacher, if any.

    Args:
        run: The run.
        start: Returns the path of the checkpoint of the initial weights.
    """

    def initial(trainer: Trainer) -> Backbone:
        now = trainer.model.teacher.backbone
        return now if trainer.step == 0 else _like(now, load_backbone_file(start()).backbone)

    def random(trainer: Trainer) -> Backbone:
        now = trainer.model.teacher.backbone
        return _like(now, build_backbone(now.spec, run.config.seed))

    found = {INITIAL: initial, RANDOM: random} if run.config.model.init else {RANDOM: initial}
    frozen = run.level.teacher
    # It takes the inputs of the run's backbone, and is called and embedded with as one.
    return found if frozen is None else {**found, FROZEN: lambda trainer: cast(Backbone, frozen)}


def _like(other: Backbone, backbone: Backbone) -> Backbone:
    """The backbone on the device and in the dtype of another."""
    return backbone.to(next(other.parameters()))


def final_verdict(
    run: Run, trainer: Trainer, initial: Path, last: Mapping[str, float], evaluator: Evaluator | None
) -> dict[str, Any]:
    """Compare the teacher of a finished run with what it started from, and with a random initialization.

    The teacher is the moving average; the frozen teacher of a run that distils one is compared too.

    Every process computes the same, so that nothing has to be exchanged.

    Args:
        run: The run.
        trainer: After the last step.
        initial: Checkpoint of the initial weights.
        last: Metrics of the last step.
        evaluator: The callback that scored the run while it trained, if any.

    Returns:
        ``verdict``, ``floor`` (the numbers it is based on) and ``last_metrics``, for ``status.json``.
    """
    baselines = {name: build(trainer) for name, build in _baselines(run, lambda: initial).items()}
    features = _paired_features(run, {TEACHER: trainer.model.teacher.backbone, **baselines})
    verdict, numbers = evaluate_run(
        features.pop(TEACHER),
        features,
        entropy=last.get("teacher_entropy_relative"),
        loss=last.get("loss_relative"),
        evaluator=evaluator,
    )
    return {"verdict": verdict.to_dict(), "floor": numbers, "last_metrics": dict(last)}


def verdict_rounds(run: Run) -> tuple[int, int]:
    """How many views of how many samples the verdict is based on: several of each where there are few samples.

    Returns:
        Rounds and samples in each, together at most :data:`VERDICT_QUERIES` pairs of views.
    """
    count = min(VERDICT_QUERIES, len(run.level.dataset))
    return VERDICT_QUERIES // count, count


def _paired_features(run: Run, backbones: Mapping[str, Backbone]) -> dict[str, PairedFeatures]:
    """Features of two views of the first samples of a separate random order, by each network."""
    rounds, count = verdict_rounds(run)
    size = min(VERDICT_BATCH, count)
    drawn = run.drawn_batches(0, run.config.seed + 1, size)
    batches = (drawn[first] for first in range(0, rounds * count, size))
    return paired_features(backbones, batches, run.level.crops, run.device, rounds, count)
