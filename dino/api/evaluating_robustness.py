"""``evaluate robustness``: whether features follow the biology, or the centre, scanner or stain."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dino import distributed, files, progress
from dino.api.evaluating import on_all_processes
from dino.api.features import Column, columns_of, with_recorded_patients
from dino.api.results import check_output, output_path, write_result
from dino.config.schema import RobustnessConfig
from dino.evaluate import LabelTable, join_slides, read_labels
from dino.evaluate.confounders import Design, check_neighbours, design, import_croma
from dino.evaluate.results import CHANCE, MODEL, Entry, Result, collect
from dino.evaluate.robustness import chance, probe_folds, robustness
from dino.evaluate.task import Fold, Rows, read_folds


def evaluate_robustness(models: Sequence[str], labels: str | Path, config: RobustnessConfig) -> Result:
    """Score the robustness of features on the test rows of a table, or on all rows of one without partitions.

    Models, baselines, intervals and differences are those of :func:`dino.api.evaluate`.

    Args:
        models: See there.
        labels: See there; with a further column ``config.by``, or ``config.slides`` has it.
        config: Settings.

    Returns:
        A row per model and baseline. Written as JSON, CSV and PNG to ``config.output``, else to
        ``RUN/robustness_<name of the table>.json`` for a run, with a further figure of the neighbours and features.

    Raises:
        DataError: See :func:`dino.api.evaluate`; if the rows do not compare values of the confounder, see
            :func:`dino.evaluate.confounders.design`, or are too few.
        CheckpointError: If a model cannot be loaded.
        ConfigError: If a setting is invalid, or ``croma`` is not installed.
    """
    return on_all_processes(models, config, lambda device: _evaluate(models, Path(labels), config, device))


def _evaluate(models: Sequence[str], labels: Path, config: RobustnessConfig, device: torch.device) -> Result:
    import_croma()
    columns = () if config.slides else (config.by,)
    table = read_labels(labels, ("test",), partition_is_optional=True, columns=columns, label=config.label)
    table = with_recorded_patients(table, labels, models)
    if config.slides:
        table = join_slides(table, Path(config.slides), config.by)
    rows = np.array(table.rows("test") if table.is_split else range(len(table.paths)), np.int64)
    found = _design(table, rows, config)
    output = output_path("robustness", models[0], labels, config.output)
    if output is not None:
        check_output(output, [config.slides])
    columns, facts = columns_of(table, labels, models, config, device)
    names = [str(table.paths[row]) for row in rows]
    folds = distributed.run_on_main(lambda: _folds(names, found, config))
    about = {
        **{"by": config.by, "values": list(found.values), "classes": len(found.classes), "queries": len(rows)},
        **{"folds": len(folds), "grouped_by": table.groups()[1], "settings": asdict(config)},
    }

    def score() -> Result:
        entries = []
        for column in columns:
            scored = robustness(_features(column, rows), found, rows, folds, config)
            if len(entries) < len(facts):  # of a model, not of a baseline
                scored = replace(scored, details={**scored.details, **facts[len(entries)]})
            entries.append(Entry(column.name, column.role, scored, column.source, column.fingerprint))
        entries.append(Entry(CHANCE, CHANCE, chance(found, rows, list(entries[0].scored.statistics))))
        groups = [str(group) for group in found.groups]
        return collect("robustness", str(labels), entries, groups, config.resamples, config.seed, about)

    result = distributed.run_on_main(score)
    if output is not None and distributed.is_main():
        write_result(result, output, names, folds)
        _write_figure(result, columns, rows, found, output.with_name(f"{output.stem}_features.png"))
    return result


def _design(table: LabelTable, rows: Rows, config: RobustnessConfig) -> Design:
    groups, confounders = table.groups()[0], table.columns[config.by]
    found = design(config.by, *([values[row] for row in rows] for values in (table.labels, confounders, groups)))
    check_neighbours(found, config.k, config.m)
    return found


def _folds(names: Sequence[str], found: Design, config: RobustnessConfig) -> list[Fold]:
    """The folds of the linear probes: those of a file, or drawn by the seed."""
    if config.splits:
        return read_folds(Path(config.splits), names)
    return probe_folds(found, config.folds, config.seed)


def _features(column: Column, rows: Rows) -> NDArray[np.float32]:
    return np.asarray(column.load()[rows], np.float32)


def _write_figure(result: Result, columns: Sequence[Column], rows: Rows, found: Design, path: Path) -> None:
    from dino.report.robustness import Shown, robustness_figure

    mapped = {column.name: _features(column, rows) for column in columns if column.role == MODEL}
    shown = [Shown(row.name, list(row.details["neighbours"].values()), mapped.get(row.name)) for row in result.rows]
    with files.oserror_to_data_error(path.parent):
        files.write_bytes(path, robustness_figure(shown, found))
    progress.say(f"neighbours and features: {path}")
