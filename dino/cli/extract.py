"""``dino extract``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, end, with_settings
from dino.cli.grammar import UsageError, named_or_positional
from dino.config.load import load_config
from dino.config.schema import ExtractConfig

Words = Annotated[list[str] | None, typer.Argument(metavar="RUN ROOT [KEY=VALUE]...", hidden=True)]


def extract(words: Words = None, config: ConfigFile = None) -> None:
    """Turn pixels into features with the teacher of a run.

    RUN is a run, a checkpoint file (foreign ones too) or timm:NAME; ROOT is the folder that `dino tile` wrote.

    A level-1 model writes one .pt grid per region into ROOT/region_4096_pretraining; a level-2 run writes one .h5 file
    per slide. What the same model has done already is skipped. Work is split over processes under torchrun.

    For example:

        dino extract runs/patch data
        dino extract hipt.pth data transform=hipt
    """
    model, root, settings = arguments(words or [], config)
    from dino import api

    end(api.extract(model, root, settings).exit_code)


def arguments(words: list[str], file: Path | None) -> tuple[str, Path, ExtractConfig]:
    """RUN, ROOT and the settings.

    Args:
        words: RUN and ROOT by place, or as ``model=`` and ``data_dir=``, and settings.
        file: The user's YAML.

    Raises:
        UsageError: If one of the two is not given.
    """
    given, overrides = named_or_positional(words, {"model": "RUN", "data_dir": "ROOT"})
    if len(given) < 2:
        raise UsageError(f"expected RUN ROOT (or model= and data_dir=), found {' '.join(given.values()) or 'nothing'}")
    return given["model"], Path(given["data_dir"]), load_config(ExtractConfig, file=file, overrides=overrides)


command = with_settings(ExtractConfig)
