"""The commands of ``dino``: each parses its arguments and settings, and calls :mod:`dino.api`."""

import dataclasses
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dino.cli.command import ConfigFile, end, flat_scalars, with_settings
from dino.cli.grammar import FURTHER, UsageError, expect, expect_many, named_or_positional, split
from dino.cli.viewing import geojson, overlays
from dino.config.load import (
    RECIPES,
    default_recipe,
    flatten,
    given_keys,
    load_config,
    recipe_comment,
    to_commented_yaml,
    to_dict,
)
from dino.config.load import settings as all_settings
from dino.config.schema import (
    EVALUATION_CONFIGS,
    LEVEL_CONFIGS,
    AttentionConfig,
    DemoConfig,
    ExportConfig,
    ExtractConfig,
    FigureConfig,
    GeojsonConfig,
    InfoConfig,
    LaunchConfig,
    OverlaysConfig,
    PatchConfig,
    RegionConfig,
    ReportConfig,
    TileConfig,
    ViewConfig,
    WordsConfig,
)
from dino.slides.remote import is_uri, redacted

# ----------------------------------------------------------------------------------------------------- tile

TileArguments = Annotated[list[str] | None, typer.Argument(metavar="SLIDE... ROOT [KEY=VALUE]...", hidden=True)]


def tile(arguments: TileArguments = None, config: ConfigFile = None) -> None:
    """Find tissue and cut slides into tiles and regions on one lattice per slide.

    SLIDE is a slide, a folder of slides, or a slides.csv. Tiles, tables and previews are written to ROOT. Running the
    same command again continues with the remaining slides. A slide that fails does not stop the others: the reason is
    written to slides_status.csv, and the exit code is 2.

    For example:

        dino tile slides/*.svs data spacing_um=0.5 num_workers=8
        dino tile slides.csv data dry_run=true
        torchrun --nproc_per_node=4 -m dino tile slides.csv data
    """
    inputs, root, settings = tile_arguments(arguments or [], config)
    from dino import api

    end(api.tile(inputs, root, settings).exit_code)


def tile_arguments(arguments: list[str], file: Path | None) -> tuple[list[str | Path], Path, TileConfig]:
    """Parse SLIDE..., ROOT and the settings.

    Args:
        arguments: The positional arguments and settings.
        file: The user's YAML.

    Raises:
        UsageError: If SLIDE or ROOT is missing.
    """
    positional, overrides = split(arguments)
    inputs, root = expect_many(positional, "SLIDE", "ROOT")
    return list(inputs), Path(root), load_config(TileConfig, file=file, overrides=overrides)


tile_command = with_settings(TileConfig)

# ------------------------------------------------------------------------------------------------- pretrain

PatchArguments = Annotated[list[str] | None, typer.Argument(metavar="ROOT... RUN [KEY=VALUE]...", hidden=True)]
RegionArguments = Annotated[list[str] | None, typer.Argument(metavar="ROOT RUN [KEY=VALUE]...", hidden=True)]
PatchRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help=f"Recipe with the defaults: {', '.join(RECIPES[PatchConfig])}. The first one, or with a teacher "
        "patch_distill, is the default.",
    ),
]
RegionRecipe = Annotated[
    str, typer.Option("--recipe", metavar="NAME", help=f"Recipe with the defaults: {', '.join(RECIPES[RegionConfig])}.")
]


def patch(arguments: PatchArguments = None, config: ConfigFile = None, recipe: PatchRecipe = None) -> None:
    """Level 1: pretrain a vision transformer on tiles with DINO, or by distilling a frozen teacher.

    ROOT is a folder that `dino tile` wrote, or any folder of images, of tar files (WebDataset) or of parquet files; the
    tiles of several are trained on together. RUN is the output folder. Running the same command again resumes the run;
    a finished run is not changed.

    For example:

        dino pretrain patch data runs/patch training.nepochs=100 speed.num_workers=8
        dino pretrain patch data_20x data_10x runs/patch
        dino pretrain patch data runs/patch --recipe patch_continue model.init=timm:vit_small_patch16_224.dino
        dino pretrain patch data runs/small teacher=timm:vit_large_patch14_dinov2.lvd142m
        torchrun --nproc_per_node=8 -m dino pretrain patch data runs/patch
    """
    pretrain_level("patch", arguments or [], config, recipe)


