"""The ``dino`` command: its subcommands, and the doors that stand in for the original's scripts."""

from collections.abc import Callable
from typing import Annotated

import typer
from typer.core import TyperGroup

from dino import __version__
from dino.cli import config, demo, evaluate, export, extract, info, launch, pretrain, replay, tile
from dino.cli.command import Command, ConfigFile


class _InOrder(TyperGroup):
    """Lists the subcommands in the order of the chain."""

    def list_commands(self, ctx: object) -> list[str]:
        return ["tile", "pretrain", "extract", "evaluate", "export", "info", "replay", "launch", "config", "demo"]


app = typer.Typer(
    cls=_InOrder,
    help="Self-supervised vision transformers for whole slides: tile, pretrain, extract, judge, export.\n\n"
    "Inputs and outputs are given by place, settings as KEY=VALUE in any order; every subcommand's --help lists all of "
    "its settings. Try `dino demo` first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
pretraining = typer.Typer(
    rich_markup_mode="markdown", help="Pretrain level 1 (patch) or level 2 (region) with DINO.", no_args_is_help=True
)
evaluation = typer.Typer(rich_markup_mode="markdown", help="Judge the features of a model.", no_args_is_help=True)

launching = typer.Typer(rich_markup_mode="markdown", help="Run a command on a cluster.", no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dino {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Options that stand before the subcommand."""


app.command(cls=tile.command)(tile.tile)
app.add_typer(pretraining, name="pretrain")
pretraining.command(cls=pretrain.patch_command)(pretrain.patch)
pretraining.command(cls=pretrain.region_command)(pretrain.region)
app.command(cls=extract.command)(extract.extract)
app.add_typer(evaluation, name="evaluate")
evaluation.command(cls=evaluate.command)(evaluate.knn)
app.command(cls=export.command)(export.export)
app.command(cls=info.command)(info.info)
app.command(cls=replay.command)(replay.replay)
app.add_typer(launching, name="launch")
launching.command(cls=launch.command)(launch.slurm)
app.command(cls=config.command)(config.config)
app.command(cls=demo.command)(demo.demo)


@evaluation.callback()
def _evaluation() -> None:
    """Judge the features of a model."""


@launching.callback()
def _launching() -> None:
    """Run a command on a cluster."""


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    app(prog_name="dino")


def patch_door() -> None:
    """``python3 dino/patch.py``: level 1 with the original's recipe."""
    _door(_original_patch, pretrain.original_patch_command)


def region_door() -> None:
    """``python3 dino/region.py``: level 2."""
    _door(pretrain.region, pretrain.region_command)


def extract_door() -> None:
    """``python3 dino/extract_features.py``."""
    _door(extract.extract, extract.command)


def _original_patch(
    words: pretrain.Words = None, config: ConfigFile = None, recipe: pretrain.PatchRecipe = "patch"
) -> None:
    """Level 1 with the original's recipe: data_dir=ROOT output_dir=RUN and other settings as KEY=VALUE."""
    pretrain.pretrain("patch", words or [], config, recipe)


def _door(function: Callable[..., None], command: type[Command]) -> None:
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    single.command(cls=command)(function)
    single()
