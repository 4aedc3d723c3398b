"""``dino demo``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import UsageError, split
from dino.config.load import load_config
from dino.config.schema import DemoConfig

Words = Annotated[list[str] | None, typer.Argument(metavar="[DIR] [KEY=VALUE]...", hidden=True)]


def demo(words: Words = None, config: ConfigFile = None) -> None:
    """Run the whole chain on the sample slide that ships with the package.

    Tile, pretrain both levels, extract, judge; ends with report.html and summary.json in DIR (./demo if not given).
    It takes some minutes on two cores and needs neither a GPU nor a network. It proves the plumbing, not the model.

    For example:

        dino demo demo
    """
    positional, overrides = split(words or [])
    if len(positional) > 1:
        raise UsageError(f"expected one DIR at most, found {len(positional)}: {' '.join(positional)}")
    settings = load_config(DemoConfig, file=config, overrides=overrides)
    from dino.demo import run_demo

    run_demo(Path(positional[0] if positional else "demo"), settings)


command = with_settings(DemoConfig)
