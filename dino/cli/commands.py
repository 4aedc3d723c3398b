"""The commands of ``dino``: each reads its words and settings, and calls :mod:`dino.api`."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dino.cli import extract, pretrain
from dino.cli.command import ConfigFile, end, with_settings
from dino.cli.grammar import UsageError, expect_many, split
from dino.config.load import load_config
from dino.config.schema import DemoConfig, LaunchConfig, TileConfig

# ----------------------------------------------------------------------------------------------------- tile

TileWords = Annotated[list[str] | None, typer.Argument(metavar="SLIDE... ROOT [KEY=VALUE]...", hidden=True)]


def tile(words: TileWords = None, config: ConfigFile = None) -> None:
    """Find tissue and cut slides into tiles and regions on one lattice per slide.

    SLIDE is a slide, a folder of slides, or one slides.csv. Tiles, tables and previews are written under ROOT. The same
    command again continues with the slides that are not done. A slide that fails does not stop the others:
    slides_status.csv gives the reason, and the exit code is 2.

    For example:

        dino tile slides/*.svs data spacing_um=0.5 num_workers=8
        dino tile slides.csv data dry_run=true
    """
    positional, overrides = split(words or [])
    inputs, root = expect_many(positional, "SLIDE", "ROOT")
    settings = load_config(TileConfig, file=config, overrides=overrides)
    from dino import api

    end(api.tile([Path(word) for word in inputs], Path(root), settings).exit_code)


tile_command = with_settings(TileConfig)

# ---------------------------------------------------------------------------------------------- launch slurm

SlurmWords = Annotated[list[str] | None, typer.Argument(metavar="COMMAND... [KEY=VALUE]...", hidden=True)]
AnyRecipe = Annotated[str | None, typer.Option("--recipe", metavar="NAME", help="Defaults of a pretraining.")]
SlurmFile = Annotated[Path | None, typer.Option("--slurm", metavar="FILE", help="YAML with slurm: settings.")]
LAUNCHED = {("pretrain", "patch"): "patch_pathology", ("pretrain", "region"): "region", ("extract",): None}


def slurm(
    words: SlurmWords = None, config: ConfigFile = None, recipe: AnyRecipe = None, slurm: SlurmFile = None
) -> None:
    """Submit a pretraining or an extraction to SLURM, one task per GPU, restarted until it is done.

    COMMAND is `pretrain patch ROOT RUN`, `pretrain region ROOT RUN` or `extract RUN ROOT` with its own settings;
    the settings of the job are below. Before the time limit and at a preemption, the run is saved and the job requeued.
    `dry_run=true` prints what would be submitted. Needs `pip install 'histodino[slurm]'`.

    For example:

        dino launch slurm pretrain patch data runs/patch slurm.nodes=2 slurm.gpus_per_node=8 training.nepochs=100
        dino launch slurm extract runs/patch data slurm.gpus_per_node=4 slurm.partition=gpu
    """
    positional, overrides = split(words or [])
    job_settings = [word for word in overrides if word.startswith("slurm.")]
    rest = [word for word in words or [] if word not in job_settings]
    name = next((name for name in LAUNCHED if tuple(positional[: len(name)]) == name), None)
    if name is None:
        raise UsageError(
            f"expected pretrain patch, pretrain region or extract, found {' '.join(positional[:2]) or '-'}"
        )
    for word in name:
        rest.remove(word)
    settings = load_config(LaunchConfig, file=slurm, overrides=job_settings).slurm
    from dino import api, progress

    if name == ("extract",):
        model, root, work_config = extract.arguments(rest, config)
        work, output = partial(api.extract, model, root, work_config), root.resolve()
    else:
        work_config = pretrain.resolve(name[1], rest, config, recipe or LAUNCHED[name])
        if not work_config.output_dir:
            raise UsageError("expected ROOT and RUN, found no RUN")
        work, output = partial(api.pretrain, work_config), Path(work_config.output_dir).resolve()
    folder = settings.folder or output.parent / f"{output.name}_slurm"
    submission = api.launch_slurm(work, settings, folder, dry_run=work_config.dry_run)
    rows = [(key, str(value)) for key, value in submission.parameters.items() if value is not None]
    progress.table([("command", shlex.join(["dino", *name, *rest])), ("output", str(submission.folder)), *rows])
    typer.echo(f"submitted as job {submission.job}" if submission.job else "dry run: nothing was submitted")


slurm_command = with_settings(LaunchConfig)

# ----------------------------------------------------------------------------------------------------- demo

DemoWords = Annotated[list[str] | None, typer.Argument(metavar="[DIR] [KEY=VALUE]...", hidden=True)]


def demo(words: DemoWords = None, config: ConfigFile = None) -> None:
    """Run the whole chain on the sample slide that ships with the package.

    Tiles, pretrains both levels, extracts and evaluates; writes report.html and summary.json into DIR (./demo if not
    given). It takes some minutes on two cores and needs neither a GPU nor a network. It shows that the parts work
    together, not how good a model can be.

    For example:

        dino demo demo
    """
    positional, overrides = split(words or [])
    if len(positional) > 1:
        raise UsageError(f"expected one DIR at most, found {len(positional)}: {' '.join(positional)}")
    settings = load_config(DemoConfig, file=config, overrides=overrides)
    from dino.demo import run_demo

    run_demo(Path(positional[0] if positional else "demo"), settings)


demo_command = with_settings(DemoConfig)
