"""``evaluate knn``, and the evaluation of a run during and after training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino import distributed, files, progress
from dino.api.levels import level_named
from dino.api.run import Run
from dino.config.schema import KnnConfig
from dino.evaluate import LabelTable, check_k, check_leakage, knn_scores, read_labels
from dino.extraction.embed import FileEmbedder, check_settings
from dino.models.backbone import Backbone, build_backbone
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.train.callbacks import Checkpoints
from dino.train.evaluator import Evaluator, evaluate_run, paired_features

SCORES_FILE = "knn_{labels}.json"  # one file per table of labels
TIMEOUT_MINUTES = 24 * 60  # processes synchronise only after each has embedded its part
VERDICT_SAMPLES = 256
VERDICT_BATCH = 16


def evaluate_knn(model: str, labels: str | Path, config: KnnConfig) -> dict[str, Any]:
    """Score the features of a model by weighted kNN on labelled images (level 2: labelled ``.pt`` grids).

    Two baselines are scored in the same way: an untrained network of the same architecture, and features that need no
    network (images: 8 x 8 pixels less their mean; grids: the mean of their cells). Under ``torchrun`` every process
    embeds a part of the images.

    Args:
        model: Run folder, checkpoint, export, external checkpoint, or ``timm:NAME``.
        labels: CSV of ``image_path,label,partition[,slide_id,patient_id]``.
        config: Settings.

    Returns:
        ``model``, ``untrained`` and ``pixels_8x8`` (or ``mean_of_cells``), each with ``knn_<k>_accuracy``,
        ``knn_<k>_balanced_accuracy`` and ``knn_<k>_auc``; ``standard_errors`` of the accuracies of each of them, and
        ``standard_error`` of the model's alone; ``about`` with counts, settings and the leakage check. Written as JSON
        to ``config.output``, else to ``RUN/knn_<name of the table>.json`` for a run.

    Raises:
        DataError: If the labels are invalid, name files of the other level, or test on slides the model was trained on;
            if the disk cannot be written.
        CheckpointError: If the model cannot be loaded.
        ConfigError: If a setting is invalid.
    """
    check_k(config.k, config.temperature)
    check_settings(config.precision, config.batch_size, config.num_workers)
    device = distributed.choose_device(config.device)
    distributed.check_precision(config.precision, device)
    with distributed.process_group(device, TIMEOUT_MINUTES):
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return _evaluate_knn(model, Path(labels), config, device)


def _evaluate_knn(model: str, labels: Path, config: KnnConfig, device: torch.device) -> dict[str, Any]:
    table = read_labels(labels)
    loaded = load_backbone_file(model, config.arch, config.transform)
    leakage = check_leakage(table, loaded.details.get("training_slides"), config.allow_leakage)
    progress.say(f"{labels}: compared with the pretraining: {leakage['compared']}")
    if leakage["allowed"]:
        progress.warn("test data that was pretrained on is allowed (allow_leakage=true): the score is optimistic")
    level, spec = level_named(loaded.level), loaded.backbone.spec
    embedder = FileEmbedder(
        table.paths,
        level.labelled_reader(table.paths, spec, config, loaded.source, loaded.details),
        level.normaliser(loaded.transform, spec.patch_size),
        device,
        config.precision,
        config.batch_size,
        config.num_workers,
    )
    untrained = build_backbone(spec, (loaded.config or {}).get("seed", 0))
    with progress.bar("embed labelled data", 2 * len(embedder.own_paths)) as bar:
        features = embedder.embed(loaded.backbone, level.baseline_features, advance=bar.advance)
        features += embedder.embed(untrained, advance=bar.advance)
    k = _used_k(config.k, len(table.rows("train")))
    names = ("model", level.baseline, "untrained")
    by_name = dict(zip(names, (table_scores(table, f, k, config.temperature) for f in features), strict=True))
    scores = {name: by_name[name] for name in ("model", "untrained", level.baseline)}
    errors = {name: _standard_errors(found, len(table.rows("test"))) for name, found in scores.items()}
    result: dict[str, Any] = {**scores, "standard_error": errors["model"], "standard_errors": errors}
    result["about"] = _about(loaded, table, labels, config, leakage)
    output = _output(model, labels, config)
    if output is not None and distributed.is_main():
        with files.oserror_to_data_error(output.parent):
            files.write_json(output, result)
        progress.say(f"scores: {output}")
    return result


def table_scores(table: LabelTable, features: Tensor, k: Sequence[int], temperature: float) -> dict[str, float | None]:
    """KNN scores of the test rows of a table, with its train rows as the reference set.

    Args:
        table: The labels.
        features: ``(N, D)`` features of its rows.
        k: Numbers of neighbours.
        temperature: Temperature of the votes.

    Returns:
        See :func:`dino.evaluate.knn.knn_scores`.
    """
    train, test = table.rows("train"), table.rows("test")
    reference_labels, query_labels = ([table.labels[i] for i in rows] for rows in (train, test))
    return knn_scores(features[train], reference_labels, features[test], query_labels, k, temperature)


def _used_k(wanted: list[int], references: int) -> list[int]:
    """The numbers of neighbours, at most the number of references, without duplicates."""
    too_many = [k for k in wanted if k > references]
    if too_many:
        progress.warn(f"k={too_many} is more than the {references} references; using k={references}")
    return sorted({min(k, references) for k in wanted})


def _standard_errors(scores: dict[str, float | None], queries: int) -> dict[str, float]:
    """Binomial standard error of each accuracy; not of balanced accuracies and areas, which are no proportions."""
    return {
        name: math.sqrt(value * (1 - value) / queries)
        for name, value in scores.items()
        if name.endswith("_accuracy") and not name.endswith("_balanced_accuracy") and value is not None
    }


def _about(
    loaded: LoadedBackbone, table: LabelTable, labels: Path, config: KnnConfig, leakage: dict[str, Any]
) -> dict[str, Any]:
    transform = loaded.transform
    return {
        "source": loaded.source,
        "fingerprint": loaded.fingerprint,
        "step": loaded.step,
        "arch": loaded.backbone.spec.arch,
        "transform": transform.name if transform else None,
        "labels": str(labels),
        "classes": len(table.classes),
        "references": len(table.rows("train")),
        "queries": len(table.rows("test")),
        "leakage": leakage,
        "settings": asdict(config),
    }


def _output(model: str, labels: Path, config: KnnConfig) -> Path | None:
    if config.output:
        return Path(config.output)
    name = SCORES_FILE.format(labels=labels.stem)
    return Path(model) / name if (Path(model) / "checkpoints").is_dir() else None


def build_evaluator(run: Run, checkpoints: Checkpoints) -> Evaluator | None:
    """The callback that scores a run on ``evaluate.labels``; None without labels.

    Raises:
        DataError: If the labels are invalid, name missing files, or share slides or patients with the training data.
    """
    settings, level = run.config.evaluate, run.level
    if settings.labels is None:
        return None
    table = read_labels(Path(settings.labels))
    facts = check_leakage(table, level.slides, settings.allow_leakage)
    progress.say(f"{settings.labels}: compared with the training data: {facts['compared']}")
    # Tiles are scored at their own size during training, also where the initial weights have another input size.
    transform = replace(level.transform, input_size_px=None) if level.transform else None
    embedder = FileEmbedder(
        table.paths,
        level.labelled_reader(table.paths, level.spec, run.config, str(checkpoints.folder.path), run.origin),
        level.normaliser(transform, level.spec.patch_size),
        run.device,
        run.config.speed.precision,
    )

    def score(backbone: Backbone) -> dict[str, float]:
        (features,) = embedder.embed(backbone)
        return table_scores(table, features, settings.k, settings.temperature)  # type: ignore[return-value]

    return Evaluator(
        score,
        f"knn_{settings.k[0]}_accuracy",
        len(table.rows("test")),
        settings.every_steps or run.length.steps(1) or 1,
        settings.early_stopping_patience,
        checkpoints,
    )


def final_verdict(
    run: Run, teacher: Backbone, initial: Path, last: Mapping[str, float], evaluator: Evaluator | None
) -> dict[str, Any]:
    """Compare the teacher of a finished run with the network before training.

    Every process computes the same, so that nothing has to be exchanged.

    Args:
        run: The run.
        teacher: The teacher's backbone after the last step.
        initial: Checkpoint of the initial weights.
        last: Metrics of the last step.
        evaluator: The callback that scored the run on labels, if any.

    Returns:
        ``verdict``, ``floor`` (the numbers it is based on) and ``last_metrics``, for ``status.json``.
    """
    untrained = load_backbone_file(str(initial)).backbone
    untrained.to(run.device, next(teacher.parameters()).dtype)
    verdict, numbers = evaluate_run(
        *(_paired_features(run, backbone) for backbone in (teacher, untrained)),
        entropy=last.get("teacher_entropy_relative"),
        loss=last.get("loss_relative"),
        labelled=evaluator.comparison() if evaluator else None,
    )
    return {"verdict": verdict.to_dict(), "floor": numbers, "last_metrics": dict(last)}


def _paired_features(run: Run, backbone: Backbone) -> Tensor:
    """``(2, N, D)`` features of two views of the first :data:`VERDICT_SAMPLES` samples of a separate random order."""
    count = min(VERDICT_SAMPLES, len(run.level.dataset))
    size = min(VERDICT_BATCH, count)
    drawn = run.drawn_batches(0, run.config.seed + 1, size)
    batches = (drawn[first] for first in range(0, count - size + 1, size))
    return paired_features(backbone, batches, run.level.crops, run.device)
