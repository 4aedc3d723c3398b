"""``evaluate knn|linear|fewshot|retrieval|cluster``: scores of models on labelled tiles (level 2: labelled grids)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino import distributed, files, progress
from dino.api.labelled import MODEL, Embedding, Features, check_rows
from dino.config.schema import CompareConfig, EvaluationConfig, KnnConfig
from dino.errors import ConfigError, DataError
from dino.evaluate import LabelTable, check_k, knn_scores, read_labels, statistics, tiles
from dino.evaluate.results import Entry, Result, collect, read_result
from dino.evaluate.statistics import Scored
from dino.evaluate.task import Task, grouped_folds, read_folds, single_fold, write_folds
from dino.extraction.cache import FeatureCache, cache_folder
from dino.extraction.embed import check_settings
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.train.run_folder import result_file

TIMEOUT_MINUTES = 24 * 60  # processes synchronise only after each has embedded its part
CHANCE = "chance"


def _knn(features: Features, task: Task, config: Any) -> Scored:
    references = min(len(fold.train) for fold in task.folds)
    return tiles.knn(features, task, sorted({min(k, references) for k in config.k}), config.temperature)


EVALUATIONS: Mapping[str, Callable[[Features, Task, Any], Scored]] = {
    "knn": _knn,
    "linear": lambda features, task, config: tiles.linear(features, task, config.strengths),
    "fewshot": lambda features, task, config: tiles.fewshot(features, task, config.shots, config.draws),
    "retrieval": lambda features, task, config: tiles.retrieval(features, task, config.k),
    "cluster": lambda features, task, config: tiles.cluster(features, task, config.repeats),
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
        models: Run folders, checkpoints, exports, external checkpoints, or ``timm:NAME``, all of one level.
        labels: CSV of ``image_path,label[,partition][,slide_id,patient_id]``. Its test rows are scored by what is known
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
    if config.resamples < 0 or not models:
        raise ConfigError(f"expected a model and resamples of 0 or more, found {len(models)} and {config.resamples}")
    check_settings(config.precision, config.batch_size, config.num_workers)
    device = distributed.choose_device(config.device)
    distributed.check_precision(config.precision, device)
    with distributed.process_group(device, TIMEOUT_MINUTES):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return _evaluate(evaluation, models, Path(labels), config, device)


def evaluate_knn(model: str, labels: str | Path, config: KnnConfig) -> dict[str, Any]:
    """:func:`evaluate` of one model by weighted kNN, by name of the network.

    Returns:
        ``model``, ``initial_weights`` (where there are any), ``random_initialization`` and ``pixels_8x8`` (or
        ``mean_of_cells``), each with ``knn_<k>_accuracy``, ``knn_<k>_balanced_accuracy`` and ``knn_<k>_auc``;
        ``standard_errors`` of the accuracies of each of them, and ``standard_error`` of the model's alone; ``about``
        with counts, settings and the leakage checks; and what :meth:`Result.to_dict` has.
    """
    return knn_record(evaluate("knn", [model], labels, config))


def knn_record(result: Result) -> dict[str, Any]:
    """A result of kNN with the scores of the first model and its baselines by name, see :func:`evaluate_knn`."""
    first, *others = result.rows
    shown = {MODEL: first, **{row.role: row for row in others if row.role not in (MODEL, CHANCE)}}
    scores = {role: {name: found.value for name, found in row.estimates.items()} for role, row in shown.items()}
    errors = {role: _standard_errors(found, result.about["queries"]) for role, found in scores.items()}
    facts = {"source": first.source, "fingerprint": first.fingerprint, **first.details}
    values = result.to_dict()
    about = {**values.pop("about"), **facts, "labels": result.labels}
    return {**scores, "standard_error": errors[MODEL], "standard_errors": errors, **values, "about": about}


def write_result(result: Result, output: Path) -> None:
    """Write a result as JSON, and with the same name as CSV and PNG.

    Raises:
        DataError: If the disk cannot be written.
    """
    from dino.report.comparison import forest_plot

    with files.oserror_to_data_error(output.parent):
        files.write_json(output, knn_record(result) if result.evaluation == "knn" else result.to_dict())
        files.write_text(output.with_suffix(".csv"), result.to_csv())
        files.write_bytes(output.with_suffix(".png"), forest_plot([result]))
    progress.say(f"result: {output}, and beside it .csv and .png")


def compare(results: Sequence[Path], config: CompareConfig) -> tuple[list[list[str]], list[str]]:
    """Results of several evaluations as one table, and with ``config.output`` as a file and a figure beside it.

    Args:
        results: JSON files of evaluations.
        config: Settings.

    Returns:
        Rows and header of the table.

    Raises:
        DataError: If a file is missing or is no result; if the disk cannot be written.
        ConfigError: If ``config.output`` is of an unknown kind.
    """
    from dino.report import comparison

    writers = {
        ".md": comparison.markdown,
        ".tex": comparison.latex,
        ".csv": lambda found: "".join(one.to_csv() for one in found),
    }
    output = Path(config.output) if config.output else None
    if output is not None and output.suffix not in writers:
        raise ConfigError(f"expected output with the ending {', '.join(writers)}, found {output}")
    read = [read_result(path) for path in results]
    if output is not None:
        with files.oserror_to_data_error(output.parent):
            files.write_text(output, writers[output.suffix](read))
            files.write_bytes(output.with_suffix(".png"), comparison.forest_plot(read))
        progress.say(f"table: {output}, figure: {output.with_suffix('.png')}")
    return comparison.compared(read)


def _evaluate(
    evaluation: str, models: Sequence[str], labels: Path, config: EvaluationConfig, device: torch.device
) -> Result:
    table = read_labels(labels, partition_is_optional=True)
    loaded = [load_backbone_file(model, config.arch, config.transform) for model in models]
    other = next((one for one in loaded if one.level != loaded[0].level), None)
    if other is not None:
        raise DataError(
            f"expected models of one level, found {loaded[0].source} ({loaded[0].level}) and {other.source} "
            f"({other.level}): evaluate them separately"
        )
    checks = [check_rows(table, labels, one, config.allow_leakage) for one in loaded]
    output = _output(evaluation, models[0], labels, config)
    task = distributed.run_on_main(lambda: _task(table, config, output))
    embedding = Embedding(table, config, device, FeatureCache(cache_folder(config.cache), table.paths))
    columns = embedding.columns(unique_names(models), loaded)
    about = {
        **{"classes": len(table.classes), "folds": len(task.folds), "references": len(task.folds[0].train)},
        **{"queries": len(task.tested), "grouped_by": table.groups()[1], "settings": asdict(config)},
    }

    def score() -> Result:
        entries = []
        for column in columns:
            scored = EVALUATIONS[evaluation](column.features, task, config)
            entries.append(Entry(column.name, column.role, scored, column.source, column.fingerprint))
        for i, (one, found) in enumerate(zip(loaded, checks, strict=True)):
            entries[i] = replace(entries[i], scored=_with_facts(entries[i].scored, one, found))
        values = tiles.chance(task, list(entries[0].scored.statistics))
        constants = {name: statistics.constant(value) for name, value in values.items()}
        entries.append(Entry(CHANCE, CHANCE, Scored(task.tested, constants)))
        of_scored = [task.groups[int(row)] for row in task.tested]
        return collect(evaluation, str(labels), entries, of_scored, config.resamples, config.seed, about)

    result = distributed.run_on_main(score)
    if output is not None and distributed.is_main():
        write_result(result, output)
    return result


def _with_facts(scored: Scored, loaded: LoadedBackbone, checks: Mapping[str, Any]) -> Scored:
    """What is recorded of a model beside its scores."""
    transform = loaded.transform.name if loaded.transform else None
    facts = {"step": loaded.step, "arch": loaded.backbone.spec.arch, "transform": transform, **checks}
    return replace(scored, details={**scored.details, **facts})


def _task(table: LabelTable, config: EvaluationConfig, output: Path | None) -> Task:
    """The labels as numbers, and the folds: the table's partitions, those of a file, or drawn and written to one."""
    groups, kind = table.groups()
    names = [str(path) for path in table.paths]
    if table.is_split:
        if config.splits:
            raise ConfigError("expected splits for a table without a partition column, found both; leave one out")
        folds = [single_fold(*(table.rows(partition) for partition in ("train", "test", "val")))]
    elif config.splits:
        folds = read_folds(Path(config.splits), names)
    else:
        folds = grouped_folds(table.labels, groups, config.folds, config.seed)
        progress.say(f"no partition column: {config.folds}-fold cross-validation, no {kind} on both sides of a fold")
        if output is not None:
            path = output.with_name(f"{output.stem}_folds.csv")
            with files.oserror_to_data_error(path.parent):
                write_folds(path, names, folds)
            progress.say(f"folds: {path}; splits={path} uses them again")
    number = {name: i for i, name in enumerate(table.classes)}
    return Task(np.array([number[label] for label in table.labels]), table.classes, groups, folds, config.seed)


def unique_names(models: Sequence[str]) -> list[str]:
    """Short names of models: the last part of their paths, more of it where two would be equal."""
    parts = [Path(model).absolute().parts if Path(model).exists() else (model,) for model in models]
    for length in range(1, 1 + max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-1:])} ({i})" for i, part in enumerate(parts, 1)]  # one model several times


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


def _standard_errors(scores: Mapping[str, float | None], queries: int) -> dict[str, float]:
    """Binomial standard error of each accuracy; not of balanced accuracies and areas, which are no proportions."""
    return {
        name: math.sqrt(value * (1 - value) / queries)
        for name, value in scores.items()
        if name.endswith("_accuracy") and not name.endswith("_balanced_accuracy") and value is not None
    }


def _output(evaluation: str, model: str, labels: Path, config: EvaluationConfig) -> Path | None:
    if config.output:
        return Path(config.output)
    name = result_file(evaluation, labels.stem)
    return Path(model) / name if (Path(model) / "checkpoints").is_dir() else None
