"""The ``dino`` command with its subcommands, and the entry points of the original's scripts."""

from collections.abc import Callable
from typing import Annotated

import typer
from typer.core import TyperGroup

from dino import __version__
from dino.cli import commands, evaluations, maps, reports, runs, viewing
from dino.cli.command import Command, ConfigFile


class _InOrder(TyperGroup):
    """Lists the subcommands in the order in which they are used."""

    def list_commands(self, ctx: object) -> list[str]:
        return [
            "tile",
            "pretrain",
            "extract",
            "evaluate",
            "report",
            "figure",
            "view",
            "words",
            "attention",
            "export",
            "geojson",
            "overlays",
            "info",
            "status",
            "resume",
            "replay",
            "launch",
            "config",
            "demo",
        ]


app = typer.Typer(
    cls=_InOrder,
    help="Self-supervised vision transformers for whole slides: tile, pretrain, extract, evaluate, export.\n\n"
    "Inputs and outputs are positional arguments, settings are passed as KEY=VALUE, in any order. The --help of a "
    "command lists all its settings. To try all steps on a sample slide, run `dino demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
pretraining = typer.Typer(
    rich_markup_mode="markdown", help="Pretrain level 1 (patch) or level 2 (region) with DINO.", no_args_is_help=True
)
evaluation = typer.Typer(rich_markup_mode="markdown", help="Evaluate the features of a model.", no_args_is_help=True)

launching = typer.Typer(rich_markup_mode="markdown", help="Run a command on a cluster.", no_args_is_help=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dino {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the subcommand."""


app.command(cls=commands.tile_command)(commands.tile)
app.add_typer(pretraining, name="pretrain")
pretraining.command(cls=commands.patch_command)(commands.patch)
pretraining.command(cls=commands.region_command)(commands.region)
app.command(cls=commands.extract_command)(commands.extract)
app.add_typer(evaluation, name="evaluate")
for name, (command, function) in evaluations.COMMANDS.items():
    evaluation.command(name, cls=command)(function)
app.command(cls=reports.report_command)(reports.report)
app.command(cls=reports.figure_command)(reports.figure)
app.command(cls=viewing.view_command)(viewing.view)
app.command(cls=viewing.words_command)(viewing.words)
app.command(cls=maps.attention_command)(maps.attention)
app.command(cls=commands.export_command)(commands.export)
app.command(cls=viewing.geojson_command)(viewing.geojson)
app.command(cls=viewing.overlays_command)(viewing.overlays)
app.command(cls=commands.info_command)(commands.info)
app.command(cls=runs.resume_command)(runs.resume)
app.command(cls=Command)(runs.status)
app.command(cls=Command)(runs.replay)
app.add_typer(launching, name="launch")
launching.command(cls=commands.slurm_command)(commands.slurm)
app.command(cls=Command)(commands.config)
app.command(cls=commands.demo_command)(commands.demo)


@app.command("help", hidden=True)
def _help(arguments: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]...", hidden=True)] = None) -> None:
    """Print the help page, as --help does."""
    app([*(arguments or []), "--help"], prog_name="dino")


@evaluation.callback()
def _evaluation() -> None:
    """Evaluate the features of a model."""


@launching.callback()
def _launching() -> None:
    """Run a command on a cluster."""


def main() -> None:
    """Run the command line and exit with its exit code."""
    app(prog_name="dino")


def patch_entry_point() -> None:
    """``python3 dino/patch.py``: level 1 with the original's recipe."""
    _run_single(_original_patch, commands.original_patch_command)


def region_entry_point() -> None:
    """``python3 dino/region.py``: level 2."""
    _run_single(commands.region, commands.region_command)


def extract_entry_point() -> None:
    """``python3 dino/extract_features.py``."""
    _run_single(commands.extract, commands.extract_command)


def _original_patch(
    arguments: commands.PatchArguments = None, config: ConfigFile = None, recipe: commands.PatchRecipe = "patch"
) -> None:
    """Level 1 with the original's recipe: data_dir=ROOT output_dir=RUN and other settings as KEY=VALUE."""
    commands.pretrain_level("patch", arguments or [], config, recipe)


def _run_single(function: Callable[..., None], command: type[Command]) -> None:
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    single.command(cls=command)(function)
    single()
