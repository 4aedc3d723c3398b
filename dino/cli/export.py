"""``dino export``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import expect, split
from dino.config.load import load_config
from dino.config.schema import ExportConfig

Words = Annotated[list[str] | None, typer.Argument(metavar="RUN DIR [KEY=VALUE]...", hidden=True)]


def export(words: Words = None, config: ConfigFile = None) -> None:
    """Write the teacher's backbone as a folder that timm reads.

    RUN is a run or a checkpoint file, foreign ones too. Afterwards, in Python:

        timm.create_model("local-dir:DIR", pretrained=True)

    For example:

        dino export runs/patch vit_small_ours
        dino export dino_deitsmall16_pretrain.pth vit_small_dino transform=imagenet
    """
    positional, overrides = split(words or [])
    source, folder = expect(positional, ["RUN", "DIR"])
    settings = load_config(ExportConfig, file=config, overrides=overrides)
    from dino import api

    api.export(source, Path(folder), settings)


command = with_settings(ExportConfig)
