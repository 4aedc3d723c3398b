"""The command ``dino evaluate slide``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import expect_many, split
from dino.config.load import load_config
from dino.config.schema import SlideConfig

FeatureArguments = Annotated[list[str] | None, typer.Argument(metavar="FEATURES... LABELS [KEY=VALUE]...", hidden=True)]


def slide(arguments: FeatureArguments = None, config: ConfigFile = None) -> None:
    """Predict slides or patients from features: classes, numbers or survival.

    FEATURES is a folder with one file of feature vectors per slide, of tiles (ROOT/features_ENCODER), of regions
    (ROOT/region_features_ENCODER, ROOT/slide_features) or one vector (ROOT/slide_features_ENCODER); files of CLAM,
    TRIDENT and slide2vec are read too. Several are compared with the first one. LABELS is a CSV (commas, semicolons or
    tabs) with slide_id or patient_id, and label (with task=regression a number) or time and event (1, or 0 for
    censored). The slides of a patient are one bag.

    Each is scored by mean pooling with a linear model (logistic regression, ridge regression, or Cox's model by
    lifelines) and by attention-based multiple-instance learning (ABMIL, gated; over vectors of regions this is HIPT's
    attention over regions, without its transformer layers). A column partition (train, test, val) says how to split;
    without it the rows are cross-validated, with no patient on both sides. Penalties and numbers of epochs are chosen
    within the training rows, or on rows of partition val.

    Each score has a 95 % interval from a bootstrap over patients. AUC, C-index and Pearson's correlation are means over
    folds. output=FILE.json writes the result, with a table (.csv) and the folds beside it.

    For example:

        dino evaluate slide slides/features_ours slides/features_theirs labels.csv output=subtype.json
        dino evaluate slide slides/features_ours survival.csv unit=patient method=mean
    """
    positional, overrides = split(arguments or [])
    features, labels = expect_many(positional, "FEATURES", "LABELS")
    settings = load_config(SlideConfig, file=config, overrides=overrides)
    from dino import api, progress

    progress.table(*api.evaluate_slide(features, Path(labels), settings).table())


slide_command = with_settings(SlideConfig)
