"""Commands to look at slides and features: ``dino view``, ``dino words``, ``dino geojson`` and ``dino overlays``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import UsageError, expect, split
from dino.config.load import load_config
from dino.config.schema import GeojsonConfig, OverlaysConfig, ViewConfig, WordsConfig

ViewArguments = Annotated[list[str] | None, typer.Argument(metavar="ROOT [RUN]... [KEY=VALUE]...", hidden=True)]


def view(arguments: ViewArguments = None, config: ConfigFile = None) -> None:
    """Show the slides of ROOT in the browser, with tiles, regions, and what models see.

    Opens a local web page (its address is printed): slides as deep zoom, and over them tissue, annotations, and from
    the features that `dino extract` wrote: principal components as colours and clusters, fitted over all slides so
    that they compare; similarity to the tile that is clicked, and the most similar tiles of other patients, with how
    many share its centre or scanner; the maps that `dino attention` wrote. With two encoders, a slider compares them.
    Selected tiles can be named and downloaded as GeoJSON. RUN (a run, a checkpoint or the name of an encoder) is
    offered first; its features must be in ROOT. Of a run or checkpoint, the attention over a clicked tile is shown, and
    of a level-2 run that over the region around it.

    Only this computer can connect, and only with the token in the address. On a remote computer, forward the port:
    ssh -L 8765:localhost:8765 HOST. Nothing is written unless annotate=true, with which selected tiles and names of
    words are saved in ROOT. Requires `pip install 'histodino[viewer]'`.

    For example:

        dino view data runs/patch runs/region
        dino view data runs/patch random slides=/new/place port=0
    """
    positional, overrides = split(arguments or [])
    if not positional:
        raise UsageError("expected ROOT, found no arguments")
    settings = load_config(ViewConfig, file=config, overrides=overrides)
    from dino import api

    api.view(Path(positional[0]), positional[1:], settings)


view_command = with_settings(ViewConfig)

WordsArguments = Annotated[list[str] | None, typer.Argument(metavar="MODEL ROOT [KEY=VALUE]...", hidden=True)]


def words(arguments: WordsArguments = None, config: ConfigFile = None) -> None:
    """Group the tiles of all slides of ROOT into words, which a pathologist can name.

    A word is a cluster of tiles whose features by MODEL are similar: keratin, stroma, fat. MODEL is a run or checkpoint
    whose features `dino extract` wrote into ROOT, or the name of their encoder. Written into ROOT/words_ENCODER:
    words.csv, with a column `name` for what each word shows, and tiles.csv with the word of every tile. The names are
    shown by `dino figure words`, `dino view` and `dino geojson`. They are kept when the command is run again, which
    gives the tiles of new slides their words.

    For example:

        dino words runs/patch data
        dino words runs/patch data count=32 method=prototypes
        dino figure words runs/patch data words.pdf
    """
    positional, overrides = split(arguments or [])
    model, root = expect(positional, ["MODEL", "ROOT"])
    settings = load_config(WordsConfig, file=config, overrides=overrides)
    from dino import api, progress

    found = api.find_words(model, Path(root), settings)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("word")
    for column in ("share", "tiles", "slides", "patients"):
        table.add_column(column, justify="right")
    for name, count in zip(found.names, found.counts, strict=True):
        patients = "-" if count.patients is None else f"{count.patients:,}"
        share = f"{count.tiles / max(1, found.tiles):.1%}"
        table.add_row(Text(name), share, f"{count.tiles:,}", f"{count.slides:,}", patients)
    progress.console.print(table)
    progress.say(f"\nname them in the column `name` of {found.words.table}, or in the viewer:")
    progress.say(f"dino view {root} annotate=true")


words_command = with_settings(WordsConfig)

GeojsonArguments = Annotated[list[str] | None, typer.Argument(metavar="ROOT OUT [KEY=VALUE]...", hidden=True)]


def geojson(arguments: GeojsonArguments = None, config: ConfigFile = None) -> None:
    """Write tiles, clusters and regions of each slide of ROOT as GeoJSON for QuPath 0.5 or later.

    OUT is a folder, which gets one SLIDE.geojson per slide: drag it onto the slide in QuPath. Coordinates are level-0
    px. Tiles are tile objects with their cluster as class and with measurements; clusters and regions are annotations.
    Where `dino words` has found words, these are the clusters, with the names in words.csv; those of the same name are
    one class. Tiles have the attention that `dino attention` mapped into ROOT as measurements, relative to uniform
    attention, which is 1: the maximum within the tile, the mean of a level-2 model over the tile, and the maximum of
    the product of both.

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

OverlaysArguments = Annotated[list[str] | None, typer.Argument(metavar="ROOT OUT [KEY=VALUE]...", hidden=True)]


def overlays(arguments: OverlaysArguments = None, config: ConfigFile = None) -> None:
    """Write the clusters or words of the tiles of each slide of ROOT as label images, for QuPath, napari and others.

    OUT is a folder, which gets one SLIDE.ome.tif per slide: a pyramidal OME-TIFF of integers with a colour table, one
    px per tile (with overlapping tiles, per position of one), with its spacing in µm; its first px is the first corner
    of the slide. 0 is no tile. The names and colours of the labels are in OUT/labels.json and in the description of
    each file. Where `dino words` has found words, these are the labels, with the names in words.csv. Requires `pip
    install 'histodino[maps]'`.

    For example:

        dino overlays data labels
        dino overlays data labels encoder=patch clusters=16
    """
    positional, overrides = split(arguments or [])
    root, output = expect(positional, ["ROOT", "OUT"])
    settings = load_config(OverlaysConfig, file=config, overrides=overrides)
    from dino import api

    api.export_overlays(Path(root), Path(output), settings)


overlays_command = with_settings(OverlaysConfig)
