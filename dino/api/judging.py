"""``evaluate knn``: a network's frozen features by the votes of their nearest neighbours, beside their floors."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino import distributed, files, progress
from dino.config.schema import KnnConfig
from dino.data.grids import open_grids, read_grid
from dino.data.images import decode
from dino.errors import ConfigError, DataError
from dino.evaluate.knn import knn_scores
from dino.evaluate.labels import LabelTable, check_leakage, read_labels
from dino.evaluate.retrieval import pixel_features
from dino.extraction.embed import PRECISIONS, Normalise, batches, embed, identity, normaliser, read_ahead
from dino.models.backbone import Backbone, build_backbone
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.slides.tables import REGIONS_TABLE, read_regions

SCORES_FILE = "knn_{labels}.json"  # one file per table of labels


def evaluate_knn(model: str, labels: str | Path, config: KnnConfig) -> dict[str, Any]:
    """Score a model on labelled images (level 2: labelled ``.pt`` grids), and its floors in the same way.

    The floors are an untrained network of the same architecture and, for images, 8 x 8 pixels less their mean; for
    grids, the mean of their cells.

    Args:
        model: Run folder, checkpoint, export, foreign checkpoint, or ``timm:NAME``.
        labels: CSV of ``image_path,label,partition[,slide_id,patient_id]``.
        config: Settings.

    Returns:
        ``model``, ``untrained`` and ``pixels_8x8`` (or ``mean_of_cells``), each with ``knn_<k>_accuracy``,
        ``knn_<k>_balanced_accuracy`` and ``knn_<k>_auc``; ``standard_errors`` of the accuracies of each of them, and
        ``standard_error`` of the model's alone; ``about`` with counts, settings and the leakage check. Written as JSON
        to ``config.output``, else to ``RUN/knn_<name of the table>.json`` for a run.

    Raises:
        DataError: If the labels are wrong, name files of the other level, or test on slides the model was trained on;
            if the disk does not take the scores.
        CheckpointError: If the model cannot be loaded.
        ConfigError: If a setting is wrong.
    """
    _check(config)
    device = distributed.choose_device(config.device)
    distributed.check_precision(config.precision, device)
    table = read_labels(Path(labels))
    loaded = load_backbone_file(model, config.arch, config.transform)
    leakage = check_leakage(table, loaded.details.get("training_slides"), config.allow_leakage)
    progress.say(f"{labels}: compared with the pretraining: {leakage['compared']}")
    if leakage["allowed"]:
        progress.warn("test data that was pretrained on is allowed (allow_leakage=true): the score is optimistic")
    run = partial(_features, table, loaded, config, device)
    plain: list[Tensor] = []  # the floor that needs no network is gathered while the model's batches pass by
    trained = run(loaded.backbone, _watched(plain, loaded.level))
    untrained = run(build_backbone(loaded.backbone.spec, (loaded.config or {}).get("seed", 0)), iter)
    floor = "pixels_8x8" if loaded.level == "patch" else "mean_of_cells"
    k = _used_k(config.k, len(table.rows("train")))
    scores = {
        name: _scores(features, table, k, config.temperature)
        for name, features in {"model": trained, "untrained": untrained, floor: torch.cat(plain)}.items()
    }
    errors = {name: _standard_errors(found, len(table.rows("test"))) for name, found in scores.items()}
    result: dict[str, Any] = {**scores, "standard_error": errors["model"], "standard_errors": errors}
    result["about"] = _about(loaded, table, labels, config, leakage)
    output = _output(model, Path(labels), config)
    if output is not None and distributed.is_main():
        with files.oserror_to_data_error(output.parent):
            files.write_json(output, result)
        progress.say(f"scores: {output}")
    return result


def _check(config: KnnConfig) -> None:
    if not config.k or min(config.k) < 1 or not config.temperature > 0:
        raise ConfigError(f"expected k of 1 or more and a temperature above 0, found {config.k}, {config.temperature}")
    if config.precision not in PRECISIONS or config.batch_size < 1 or config.num_workers < 0:
        raise ConfigError(
            f"expected precision {', '.join(PRECISIONS)}, batch_size of 1 or more and num_workers of 0 or more, found "
            f"{config.precision}, {config.batch_size} and {config.num_workers}"
        )


def _features(
    table: LabelTable,
    loaded: LoadedBackbone,
    config: KnnConfig,
    device: torch.device,
    backbone: Backbone,
    watch: Callable[[Iterable[Tensor]], Iterator[Tensor]],
) -> Tensor:
    """Features of every row of the table, ``(N, D)``; ``watch`` sees the batches pass."""
    read = _reader(table, loaded, config)
    items = read_ahead(read, table.paths, config.num_workers, 2 * config.batch_size)
    with progress.bar("embed labelled data", len(table.paths)) as bar:

        def counted() -> Iterator[Tensor]:
            for batch in watch(batches(items, config.batch_size)):
                yield batch
                bar.advance(len(batch))

        return embed(backbone, counted(), _normalise(loaded), device, config.precision)


def _reader(table: LabelTable, loaded: LoadedBackbone, config: KnnConfig) -> Callable[[Path], Tensor]:
    grids = [path for path in table.paths if path.suffix == ".pt"]
    if loaded.level == "patch":
        if grids:
            raise DataError(f"expected images for the level-1 model {loaded.source}, found the feature grid {grids[0]}")
        return decode
    if len(grids) < len(table.paths):
        other = next(path for path in table.paths if path.suffix != ".pt")
        raise DataError(f"expected .pt feature grids for the level-2 model {loaded.source}, found {other}")
    shapes = _shapes(table.paths)

    def read(path: Path) -> Tensor:
        regions, _, dim = open_grids(path).shape
        if regions != 1 or dim != loaded.backbone.spec.input_dim:
            wanted = f"one region of D={loaded.backbone.spec.input_dim}"
            raise DataError(f"expected {wanted} in {path}, found {regions} of D={dim}")
        return read_grid(path, config.grid_order, shapes.get(path.name))

    return read


def _shapes(paths: list[Path]) -> dict[str, tuple[int, int]]:
    """Height and width of the grids that a ``regions.csv`` beside or above them lists."""
    roots = {root for path in paths for root in (path.parent, path.parent.parent)}
    tables = [read_regions(root) for root in sorted(roots) if (root / REGIONS_TABLE).exists()]
    return {record.path.name: record.grid for table in tables for record in table}


def _normalise(loaded: LoadedBackbone) -> Normalise:
    transform = loaded.transform
    if transform is None:
        return identity
    size = transform.input_size_px
    patch_size = loaded.backbone.spec.patch_size
    return normaliser(transform.mean, transform.std, patch_size, (size, size) if size else None)


def _watched(kept: list[Tensor], level: str) -> Callable[[Iterable[Tensor]], Iterator[Tensor]]:
    def watch(passing: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in passing:
            kept.append(pixel_features(batch) if level == "patch" else batch.mean((2, 3)))
            yield batch

    return watch


def _used_k(wanted: list[int], references: int) -> list[int]:
    """The numbers of neighbours, capped to the references, each once."""
    too_many = [k for k in wanted if k > references]
    if too_many:
        progress.warn(f"k={too_many} is more than the {references} references; k={references} is taken instead")
    return sorted({min(k, references) for k in wanted})


def _scores(features: Tensor, table: LabelTable, k: list[int], temperature: float) -> dict[str, float | None]:
    train, test = table.rows("train"), table.rows("test")
    known, truth = ([table.labels[i] for i in rows] for rows in (train, test))
    return knn_scores(features[train], known, features[test], truth, k, temperature)


def _standard_errors(scores: dict[str, float | None], queries: int) -> dict[str, float]:
    """Binomial standard error of each accuracy; not of balanced accuracies and areas, which are no proportions."""
    shares = {name: value for name, value in scores.items() if name.endswith("_accuracy") and value is not None}
    plain = {name: value for name, value in shares.items() if not name.endswith("_balanced_accuracy")}
    return {name: math.sqrt(value * (1 - value) / queries) for name, value in plain.items()}


def _about(
    loaded: LoadedBackbone, table: LabelTable, labels: str | Path, config: KnnConfig, leakage: dict[str, Any]
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