def region(arguments: RegionArguments = None, config: ConfigFile = None, recipe: RegionRecipe = "region") -> None:
    """Level 2: pretrain a small vision transformer on the feature grids of regions with DINO.

    ROOT is a folder with the features that `dino extract` wrote, or any folder of .pt grids, or of .h5 features of
    tiles (of TRIDENT or CLAM, or features_ENCODER): from these, regions of region_cells x region_cells tiles are cut of
    which every tile is there, and what is left out is counted. RUN is the output folder. Running the same command
    again resumes the run; a finished run is not changed.

    For example:

        dino pretrain region data runs/region training.nepochs=100
        dino pretrain region trident/features_uni_v1 runs/region region_cells=8
    """
    pretrain_level("region", arguments or [], config, recipe)


def pretrain_level(level: str, arguments: list[str], file: Path | None, recipe: str | None) -> None:
    """Train one level; the arguments are those of :func:`pretrain_settings`."""
    settings = pretrain_settings(level, arguments, file, recipe)
    from dino import api

    if settings.model.init:
        settings = api.follow_init(settings, given_keys(file, split(arguments)[1]))
    api.pretrain(settings)


def pretrain_settings(
    level: str, arguments: list[str], file: Path | None, recipe: str | None
) -> PatchConfig | RegionConfig:
    """Resolve the settings of one level.

    Args:
        level: ``patch`` or ``region``.
        arguments: ROOT (of tiles also several) and RUN, positional or as ``data_dir=`` and ``output_dir=``, and
            settings.
        file: The user's YAML; it may contain the two folders, as the ``config.yaml`` of a run does.
        recipe: Name of the recipe whose values are the defaults; None for the default one.

    Raises:
        UsageError: If one of the two folders is missing.
    """
    schema = LEVEL_CONFIGS[level]
    positional, overrides = split(arguments)
    further_roots = positional[1:-1] if "more_data_dirs" in {item.name for item in dataclasses.fields(schema)} else []
    if further_roots:
        arguments = [positional[0], positional[-1], *overrides]
    folders, overrides = named_or_positional(arguments, {"data_dir": "ROOT", "output_dir": "RUN"})
    further = next((word for word in overrides if FURTHER.fullmatch(word)), None)
    if further:
        run = shlex.quote(folders.get("output_dir", "RUN"))
        raise UsageError(f"expected a length, found {further}; `dino resume {run} {further}` extends a finished run")
    recipe = recipe or default_recipe(schema, file, overrides)
    settings = load_config(schema, recipe=recipe, file=file, overrides=overrides)
    more: dict[str, Any] = {"more_data_dirs": further_roots} if further_roots else {}
    settings = dataclasses.replace(settings, **folders, **more)
    needed = ("data_dir",) if settings.dry_run or settings.profile else ("data_dir", "output_dir")
    missing = [key for key in needed if not getattr(settings, key)]
    if missing:
        raise UsageError(f"expected ROOT and RUN (or data_dir= and output_dir=), found no {' and no '.join(missing)}")
    return settings


patch_command = with_settings(PatchConfig, "patch_pathology")
original_patch_command = with_settings(PatchConfig, "patch")
region_command = with_settings(RegionConfig, "region")

# -------------------------------------------------------------------------------------------------- extract

ExtractArguments = Annotated[list[str] | None, typer.Argument(metavar="RUN ROOT [KEY=VALUE]...", hidden=True)]


