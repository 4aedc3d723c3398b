"""``evaluate knn|linear|fewshot|retrieval|cluster``: scores of models on labelled tiles (level 2: labelled grids)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import distributed, progress
from dino.api.features import columns_of, with_recorded_patients
from dino.api.labelled import Features
from dino.api.results import knn_record, output_path, write_result
from dino.config.schema import EvaluationConfig, KnnConfig
from dino.errors import ConfigError
from dino.evaluate import LabelTable, capped_k, check_k, knn_scores, read_labels, statistics, tiles
from dino.evaluate.results import CHANCE, Entry, Result, collect
from dino.evaluate.statistics import Scored
from dino.evaluate.task import Task, grouped_folds, read_folds, single_fold
from dino.extraction.embed import check_settings

TIMEOUT_MINUTES = 24 * 60  # processes synchronise only after each has embedded its part


def _knn(features: Features, task: Task, config: Any, device: torch.device) -> Scored:
    references = min(len(fold.train) for fold in task.folds)
    numbers = sorted({capped_k(k, references) for k in config.k})
    return tiles.knn(features, task, numbers, config.temperature, device)


EVALUATIONS: Mapping[str, Callable[[Features, Task, Any, torch.device], Scored]] = {
    "knn": _knn,
    "linear": lambda features, task, config, device: tiles.linear(features, task, config.strengths, device),
    "fewshot": lambda features, task, config, _: tiles.fewshot(features, task, config.shots, config.draws),
    "retrieval": lambda features, task, config, _: tiles.retrieval(features, task, config.k),
    "cluster": lambda features, task, config, _: tiles.cluster(features, task, config.repeats),
}


def evaluate(evaluation: str, models: Sequence[str], labels: str | Path, config: EvaluationConfig) -> Result:
    """Score the features of models on labelled tiles (level 2: labelled ``.pt`` grids).

    All models are scored on the same rows, and beside them the weights that the first one's run started from (with
    ``model.init``), a random initialization of its architecture, features that need no network (images: 8 x 8 pixels
    less their mean; grids: the mean of their cells), and chance. Intervals are percentiles of a bootstrap over patients
    (slides or rows where those are unknown), and differences to the first model use the same samples. Under
    ``torchrun`` every process embeds a part of the images.

    Args:
        evaluation: ``knn``, ``linear``, ``fewshot``, ``retrieval`` or ``cluster``.
        models: Run folders, checkpoints, exports, external checkpoints, or ``timm:NAME``, all of one level; or folders
            of features of tiles that were extracted, from which rows are taken by slide, x and y.
        labels: CSV of ``image_path,label[,partition][,slide_id,patient_id]``, or for folders of features
            ``slide_id,x,y,label[,partition][,patient_id]``. Its test rows are scored by what is known
            of its train rows; a table without partitions is cross-validated.
        config: Settings of this evaluation.

    Returns:
        A row per model and baseline. Written as JSON, CSV and PNG to ``config.output``, else to
        ``RUN/<evaluation>_<name of the table>.json`` for a run.

    Raises:
        DataError: If the labels are invalid, name files of another level, test on slides a model was trained on or on
            rows that chose its checkpoint; if the disk cannot be written.
        CheckpointError: If a model cannot be loaded.
        ConfigError: If a setting is invalid.
    """
    if isinstance(config, KnnConfig):
        check_k(config.k, config.temperature)
    return on_all_processes(models, config, lambda device: _evaluate(evaluation, models, Path(labels), config, device))


def on_all_processes(
    models: Sequence[str], config: EvaluationConfig, function: Callable[[torch.device], Result]
) -> Result:
    """Call what evaluates models on every process of a process group, with its device.

    Raises:
        ConfigError: If a setting is invalid.
    """
    if config.resamples < 0 or not models:
        raise ConfigError(f"expected a model and resamples of 0 or more, found {len(models)} and {config.resamples}")
    device = distributed.choose_device(config.device)
    check_settings(config.precision, config.batch_size, config.num_workers, device)
    with distributed.process_group(device, TIMEOUT_MINUTES):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return function(device)


def evaluate_knn(model: str, labels: str | Path, config: KnnConfig) -> dict[str, Any]:
    """:func:`evaluate` of one model by weighted kNN, by name of the network.

    Returns:
        ``model``, ``initial_weights`` (where there are any), ``random_initialization`` and ``pixels_8x8`` (or
        ``mean_of_cells``), each with ``knn_<k>_accuracy``, ``knn_<k>_balanced_accuracy`` and ``knn_<k>_auc``;
        ``standard_errors`` of the accuracies of each of them, and ``standard_error`` of the model's alone; ``about``
        with counts, settings and the leakage checks; and what :meth:`Result.to_dict` has.
    """
    return knn_record(evaluate("knn", [model], labels, config))


def _evaluate(
    evaluation: str, models: Sequence[str], labels: Path, config: EvaluationConfig, device: torch.device
) -> Result:
    table = read_labels(labels, partition_is_optional=True, label=config.label)
    table = with_recorded_patients(table, labels, models)
    task = distributed.run_on_main(lambda: _task(table, config))
    output = output_path(evaluation, models[0], labels, config.output)
    columns, facts = columns_of(table, labels, models, config, device)
    about = {
        **{"classes": len(table.classes), "folds": len(task.folds), "references": len(task.folds[0].train)},
        **{"queries": len(task.tested), "grouped_by": table.groups()[1], "settings": asdict(config)},
    }

    def score() -> Result:
        entries = []
        for column in columns:
            scored = EVALUATIONS[evaluation](column.load(), task, config, device)
            if len(entries) < len(facts):  # of a model, not of a baseline
                scored = replace(scored, details={**scored.details, **facts[len(entries)]})
            entries.append(Entry(column.name, column.role, scored, column.source, column.fingerprint))
        values = tiles.chance(task, list(entries[0].scored.statistics))
        constants = {name: statistics.constant(value) for name, value in values.items()}
        entries.append(Entry(CHANCE, CHANCE, Scored(task.tested, constants)))
        of_scored = [task.groups[int(row)] for row in task.tested]
        return collect(evaluation, str(labels), entries, of_scored, config.resamples, config.seed, about)

    result = distributed.run_on_main(score)
    if output is not None and distributed.is_main():
        write_result(result, output, [str(path) for path in table.paths], () if table.is_split else task.folds)
    return result


def _task(table: LabelTable, config: EvaluationConfig) -> Task:
    """The labels as numbers, and the folds: the table's partitions, those of a file, or drawn by the seed."""
    groups, kind = table.groups()
    if kind == "rows":
        progress.warn(
            "neither patients nor slides are known: rows that share a slide make intervals too narrow, and the "
            "regularisation of linear probes, which is chosen within the training rows, too weak; give slide_id or "
            "patient_id"
        )
    if table.is_split:
        if config.splits:
            raise ConfigError("expected splits for a table without a partition column, found both; leave one out")
        folds = [single_fold(*(table.rows(partition) for partition in ("train", "test", "val")))]
    elif config.splits:
        folds = read_folds(Path(config.splits), [str(path) for path in table.paths])
    else:
        folds = grouped_folds(table.labels, groups, config.folds, config.seed)
        progress.say(f"no partition column: {config.folds}-fold cross-validation, no {kind} on both sides of a fold")
    number = {name: i for i, name in enumerate(table.classes)}
    return Task(np.array([number[label] for label in table.labels]), table.classes, groups, folds, config.seed)


def table_scores(
    table: LabelTable, features: Tensor, k: Sequence[int], temperature: float, queries: str = "test"
) -> dict[str, float | None]:
    """KNN scores of the test rows of a table, with its train rows as the reference set.

    Args:
        table: The labels.
        features: ``(N, D)`` features of its rows.
        k: Numbers of neighbours.
        temperature: Temperature of the votes.
        queries: The partition that is scored.

    Returns:
        See :func:`dino.evaluate.knn.knn_scores`.
    """
    train, test = table.rows("train"), table.rows(queries)
    reference_labels, query_labels = ([table.labels[i] for i in rows] for rows in (train, test))
    return knn_scores(features[train], reference_labels, features[test], query_labels, k, temperature)
