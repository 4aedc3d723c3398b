"""``dino evaluate knn``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import expect, split
from dino.config.load import load_config
from dino.config.schema import KnnConfig

Words = Annotated[list[str] | None, typer.Argument(metavar="RUN LABELS [KEY=VALUE]...", hidden=True)]


def knn(words: Words = None, config: ConfigFile = None) -> None:
    """Judge frozen features by the votes of their nearest neighbours.

    RUN is a run, a checkpoint file or timm:NAME. LABELS is a CSV with the columns image_path, label and partition
    (train or test), and perhaps slide_id and patient_id. Slides and patients that the model was pretrained on are
    refused as test data. Relative paths resolve from the CSV.

    For example:

        dino evaluate knn runs/patch labels.csv k=[10,20]
    """
    positional, overrides = split(words or [])
    model, labels = expect(positional, ["RUN", "LABELS"])
    settings = load_config(KnnConfig, file=config, overrides=overrides)
    from dino import api, progress

    result = api.evaluate_knn(model, Path(labels), settings)
    scored = [name for name in result if name not in ("about", "standard_error")]
    rows = [[metric, *(f"{result[name][metric]:.4f}" for name in scored)] for metric in result[scored[0]]]
    rows += [[f"standard error, k = {k}", f"{error:.4f}"] for k, error in result["standard_error"].items()]
    progress.table(rows, ["", *scored])


command = with_settings(KnnConfig)