def extract(arguments: ExtractArguments = None, config: ConfigFile = None) -> None:
    """Compute features of tiles and regions (level 1) or slides (level 2) with the teacher of a run.

    RUN is a run folder, a checkpoint file (also an external one), a folder of timm or transformers, timm:NAME or
    hf-hub:OWNER/NAME. ROOT is the folder that `dino tile` wrote.

    A level-1 model writes all tiles of a slide to ROOT/features_ENCODER/SLIDE.h5, as CLAM and TRIDENT read
    it, and one .pt grid per region to ROOT/region_4096_pretraining; a level-2 model writes one .h5 file per slide. With
    encoder=NAME all folders bear that name, so that several models stand side by side. Files that the same model has
    already written are skipped. Under torchrun the work is distributed over the processes.

    For example:

        dino extract runs/patch data
        dino extract hipt.pth data transform=hipt encoder=hipt
        dino extract runs/patch data what=tiles features=cls+mean storage=fp16 encoder=ours_mean
    """
    model, root, settings = extract_arguments(arguments or [], config)
    from dino import api

    end(api.extract(model, root, settings).exit_code)


def extract_arguments(arguments: list[str], file: Path | None) -> tuple[str, Path, ExtractConfig]:
    """Parse RUN, ROOT and the settings.

    Args:
        arguments: RUN and ROOT, positional or as ``model=`` and ``data_dir=``, and settings.
        file: The user's YAML.

    Raises:
        UsageError: If one of the two is missing.
    """
    given, overrides = named_or_positional(arguments, {"model": "RUN", "data_dir": "ROOT"})
    if len(given) < 2:
        raise UsageError(f"expected RUN ROOT (or model= and data_dir=), found {' '.join(given.values()) or 'nothing'}")
    return given["model"], Path(given["data_dir"]), load_config(ExtractConfig, file=file, overrides=overrides)


extract_command = with_settings(ExtractConfig)

# --------------------------------------------------------------------------------------------------- export

ExportArguments = Annotated[list[str] | None, typer.Argument(metavar="RUN DIR [KEY=VALUE]...", hidden=True)]


def export(arguments: ExportArguments = None, config: ConfigFile = None) -> None:
    """Export the teacher's backbone to a folder that timm can load.

    RUN is a run folder or a checkpoint file (also an external one). The export contains no folders, and salted hashes
    of the slides and patients of the pretraining; ids=true writes their ids. `dino export geojson ROOT OUT` is `dino
    geojson ROOT OUT`, and so is `dino export overlays ROOT OUT`. To load an export in Python:

        timm.create_model("local-dir:DIR", pretrained=True)

    For example:

        dino export runs/patch vit_small_ours
        dino export dino_deitsmall16_pretrain.pth vit_small_dino transform=imagenet
    """
    positional, overrides = split(arguments or [])
    of_slides = {"geojson": geojson, "overlays": overlays}
    if positional and positional[0] in of_slides and len(positional) > 2:
        return of_slides[positional[0]]([*positional[1:], *overrides], config)
    source, folder = expect(positional, ["RUN", "DIR"])
    settings = load_config(ExportConfig, file=config, overrides=overrides)
    from dino import api

    api.export(source, Path(folder), settings)


export_command = with_settings(ExportConfig)

# ----------------------------------------------------------------------------------------------------- info

InfoArguments = Annotated[list[str] | None, typer.Argument(metavar="CHECKPOINT [KEY=VALUE]...", hidden=True)]


InfoAll = Annotated[bool, typer.Option("--all", help="Print all values, including the settings of the run.")]
INFO_KEYS = (
    *("source", "kind", "level", "arch", "embed_dim", "patch_size"),
    *("transform.name", "spacing_um", "tile_size_px", "step"),
    *("contains.slides", "contains.patients", "contains.folders"),
)


def info(arguments: InfoArguments = None, config: ConfigFile = None, everything: InfoAll = False) -> None:
    """Describe a checkpoint: architecture, training, transform, spacing and tile size, and what it tells of the data.

    CHECKPOINT is a run folder, a checkpoint file (also an external one) or an export. `contains` says whether it names
    slides, patients and folders.

    For example:

        dino info runs/patch
    """
    positional, overrides = split(arguments or [])
    (source,) = expect(positional, ["CHECKPOINT"])
    settings = load_config(InfoConfig, file=config, overrides=overrides)
    from dino import api, progress

    rows = dict(flat_scalars(api.info(source, settings.arch)))
    shown = rows if everything else {key: rows[key] for key in INFO_KEYS if key in rows}
    progress.table(list(shown.items()))
    if not everything:
        progress.say(f"{len(rows) - len(shown)} more values with --all")


