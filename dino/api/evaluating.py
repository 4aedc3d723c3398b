"""``evaluate knn``: scores of a model's features on labelled images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino import distributed, files, progress
from dino.api.levels import level_named
from dino.config.schema import KnnConfig
from dino.evaluate import LabelTable, check_k, check_leakage, knn_scores, read_labels
from dino.evaluate.selection import check_selection, recorded_selection
from dino.evaluate.verdict import INITIAL, RANDOM
from dino.extraction.embed import FileEmbedder, check_settings
from dino.files import printable
from dino.models.backbone import Backbone, build_backbone
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.train.checkpoint import START
from dino.train.run_folder import SCORES_FILE

TIMEOUT_MINUTES = 24 * 60  # processes synchronise only after each has embedded its part


def evaluate_knn(model: str, labels: str | Path, config: KnnConfig) -> dict[str, Any]:
    """Score the features of a model by weighted kNN on labelled images (level 2: labelled ``.pt`` grids).

    Baselines are scored in the same way: the weights that a run with ``model.init`` started from, a random
    initialization of the same architecture, and features that need no network (images: 8 x 8 pixels less their mean;
    grids: the mean of their cells). Under ``torchrun`` every process
    embeds a part of the images.

    Args:
        model: Run folder, checkpoint, export, external checkpoint, or ``timm:NAME``.
        labels: CSV of ``image_path,label,partition[,slide_id,patient_id]``; its train rows are the references, its
            test rows the queries.
        config: Settings.

    Returns:
        ``model``, ``initial_weights`` (where there are any), ``random_initialization`` and ``pixels_8x8`` (or
        ``mean_of_cells``), each with ``knn_<k>_accuracy``, ``knn_<k>_balanced_accuracy`` and ``knn_<k>_auc``;
        ``standard_errors`` of the accuracies of each of them, and ``standard_error`` of the model's alone; ``about``
        with counts, settings and the leakage checks. Written as JSON to ``config.output``, else to
        ``RUN/knn_<name of the table>.json`` for a run.

    Raises:
        DataError: If the labels are invalid, name files of the other level, test on slides the model was trained on or
            on rows that chose its checkpoint; if the disk cannot be written.
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
    level, spec = level_named(loaded.level), loaded.backbone.spec
    data_dir = (loaded.config or {}).get("data_dir")
    trained = level.pretraining(loaded.details.get("training_slides"), data_dir)
    leakage = check_leakage(table, trained, config.allow_leakage)
    progress.say(f"{labels}: compared with the pretraining: {leakage['compared']}")
    selection = check_selection(table, recorded_selection(loaded.details), config.allow_leakage)
    progress.say(f"{labels}: compared with the choice of the checkpoint: {selection['compared']}")
    if leakage["allowed"]:
        progress.warn("test data that was pretrained on is allowed (allow_leakage=true): the score is optimistic")
    if selection["allowed"]:
        progress.warn(
            f"{selection['seen_rows']} test rows that chose the checkpoint are allowed (allow_leakage=true): the score "
            "is optimistic"
        )
    embedder = FileEmbedder(
        table.paths,
        level.labelled_reader(table.paths, spec, config, loaded.source, loaded.details),
        level.normaliser(loaded.transform, spec.patch_size),
        device,
        config.precision,
        config.batch_size,
        config.num_workers,
    )
    networks = {"model": loaded.backbone, **_baseline_networks(loaded)}
    scores: dict[str, dict[str, float | None]] = {}
    k = _used_k(config.k, len(table.rows("train")))
    with progress.bar("embed labelled data", len(networks) * len(embedder.own_paths)) as bar:
        for name, network in networks.items():
            plain = [] if scores else [level.baseline_features]  # every file is read for it once
            features = embedder.embed(network, *plain, advance=bar.advance)
            for column, values in zip((name, level.baseline), features, strict=False):
                scores[column] = table_scores(table, values, k, config.temperature)
    scores[level.baseline] = scores.pop(level.baseline)  # the last column
    errors = {name: _standard_errors(found, len(table.rows("test"))) for name, found in scores.items()}
    result: dict[str, Any] = {**scores, "standard_error": errors["model"], "standard_errors": errors}
    result["about"] = _about(loaded, table, labels, config, {"leakage": leakage, "selection": selection})
    output = _output(model, labels, config)
    if output is not None and distributed.is_main():
        with files.oserror_to_data_error(output.parent):
            files.write_json(output, result)
        progress.say(f"scores: {output}")
    return result


def _baseline_networks(loaded: LoadedBackbone) -> dict[str, Backbone]:
    """The weights that a model's run started from, if it was ``model.init`` and they are there, and random ones."""
    config = loaded.config or {}
    random = {RANDOM: build_backbone(loaded.backbone.spec, config.get("seed", 0))}
    model = config.get("model")
    if not isinstance(model, Mapping) or not model.get("init"):
        return random
    source = Path(loaded.source)  # a checkpoint of a run, or its export RUN/backbone
    start = (source.parent / "checkpoints" if source.is_dir() else source.parent) / START
    if start.is_file():
        initial = load_backbone_file(start)
        others = {**((initial.config or {}).get("model") or {}), "init": model["init"]}  # without folders in an export
        if others == model:
            return {INITIAL: initial.backbone, **random}
    progress.say(f"the initial weights, {printable(model['init'])}, are not scored: they are not at {start}")
    return random


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
    loaded: LoadedBackbone, table: LabelTable, labels: Path, config: KnnConfig, checks: Mapping[str, Any]
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
        **checks,
        "settings": asdict(config),
    }


def _output(model: str, labels: Path, config: KnnConfig) -> Path | None:
    if config.output:
        return Path(config.output)
    name = SCORES_FILE.format(labels=labels.stem)
    return Path(model) / name if (Path(model) / "checkpoints").is_dir() else None
