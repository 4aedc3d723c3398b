"""``dino evaluate knn``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import expect, split
from dino.config.load import load_config
from dino.config.schema import KnnConfig

Words = Annotated[list[str] | None, typer.Argument(metavar="RUN LABELS [KEY=VALUE]...", hidden=True)]


def knn(words: Words = None, config: ConfigFile = None) -> None:
    """Evaluate frozen features by weighted k-nearest-neighbour classification.

    RUN is a run folder, a checkpoint file or timm:NAME. LABELS is a CSV (commas, semicolons or tabs) with the columns
    image_path, label and partition (train or test), and optionally slide_id and patient_id. Test slides and patients
    that the model was pretrained on are an error. Relative paths resolve from the CSV. The scores of a run are written
    to RUN/knn_LABELS.json, named after the CSV; output=FILE writes them elsewhere.

    For example:

        dino evaluate knn runs/patch labels.csv k=[10,20]
    """
    positional, overrides = split(words or [])
    model, labels = expect(positional, ["RUN", "LABELS"])
    settings = load_config(KnnConfig, file=config, overrides=overrides)
    from dino import api, progress

    result = api.evaluate_knn(model, Path(labels), settings)
    progress.table(*_table(result))


def _table(result: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows and header of the scores: one column per network or baseline, one row per metric and standard error."""
    errors = result["standard_errors"]
    columns = list(errors)
    rows = []
    for metric in result[columns[0]]:
        rows.append([metric, *(_number(result[name][metric]) for name in columns)])
        if metric in errors[columns[0]]:
            k = metric.removeprefix("knn_").removesuffix("_accuracy")
            rows.append([f"{k}-NN accuracy, standard error", *(_number(errors[name].get(metric)) for name in columns)])
    return rows, ["", *columns]


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


command = with_settings(KnnConfig)
