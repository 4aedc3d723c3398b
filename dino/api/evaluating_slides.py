"""``evaluate slide``: predictions of slides or patients from folders of features."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino import distributed, progress
from dino.api.features import (
    FeatureSet,
    check_leakage,
    find_features,
    in_memory,
    open_features,
    slides_of_patients,
)
from dino.api.results import check_output, write_result
from dino.config.schema import MilConfig, SlideConfig
from dino.errors import ConfigError
from dino.evaluate import abmil, hipt, pooling
from dino.evaluate.results import CHANCE, MODEL, Entry, Result, collect
from dino.evaluate.slides import CaseTable, check_folds, read_cases, split
from dino.evaluate.task import Fold, read_folds

MEAN, ABMIL, HIPT = "mean", "abmil", "hipt"
NETWORKS = {ABMIL: abmil.GatedAttention, HIPT: hipt.RegionTransformer}


@dataclass(frozen=True)
class Study:
    """What all methods share: the cases, how they are split, and the settings."""

    table: CaseTable
    folds: Sequence[Fold]
    inner: Sequence[Sequence[Fold]]
    config: SlideConfig
    device: torch.device


def evaluate_slide(features: Sequence[str | Path], labels: str | Path, config: SlideConfig) -> Result:
    """Score features by how well slides or patients are predicted from them.

    Every folder of features is scored by mean pooling with a penalised linear model (logistic regression, ridge
    regression, or Cox's model) and beside it by attention-based multiple-instance learning
    (:class:`dino.evaluate.abmil.GatedAttention`) or HIPT's transformer over features of regions
    (:class:`dino.evaluate.hipt.RegionTransformer`), on the same rows. Penalties and numbers of epochs are chosen on
    folds of the training rows. Intervals are percentiles of a bootstrap over patients (slides where those are unknown);
    differences are to the first row, of the same bootstrap samples.

    Args:
        features: Folders with one file of features per slide: of tiles, of regions, or one vector.
        labels: CSV of ``slide_id|patient_id`` and ``label``, or ``time,event``, and optionally ``partition`` and
            ``patient_id``. A patient's bag is that of all slides.
        config: Settings.

    Returns:
        A row per folder and method, and one of the best constant prediction (``chance``). If ``config.output`` is set,
        it is written there as JSON, with a CSV, a figure and the folds beside it.

    Raises:
        DataError: If a table or a file of features is invalid, slides have no features, a folder has features of
            several encoders, or the labels cannot be split; if the disk cannot be written.
        ConfigError: If a setting is invalid, or lifelines is needed and not installed.
    """
    methods = _methods(config)
    if config.output:
        check_output(Path(config.output), [labels, config.slides])
    device = distributed.choose_device(config.device)
    table = read_cases(Path(labels), config.task, config.unit)
    table.outcome().check_packages()  # before features are read
    found = find_features(features, config.encoder)
    table = table.with_slides(slides_of_patients(table, found, config.slides))
    for one in found:
        labelled, table = len(table.cases), table.with_features(one.paths, str(one.folder), config.max_missing)
        if missing := labelled - len(table.cases):
            progress.warn(f"{one.folder}: {missing} labelled {table.unit}s without features are left out (max_missing)")
    study = _study(table, config, device)
    sets = [open_features(one, [slide for case in table.cases for slide in case.slides]) for one in found]
    entries = [entry for one in sets for entry in _scores(one, methods, study)]
    chance = pooling.cross_validate(table.outcome(), study.folds, study.inner, pooling.NoFeatures(table.outcome()))
    entries.append(Entry(CHANCE, CHANCE, chance))
    groups = [table.groups[int(row)] for row in chance.rows]
    result = collect("slide", str(labels), entries, groups, config.resamples, config.seed, _about(study))
    if config.output:
        crossed = not table.cases[0].partition
        write_result(result, Path(config.output), [case.name for case in table.cases], study.folds if crossed else ())
    return result


def _methods(config: SlideConfig) -> list[str]:
    """The methods, checked with the other settings."""
    given = [one.strip() for part in config.method for one in part.split(",")]
    if not given or not set(given) <= {MEAN, *NETWORKS}:
        raise ConfigError(f"expected {', '.join([MEAN, *NETWORKS])} as method, found {', '.join(given) or 'none'}")
    _check_limits(config, {"folds": 2, "inner_folds": 0, "max_missing": 0, "resamples": 0, "memory_gb": 0})
    _check_limits(config.abmil, {"piece": 1})
    _check_limits(config.hipt, {"layers": 1, "heads": 1})
    for name, network in ((ABMIL, config.abmil), (HIPT, config.hipt)):
        _check_limits(network, {"hidden": 1, "attention": 1, "epochs": 1, "batch_size": 1, "lr": 0, "weight_decay": 0})
        if network.tiles is not None and network.tiles < 1:
            raise ConfigError(f"expected at least 1 for {name}.tiles, or null, found {network.tiles}")
        if not 0 <= network.dropout < 1:
            raise ConfigError(f"expected {name}.dropout in [0, 1), found {network.dropout}")
    if config.hipt.hidden % config.hipt.heads:
        raise ConfigError(
            f"expected hipt.heads that divides hipt.hidden, found {config.hipt.heads} and {config.hipt.hidden}"
        )
    return list(dict.fromkeys([MEAN, *given]))


def _check_limits(group: SlideConfig | MilConfig, limits: Mapping[str, int]) -> None:
    for name, limit in limits.items():
        if not getattr(group, name) >= limit:
            raise ConfigError(f"expected at least {limit} for {name}, found {getattr(group, name)}")


def _study(table: CaseTable, config: SlideConfig, device: torch.device) -> Study:
    """The outcome, and how the cases are split."""
    outcome = table.outcome()
    if config.splits:
        if table.cases[0].partition:
            raise ConfigError("expected splits for a table without a column partition, found both; leave one out")
        folds = read_folds(Path(config.splits), [case.name for case in table.cases])
    else:
        folds = split(table, outcome, config.folds, config.seed)
    check_folds(table, outcome, folds)
    inner = [pooling.inner_folds(one, outcome, table.groups, config.inner_folds, config.seed) for one in folds]
    return Study(table, folds, inner, config, device)


def _scores(features: FeatureSet, methods: Sequence[str], study: Study) -> list[Entry]:
    """A row for each method."""
    config, outcome = study.config, study.table.outcome()
    opened = in_memory(features.bags, config.memory_gb) if len(methods) > 1 else features.bags
    cases = [[opened[slide] for slide in case.slides] for case in study.table.cases]
    bags = [abmil.PiecewiseBag(slides, config.abmil.piece) for slides in cases]
    with progress.bar(f"{features.name}: read features", len(bags)) as bar:
        moments = abmil.Moments(bags, bar.advance)
    tested = np.concatenate([fold.test for fold in study.folds])
    leakage = check_leakage(features, [study.table.cases[int(row)] for row in tested], config.allow_leakage)
    progress.say(f"{features.name}: compared with the pretraining: {leakage['compared']}")
    entries = []
    for method in methods:
        if method in NETWORKS and max(map(len, bags)) == 1:
            progress.say(f"{features.name}: one vector for each {study.table.unit}, so there is no attention to learn")
            continue
        trainings = sum(1 + len(splits) for splits in study.inner)
        with progress.bar(f"{features.name}: {method}", trainings) as bar:
            if method == MEAN:
                built: pooling.Method = pooling.LinearModel(outcome, moments.means)
            else:
                how = getattr(config, method), study.device, config.seed, NETWORKS[method]
                built = abmil.AttentionPooling(outcome, bags, moments, *how)
            scored = pooling.cross_validate(outcome, study.folds, study.inner, built, bar.advance)
        details = {**scored.details, "method": method, "leakage": leakage}
        details |= {"dim": moments.means.shape[1], "vectors": sum(map(len, bags))}
        name = f"{features.name}: {method}" if len(methods) > 1 else features.name
        source, scored = str(features.folder), replace(scored, details=details)
        entries.append(Entry(name, MODEL, scored, source, features.fingerprint))
    return entries


def _about(study: Study) -> dict[str, Any]:
    table = study.table
    return {
        "task": table.task,
        "unit": table.unit,
        "cases": len(table.cases),
        "slides": sum(len(case.slides) for case in table.cases),
        "patients": len(set(table.groups)),
        "folds": len(study.folds),
        "settings": asdict(study.config),
    }