info_command = with_settings(InfoConfig)

# ---------------------------------------------------------------------------------------------- launch slurm

SlurmArguments = Annotated[list[str] | None, typer.Argument(metavar="COMMAND... [KEY=VALUE]...", hidden=True)]
AnyRecipe = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME", help="Recipe with the defaults of the pretraining.")
]
SlurmFile = Annotated[Path | None, typer.Option("--slurm", metavar="FILE", help="YAML with the slurm settings.")]
LAUNCHED: tuple[tuple[str, ...], ...] = (("tile",), ("pretrain", "patch"), ("pretrain", "region"), ("extract",))


def slurm(
    arguments: SlurmArguments = None, config: ConfigFile = None, recipe: AnyRecipe = None, slurm: SlurmFile = None
) -> None:
    """Submit a tiling, a pretraining or an extraction to SLURM, one task per GPU, requeued until it is done.

    COMMAND is `tile SLIDE... ROOT`, `pretrain patch ROOT RUN`, `pretrain region ROOT RUN` or `extract RUN ROOT`, with
    the settings of that command and those of the job (below). Tiling uses no GPU: with slurm.gpus_per_node=0 there is
    one task per node, with num_workers slides at a time. Before the time limit and at a preemption, the run is saved
    and the job requeued. `dry_run=true` prints the job without submitting it. Requires `pip install
    'histodino[slurm]'`.

    For example:

        dino launch slurm pretrain patch data runs/patch slurm.nodes=2 slurm.gpus_per_node=8 training.nepochs=100
        dino launch slurm extract runs/patch data slurm.gpus_per_node=4 slurm.partition=gpu
        dino launch slurm tile slides.csv data num_workers=16 slurm.nodes=8 slurm.gpus_per_node=0 slurm.cpus_per_gpu=16
    """
    positional, overrides = split(arguments or [])
    job_settings = [override for override in overrides if override.startswith("slurm.")]
    rest = [argument for argument in arguments or [] if argument not in job_settings]
    name = next((name for name in LAUNCHED if tuple(positional[: len(name)]) == name), None)
    if name is None:
        raise UsageError(
            f"expected tile, pretrain patch, pretrain region or extract, found {' '.join(positional[:2]) or 'nothing'}"
        )
    for argument in name:
        rest.remove(argument)
    settings = load_config(LaunchConfig, file=slurm, overrides=job_settings).slurm
    from dino import api, progress

    if name == ("tile",):
        inputs, root, work_config = tile_arguments(rest, config)
        work = partial(
            api.tile, [path if is_uri(path) else Path(path).absolute() for path in inputs], root.absolute(), work_config
        )
        output = root.resolve()
    elif name == ("extract",):
        model, root, work_config = extract_arguments(rest, config)
        work, output = partial(api.extract, model, root, work_config), root.resolve()
    else:
        work_config = pretrain_settings(name[1], rest, config, recipe)
        if not work_config.output_dir:
            raise UsageError("expected ROOT and RUN, found no RUN")
        work, output = partial(api.pretrain, work_config), Path(work_config.output_dir).resolve()
    folder = settings.folder or output.parent / f"{output.name}_slurm"
    submission = api.launch_slurm(work, settings, folder, dry_run=work_config.dry_run)
    rows = [(key, str(value)) for key, value in submission.parameters.items() if value is not None]
    command = ["dino", *name, *(redacted(word) for word in rest if not word.startswith("dry_run="))]
    progress.table([("command", shlex.join(command)), ("output", str(submission.folder)), *rows])
    typer.echo(f"submitted as job {submission.job}" if submission.job else "dry run: nothing was submitted")


slurm_command = with_settings(LaunchConfig)

# --------------------------------------------------------------------------------------------------- config

ConfigArguments = Annotated[list[str] | None, typer.Argument(metavar="COMMAND [KEY=VALUE]...", hidden=True)]
StartRecipe = Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="Recipe to start from.")]

