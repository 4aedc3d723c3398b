"""What a run is scored by on labelled images while it trains: kNN, a linear probe, robustness, or their mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dino import distributed, progress
from dino.api.evaluating import table_scores
from dino.api.run import Run
from dino.config.schema import EvaluateConfig
from dino.errors import ConfigError, DataError
from dino.evaluate import LabelTable, check_leakage, read_labels
from dino.evaluate.robustness import neighbour_scores
from dino.evaluate.selection import Selection, row_set, select_rows
from dino.evaluate.tiles import linear_accuracy
from dino.extraction.embed import FileEmbedder
from dino.models.backbone import Backbone
from dino.train.evaluator import Measure

Scores = dict[str, float]

KNN, LINEAR, ROBUSTNESS, MEAN = "knn", "linear", "robustness", "mean"
MEAN_SCORE = "mean_score"


@dataclass(frozen=True)
class Part:
    """A score of some rows.

    Attributes:
        rows: The rows.
        tracked: Name of the number that may choose the checkpoint.
        words: The same in words.
        queries: Number of samples that it is a mean over.
        score: Scores of the ``(N, D)`` features of the rows.
    """

    rows: LabelTable
    tracked: str
    words: str
    queries: int
    score: Callable[[Tensor], Scores]


def labelled_measure(run: Run, name: str, resumed: bool) -> Measure:
    """The scores of ``evaluate.labels`` and ``evaluate.robustness``; rows that choose the checkpoint are recorded.

    Every process embeds a part of the images. All have the same scores: kNN is computed on each, the others on one.

    Args:
        run: The run, which gets the record of the rows.
        name: Of the run, for messages.
        resumed: Whether the run has been started before.

    Raises:
        ConfigError: If ``evaluate.select`` is unknown or names a score that is not computed.
        DataError: If labels are invalid, name missing files, or share slides or patients with the training data.
    """
    settings = run.config.evaluate
    parts = _parts(run, resumed)
    chosen = _chosen(settings, parts)
    tracked, words = chosen[0].tracked, chosen[0].words
    if len(chosen) > 1:
        tracked, words = MEAN_SCORE, f"mean of {' and '.join(part.words for part in chosen)}"
    records = [row_set(rows, tracked) for rows in {id(part.rows): part.rows for part in chosen}.values()]
    run.selection = [*records, *run.inherited]
    embedder, index = _embedder(run, parts, name)

    def score(backbone: Backbone) -> Scores:
        (features,) = embedder.embed(backbone)
        scores: Scores = {}
        for part in parts.values():
            scores |= part.score(features if index is None else features[index[id(part.rows)]])
        if len(chosen) > 1:
            scores[tracked] = float(np.mean([scores[part.tracked] for part in chosen]))
        return scores

    salts = "+".join(str(record["salt"]) for record in records)
    height, width = embedder.normalise(embedder.read(embedder.paths[0])[None]).shape[-2:]
    tokens = len(embedder.paths) * (height * width // run.level.spec.patch_size**2)
    return Measure(score, tracked, words, min(part.queries for part in chosen), salts, tokens)


def _chosen(settings: EvaluateConfig, parts: Mapping[str, Part]) -> list[Part]:
    """The parts that choose the checkpoint."""
    if settings.select == MEAN:
        return list(parts.values())
    needed = {KNN: "labels", LINEAR: "labels", ROBUSTNESS: "robustness"}
    if settings.select not in needed:
        raise ConfigError(f"expected evaluate.select as {', '.join([*needed, MEAN])}, found '{settings.select}'")
    if settings.select not in parts:
        raise ConfigError(
            f"expected evaluate.{needed[settings.select]}=FILE for evaluate.select={settings.select}, found none; give "
            f"it, or choose the checkpoint by another score with evaluate.select={', '.join([*parts, MEAN])}"
        )
    return [parts[settings.select]]


def _parts(run: Run, resumed: bool) -> dict[str, Part]:
    """The scores that the settings ask for, by their names in ``evaluate.select``."""
    settings = run.config.evaluate
    parts = {}
    if settings.labels is not None:
        labels = Path(settings.labels)
        table = read_labels(labels, required=("train",))
        _check_leakage(run, labels, table, resumed)
        selection = select_rows(table)
        what = "the run is scored" if settings.select == ROBUSTNESS else "the best checkpoint is chosen"
        progress.say(f"{labels}: {what} by {selection.origin}; test rows are not used")
        rows, queries = selection.restrict(table), len(selection.queries)
        parts[KNN] = _knn(settings, rows, queries)
        if settings.select in (LINEAR, MEAN):
            parts[LINEAR] = _linear(rows, queries)
    if settings.robustness is not None:
        labels = Path(settings.robustness)
        table = read_labels(labels, required=(), columns=(settings.robustness_by,), partition_is_optional=True)
        _check_leakage(run, labels, table, resumed)
        parts[ROBUSTNESS] = _robustness(settings, labels, _scored_rows(table, labels))
    return parts


def _check_leakage(run: Run, labels: Path, table: LabelTable, resumed: bool) -> None:
    # Files are compared when a run starts: one that an earlier version started goes on.
    level = run.level
    trained = level.pretraining(level.slides, None if resumed else vars(run.config))
    facts = check_leakage(table, trained, run.config.evaluate.allow_leakage, ("val", "test"), "evaluate.allow_leakage")
    progress.say(f"{labels}: compared with the training data: {facts['compared']}")


def _knn(settings: EvaluateConfig, rows: LabelTable, queries: int) -> Part:
    def score(features: Tensor) -> Scores:
        return table_scores(rows, features, settings.k, settings.temperature, "val")  # type: ignore[return-value]

    k = settings.k[0]
    return Part(rows, f"knn_{k}_accuracy", f"{k}-NN accuracy", queries, score)


def _linear(rows: LabelTable, queries: int) -> Part:
    number = {name: i for i, name in enumerate(rows.classes)}
    truth = np.array([number[label] for label in rows.labels])
    train, val = (np.array(rows.rows(partition)) for partition in ("train", "val"))

    def score(features: Tensor) -> Scores:
        found = distributed.run_on_main(lambda: linear_accuracy(features.numpy(), truth, train, val))
        return {"linear_accuracy": found}

    return Part(rows, "linear_accuracy", "linear probe accuracy", queries, score)


def _robustness(settings: EvaluateConfig, labels: Path, rows: LabelTable) -> Part:
    by = settings.robustness_by
    try:
        measure = neighbour_scores(by, rows.labels, rows.columns[by], rows.groups()[0], settings.k[0])
    except DataError as error:
        raise DataError(f"{labels}: {error}") from None
    progress.say(f"{labels}: {len(rows.paths)} rows score robustness against the {by}")

    def score(features: Tensor) -> Scores:
        found = distributed.run_on_main(lambda: measure(features.numpy()))
        return {f"robustness_{name}": value for name, value in found.items()}

    return Part(rows, "robustness_ri", f"robustness index ({by})", len(rows.paths), score)


def _scored_rows(table: LabelTable, labels: Path) -> LabelTable:
    """Rows of partition val, or train where there are none; all of a table without partitions. Never test rows."""
    rows: Sequence[int] = table.rows("val") or table.rows("train")
    if not table.is_split:
        rows = range(len(table.paths))
    if not rows:
        raise DataError(f"{labels}: expected rows of partition val or train, found only test rows, which score no run")
    return Selection([], list(rows), "").restrict(table)


def _embedder(run: Run, parts: Mapping[str, Part], name: str) -> tuple[FileEmbedder, dict[int, Any] | None]:
    """What embeds the rows of all parts, each file once; and where those of each table are, None with one table."""
    level = run.level
    tables = {id(part.rows): part.rows for part in parts.values()}
    place = {path: i for i, path in enumerate(dict.fromkeys(path for one in tables.values() for path in one.paths))}
    index = {key: [place[path] for path in table.paths] for key, table in tables.items()}
    # Tiles are scored at their own size during training, also where the initial weights have another input size.
    transform = replace(level.transform, input_size_px=None) if level.transform else None
    embedder = FileEmbedder(
        list(place),
        level.labelled_reader(list(place), level.spec, run.config, name, run.origin),
        level.normaliser(transform, level.spec.patch_size),
        run.device,
        run.config.speed.precision,
    )
    return embedder, index if len(tables) > 1 else None
