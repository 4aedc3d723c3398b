"""``dino config``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import Command, ConfigFile
from dino.cli.grammar import UsageError, split
from dino.config import schema
from dino.config.load import RECIPES, flatten, load_config, recipe_comment, settings, to_commented_yaml, to_dict

Words = Annotated[list[str] | None, typer.Argument(metavar="COMMAND [KEY=VALUE]...", hidden=True)]
Recipe = Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="Recipe to start from.")]

COMMANDS: dict[str, type] = {
    "tile": schema.TileConfig,
    "pretrain patch": schema.PatchConfig,
    "pretrain region": schema.RegionConfig,
    "extract": schema.ExtractConfig,
    "evaluate knn": schema.KnnConfig,
    "export": schema.ExportConfig,
    "info": schema.InfoConfig,
    "launch slurm": schema.LaunchConfig,
    "demo": schema.DemoConfig,
}


def config(words: Words = None, config: ConfigFile = None, recipe: Recipe = None) -> None:
    """Print all settings of a command as YAML, resolved and with comments.

    COMMAND is tile, patch, region, extract, knn, export, info, slurm or demo. Values that differ from the default are
    marked. The output can be saved, edited and passed to the command with --config.

    For example:

        dino config patch > my.yaml
        dino config patch --recipe patch model.out_dim=4096
    """
    positional, overrides = split(words or [])
    typer.echo(resolved_yaml(" ".join(positional), overrides, config, recipe), nl=False)


def resolved_yaml(name: str, overrides: list[str], file: Path | None = None, recipe: str | None = None) -> str:
    """The settings of a command as YAML text.

    Args:
        name: The command, such as ``pretrain patch``; one of its words is enough.
        overrides: ``key=value`` strings.
        file: The user's YAML.
        recipe: Name of a recipe; None for the one that the command starts from.

    Raises:
        UsageError: If there is no such command.
        ConfigError: If the settings or the recipe are wrong.
    """
    command = next((known for known in COMMANDS if name and name in (known, *known.split())), None)
    if name == "pretrain" or command is None:
        names = ", ".join(known.split()[-1] for known in COMMANDS)
        raise UsageError(f"expected one of {names}, found {name or 'nothing'}")
    kind = COMMANDS[command]
    recipe = recipe or next(iter(RECIPES.get(kind, ())), None)
    resolved = load_config(kind, recipe=recipe, file=file, overrides=overrides)
    values = flatten(to_dict(resolved))
    changed = sum(values[item.key] != item.default for item in settings(kind))
    origin = f", recipe {recipe}" if recipe else ""
    verb = "differs" if changed == 1 else "differ"
    head = [
        f"# Settings of `dino {command}`{origin}. Pass a copy with --config, or single settings as key=value.",
        f"# {changed or 'None'} of {len(values)} {verb} from the defaults{', marked [default: …]' if changed else ''}.",
        *(["#", recipe_comment(kind, recipe)] if recipe else []),
    ]
    return "\n".join(head) + "\n\n" + to_commented_yaml(resolved)


command = Command