SCHEMAS: dict[str, type] = {
    "tile": TileConfig,
    "pretrain patch": PatchConfig,
    "pretrain region": RegionConfig,
    "extract": ExtractConfig,
    **{f"evaluate {name}": schema for name, schema in EVALUATION_CONFIGS.items()},
    "report": ReportConfig,
    "figure": FigureConfig,
    "view": ViewConfig,
    "words": WordsConfig,
    "attention": AttentionConfig,
    "export": ExportConfig,
    "geojson": GeojsonConfig,
    "overlays": OverlaysConfig,
    "info": InfoConfig,
    "launch slurm": LaunchConfig,
    "demo": DemoConfig,
}


def config(arguments: ConfigArguments = None, config: ConfigFile = None, recipe: StartRecipe = None) -> None:
    """Print all settings of a command with their values and comments, as YAML.

    COMMAND is tile, patch, region, extract, report, figure, view, words, attention, export, geojson, overlays, info,
    slurm, demo, or an evaluation such as knn. Values that differ from the default are marked. The output can be saved,
    edited and passed to the command with --config.

    For example:

        dino config patch > my.yaml
        dino config patch --recipe patch model.arch=vit_base
    """
    positional, overrides = split(arguments or [])
    typer.echo(resolved_yaml(" ".join(positional), overrides, config, recipe), nl=False)


def resolved_yaml(name: str, overrides: list[str], file: Path | None = None, recipe: str | None = None) -> str:
    """The settings of a command as YAML text.

    Args:
        name: The command, such as ``pretrain patch``, or one word of it, such as ``patch``.
        overrides: ``key=value`` strings.
        file: The user's YAML.
        recipe: Name of a recipe; None for the default recipe of the command.

    Raises:
        UsageError: If there is no such command.
        ConfigError: If the settings or the recipe are wrong.
    """
    command = next((candidate for candidate in SCHEMAS if name and name in (candidate, *candidate.split())), None)
    if name == "pretrain" or command is None:
        names = ", ".join(candidate.split()[-1] for candidate in SCHEMAS)
        raise UsageError(f"expected one of {names}, found {name or 'nothing'}")
    kind = SCHEMAS[command]
    recipe = recipe or default_recipe(kind, file, overrides)
    resolved = load_config(kind, recipe=recipe, file=file, overrides=overrides)
    values = flatten(to_dict(resolved))
    changed = sum(values[item.key] != item.default for item in all_settings(kind))
    origin = f", recipe {recipe}" if recipe else ""
    verb = "differs" if changed == 1 else "differ"
    header = [
        f"# Settings of `dino {command}`{origin}. Pass a copy with --config, or single settings as key=value.",
        f"# {changed or 'None'} of {len(values)} {verb} from the defaults{', marked [default: …]' if changed else ''}.",
        *(["#", recipe_comment(kind, recipe)] if recipe else []),
    ]
    return "\n".join(header) + "\n\n" + to_commented_yaml(resolved)


# ----------------------------------------------------------------------------------------------------- demo

DemoArguments = Annotated[list[str] | None, typer.Argument(metavar="[DIR] [KEY=VALUE]...", hidden=True)]


def demo(arguments: DemoArguments = None, config: ConfigFile = None) -> None:
    """Run all steps on the sample slide that is part of the package.

    Tiles the slide, pretrains both levels, extracts features and evaluates them; writes report.html and summary.json
    to DIR (default: ./demo). It takes a few minutes on two cores and needs neither a GPU nor a network. It shows that
    the steps work together, not how good a model can be.

    For example:

        dino demo demo
    """
    positional, overrides = split(arguments or [])
    if len(positional) > 1:
        raise UsageError(f"expected at most one DIR, found {len(positional)} arguments: {' '.join(positional)}")
    settings = load_config(DemoConfig, file=config, overrides=overrides)
    from dino.demo import run_demo

    run_demo(Path(positional[0] if positional else "demo"), settings)


demo_command = with_settings(DemoConfig)
