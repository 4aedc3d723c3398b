"""Features of labelled files by several models and their baselines, and whether the models have seen the files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dino import distributed, progress
from dino.api.levels import level_named
from dino.config.schema import EvaluationConfig
from dino.errors import DataError
from dino.evaluate import (
    INITIAL,
    MODEL,
    RANDOM,
    LabelTable,
    check_leakage,
    check_selection,
    in_words,
    recorded_selection,
)
from dino.extraction.cache import FeatureCache, cache_folder
from dino.extraction.embed import FileEmbedder, at_input_size
from dino.files import printable
from dino.models.backbone import Backbone, build_backbone
from dino.models.checkpoint import fingerprint
from dino.models.weights import LoadedBackbone, load_backbone_file
from dino.train.checkpoint import START

Features = NDArray[Any]  # (N, D)


def load_models(models: Sequence[str], config: EvaluationConfig) -> list[LoadedBackbone]:
    """Load the models of an evaluation.

    Raises:
        CheckpointError: If one cannot be loaded.
        DataError: If they are not of one level.
    """
    loaded = [load_backbone_file(model, config.arch, config.transform) for model in models]
    loaded = [at_input_size(one, config.input_size) for one in loaded]
    other = next((one for one in loaded if one.level != loaded[0].level), None)
    if other is not None:
        raise DataError(
            f"expected models of one level, found {loaded[0].source} ({loaded[0].level}) and {other.source} "
            f"({other.level}): evaluate them separately"
        )
    return loaded


@dataclass(frozen=True)
class Column:
    """Features of all rows of a table.

    Attributes:
        name: Name in the table of results.
        role: ``model``, or the kind of baseline.
        load: Reads the features ``(N, D)``, which are in memory only while a model is scored.
        source: Where the model is.
        fingerprint: Of its weights.
    """

    name: str
    role: str
    load: Callable[[], Features]
    source: str = ""
    fingerprint: str = ""


class Embedding:
    """Embeds the rows of a table on all processes, unless their features are cached.

    Args:
        table: The rows.
        config: Settings.
        device: Where to compute.
    """

    def __init__(self, table: LabelTable, config: EvaluationConfig, device: torch.device) -> None:
        self.table, self.config, self.device = table, config, device
        self.cache = FeatureCache(cache_folder(config.cache), table.paths)

    def columns(self, names: Sequence[str], models: Sequence[LoadedBackbone]) -> list[Column]:
        """Features by the models, then by the baselines of the first one."""
        first, columns, plain = models[0], [], np.empty(0)
        for name, loaded in zip(names, models, strict=True):
            features, *others = self._embed(loaded, loaded.backbone, loaded.fingerprint, name, loaded is first)
            columns.append(Column(name, MODEL, _constant(features), loaded.source, loaded.fingerprint))
            plain = others[0] if others else plain
        for role, network in _baseline_networks(first).items():
            (features,) = self._embed(first, network, fingerprint(network), in_words(role))
            columns.append(Column(in_words(role), role, _constant(features)))
        baseline = level_named(first.level).baseline
        return [*columns, Column(in_words(baseline), baseline, _constant(plain))]

    def _embed(
        self, loaded: LoadedBackbone, network: Backbone, mark: str, name: str, with_plain: bool = False
    ) -> list[Features]:
        """Features by a network that gets what ``loaded`` gets; and those that need no network, as files are read once.

        With several processes only the main one has those that were cached.
        """
        level, spec, config = level_named(loaded.level), loaded.backbone.spec, self.config
        # Built first, because it refuses files that are not for this model; cached features may be those of another.
        read = level.labelled_reader(self.table.paths, spec, config, loaded.source, loaded.details)
        transform = asdict(loaded.transform) if loaded.transform else None
        keys: list[Mapping[str, Any]] = [
            {
                **{"network": mark, "transform": transform, "precision": config.precision},
                "grid_order": config.grid_order,
            },
            *([{"network": level.baseline}] if with_plain else []),
        ]
        cached = [self.cache.load(key) for key in keys]
        if distributed.broadcast(all(one is not None for one in cached)):
            progress.say(f"{name}: features of {len(self.table.paths):,} files are in {self.cache.folder}")
            return [np.empty((0, 0)) if one is None else one for one in cached]
        embedder = FileEmbedder(
            self.table.paths,
            read,
            level.normaliser(loaded.transform, spec.patch_size),
            self.device,
            config.precision,
            config.batch_size,
            config.num_workers,
        )
        with progress.bar(f"embed: {name}", len(embedder.own_paths)) as bar:
            plain = [level.baseline_features] if with_plain else []
            found = [one.numpy() for one in embedder.embed(network, *plain, advance=bar.advance)]
        if distributed.is_main():
            for key, features in zip(keys, found, strict=True):
                self.cache.store(key, features)
        return list(found)


def _constant(features: Features) -> Callable[[], Features]:
    return lambda: features


def facts_of(table: LabelTable, labels: Path, loaded: LoadedBackbone, allow: bool) -> dict[str, Any]:
    """What is recorded of a model beside its scores, after a check that it has not seen the rows that are tested.

    Args:
        table: The labels.
        labels: Their file, for messages.
        loaded: The model.
        allow: Accept test data that was pretrained on or chose the checkpoint; warn instead.

    Returns:
        ``step``, ``arch`` and ``transform`` of the model; ``leakage`` and ``selection``, see
        :func:`dino.evaluate.leakage.check_leakage` and :func:`dino.evaluate.selection.check_selection`.

    Raises:
        DataError: If the model has seen tested rows, and ``allow`` is False.
    """
    if not table.is_split:
        table = replace(table, partition=["test"] * len(table.paths))  # each is tested in one of the folds
    level = level_named(loaded.level)
    trained = level.pretraining(loaded.details.get("training_slides"), loaded.config)
    leakage = check_leakage(table, trained, allow)
    progress.say(f"{labels}: compared with the pretraining of {loaded.source}: {leakage['compared']}")
    selection = check_selection(table, recorded_selection(loaded.details), allow)
    progress.say(f"{labels}: compared with the choice of {loaded.source}: {selection['compared']}")
    if leakage["allowed"]:
        progress.warn("test data that was pretrained on is allowed (allow_leakage=true): the score is optimistic")
    if selection["allowed"]:
        progress.warn(
            f"{selection['seen_rows']} test rows that chose the checkpoint are allowed (allow_leakage=true): the score "
            "is optimistic"
        )
    transform = loaded.transform.name if loaded.transform else None
    facts = {"step": loaded.step, "arch": loaded.backbone.spec.arch, "transform": transform}
    return {**facts, "leakage": leakage, "selection": selection}


def unique_names(models: Sequence[str]) -> list[str]:
    """Short names of models: the last part of their paths, more of it where two would be equal."""
    parts = [Path(model).absolute().parts if Path(model).exists() else (model,) for model in models]
    for length in range(1, 1 + max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-1:])} ({i})" for i, part in enumerate(parts, 1)]  # one model several times


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
