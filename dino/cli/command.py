"""Base class of all commands: the help lists every setting, and errors are printed as one line with an exit code."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from dino.cli.grammar import UsageError, refuse_settings_as_options
from dino.errors import DinoError

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "--config-file", "-c", metavar="FILE", help="YAML with the settings to change."),
]


class Command(TyperCommand):
    """Base class of every command.

    Attributes:
        schema: Dataclass of the command's settings, None if it has none.
        recipe: Recipe whose values are the defaults.
    """

    schema: ClassVar[type | None] = None
    recipe: ClassVar[str | None] = None

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The part of the usage line after the command: the metavars of its arguments, then options."""
        arguments = [param.metavar for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return [metavar for metavar in arguments if metavar] + ["[OPTIONS]"]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, followed by every setting with its default."""
        super().format_help(ctx, formatter)
        if self.schema is not None:
            in_file = any("--config" in param.opts for param in self.get_params(ctx))
            _print_settings(self.schema, self.recipe, " or in a YAML file with --config" if in_file else "")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; a setting that is written as an option is an error with a hint."""
        if self.schema is not None:
            from dino.config.load import settings

            keys = {item.key for item in settings(self.schema)}
            try:
                refuse_settings_as_options(args, keys, {name for param in self.get_params(ctx) for name in param.opts})
            except UsageError as error:
                _exit_with(error, ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a :class:`DinoError` becomes one line on stderr and its exit code."""
        try:
            return super().invoke(ctx)
        except DinoError as error:
            _exit_with(error, ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


def with_settings(settings_schema: type, settings_recipe: str | None = None) -> type[Command]:
    """A :class:`Command` whose help lists the settings of ``settings_schema``."""

    class CommandWithSettings(Command):
        schema = settings_schema
        recipe = settings_recipe

    return CommandWithSettings


def end(exit_code: int) -> None:
    """End the command with ``exit_code`` without further output."""
    if exit_code:
        raise typer.Exit(exit_code)


def flat_scalars(result: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested results as ``(dotted name, text)`` rows, floats with six significant digits."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield from flat_scalars(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{value:g}" if isinstance(value, float) else str(value)


def _exit_with(error: DinoError, ctx: Any) -> NoReturn:
    if isinstance(error, UsageError):
        typer.echo(ctx.get_usage(), err=True)
    typer.echo(f"error{_process()}: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(error.exit_code) from None


def _process() -> str:
    """The rank of this process as text; empty for rank 0 and without ``torchrun``."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" or "WORLD_SIZE" not in os.environ else f" in process {rank}"


def _print_settings(schema: type, recipe: str | None, elsewhere: str) -> None:
    from dino.config.load import flatten, load_config, settings, to_dict

    values = flatten(to_dict(load_config(schema, recipe=recipe)))
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=16)
    table.add_column("description", overflow="fold")
    group = ""
    for item in settings(schema):
        if item.key.rpartition(".")[0] != group:
            group = item.key.rpartition(".")[0]
            table.add_row()
        table.add_row(item.key, _format(values[item.key]), item.help)
    console = Console(highlight=False)
    origin = f" Defaults of the recipe {recipe}:" if recipe else ""
    console.print(f"Settings, passed as KEY=VALUE{elsewhere}.{origin}\n")
    console.print(table, markup=False)


def _format(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
