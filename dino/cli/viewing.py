"""Commands to look at slides and features: ``dino view`` and ``dino geojson``."""

from pathlib import Path
from typing import Annotated

import typer

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import UsageError, expect, split
from dino.config.load import load_config
from dino.config.schema import GeojsonConfig, ViewConfig

ViewArguments = Annotated[list[str] | None, typer.Argument(metavar="ROOT [RUN]... [KEY=VALUE]...", hidden=True)]


def view(arguments: ViewArguments = None, config: ConfigFile = None) -> None:
    """Show the slides of ROOT in the browser, with tiles, regions, and what models see.

    Opens a local web page (its address is printed): slides as deep zoom, and over them tissue, annotations, and from
    the features that `dino extract` wrote: principal components as colours and clusters, fitted over all slides so
    that they compare; similarity to the tile that is clicked, and the most similar tiles of other patients. With two
    encoders, a slider compares them. Selected tiles can be named and downloaded as GeoJSON. RUN (a run, a checkpoint
    or the name of an encoder) is offered first; its features must be in ROOT.

    Only this computer can connect, and only with the token in the address. On a remote computer, forward the port:
    ssh -L 8765:localhost:8765 HOST. Nothing is written unless annotate=true. Requires `pip install
    'histodino[viewer]'`.

    For example:

        dino view data runs/patch
        dino view data runs/patch random slides=/new/place port=0
    """
    positional, overrides = split(arguments or [])
    if not positional:
        raise UsageError("expected ROOT, found no arguments")
    settings = load_config(ViewConfig, file=config, overrides=overrides)
    from dino import api

    api.view(Path(positional[0]), positional[1:], settings)


view_command = with_settings(ViewConfig)

GeojsonArguments = Annotated[list[str] | None, typer.Argument(metavar="ROOT OUT [KEY=VALUE]...", hidden=True)]


def geojson(arguments: GeojsonArguments = None, config: ConfigFile = None) -> None:
    """Write tiles, clusters and regions of each slide of ROOT as GeoJSON for QuPath 0.5 or later.

    OUT is a folder, which gets one SLIDE.geojson per slide: drag it onto the slide in QuPath. Coordinates are level-0
    px. Tiles are tile objects with their cluster as class and with measurements; clusters and regions are annotations.

    For example:

        dino geojson data qupath
        dino geojson data qupath encoder=patch clusters=16 contents=clusters
    """
    positional, overrides = split(arguments or [])
    root, output = expect(positional, ["ROOT", "OUT"])
    settings = load_config(GeojsonConfig, file=config, overrides=overrides)
    from dino import api

    api.export_geojson(Path(root), Path(output), settings)


geojson_command = with_settings(GeojsonConfig)
