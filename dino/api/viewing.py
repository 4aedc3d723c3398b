"""``view``: the live slide viewer, and ``export_geojson``: what it shows, for QuPath."""

import errno
import json
import secrets
import socket
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from dino import progress
from dino.config.schema import GeojsonConfig, ViewConfig
from dino.environment import import_extra
from dino.errors import ConfigError
from dino.extraction.catalogue import read_catalogue
from dino.extraction.encoder_features import EncoderFeatures, check_clusters, only_encoder
from dino.files import oserror_to_data_error, write_text
from dino.viewer.attention_folders import exported_attention, find_attention, open_attention
from dino.viewer.geojson import CLUSTERS, CONTENTS, TILES, feature_collection
from dino.viewer.models import RunModels
from dino.viewer.runs import sort_runs

EVERYWHERE = ("0.0.0.0", "::")
OWN = ("127.0.0.1", "localhost", "::1")  # addresses that no other computer can connect to


def view(root: Path, runs: Sequence[str], config: ViewConfig) -> None:
    """Serve the viewer until it is interrupted.

    Args:
        root: ROOT of ``dino tile``.
        runs: Models whose features are offered first: level-1 runs, checkpoints, or names of encoders. And level-2
            runs, whose attention over regions is shown.
        config: Settings.

    Raises:
        CheckpointError: If a run cannot be loaded.
        DataError: If ROOT cannot be read, none of its slides is there, it has no features of one of the runs or of the
            level-1 model of one, or features of that name that another model made.
        ConfigError: If a setting is out of range, the address cannot be used, or a package is not installed.
    """
    for package in ("uvicorn", "starlette"):
        import_extra(package, "the viewer", "viewer")
    from dino.viewer.serving import serve

    _check(config)
    catalogue = read_catalogue(root, config.slides)
    catalogue.check_slides()
    sorted_runs = sort_runs(catalogue, runs)
    names = catalogue.chosen_encoders(sorted_runs.names)
    encoders = {name: EncoderFeatures(catalogue, name, config.clusters) for name in names}
    folders = find_attention(catalogue, names, config.attention)
    asked = {
        *sorted_runs.names,
        *names[: config.attention is not None],
    }  # a folder that was named is that of the first encoder
    attention = open_attention(catalogue, folders, asked)
    if not encoders:
        progress.say(f"no features of tiles in {root}: only slides, tiles and regions are shown (`dino extract`)")
    listening = _listen(config.host, config.port)
    token = config.token or secrets.token_urlsafe(24)
    models = RunModels(catalogue, sorted_runs, attention)
    with listening:
        progress.say(f"viewer: {_address(config.host, listening)}/?token={token}  (Ctrl-C ends it)")
        if config.host not in OWN:
            progress.warn(
                f"host={config.host}: other computers can connect, and whoever has the address sees all slides"
            )
        serve(listening, token, catalogue, encoders, attention, models, config, config.host in OWN)


def export_geojson(root: Path, output: Path, config: GeojsonConfig) -> list[Path]:
    """Write tiles, clusters and regions of each slide as GeoJSON that QuPath 0.5 and later open.

    Tiles have measurements of the attention that ``dino attention`` mapped into ROOT.

    Args:
        root: ROOT of ``dino tile``.
        output: Folder of ``<slide>.geojson``; each is written atomically.
        config: Settings.

    Returns:
        The files.

    Raises:
        DataError: If ROOT or its attention maps cannot be read, the encoder has no features in it, or OUT cannot be
            written.
        ConfigError: If a setting is out of range, or tifffile is not installed and there are attention maps.
    """
    unknown = [name for name in config.contents if name not in CONTENTS]
    if unknown or not config.contents:
        raise ConfigError(f"expected contents of {', '.join(CONTENTS)}, found {', '.join(unknown) or 'none'}")
    check_clusters(config.clusters)
    catalogue = read_catalogue(root)
    encoder = only_encoder(catalogue, config.encoder, config.clusters)
    if encoder is None and CLUSTERS in config.contents:
        progress.say(f"no features of tiles in {catalogue.root}: no clusters are exported (`dino extract`)")
    attention = exported_attention(catalogue, config.encoder) if TILES in config.contents else {}
    written = []
    with oserror_to_data_error(output), progress.bar("export slides", len(catalogue.tiles)) as bar:
        for slide_id in catalogue.tiles:
            measured = [files.measurements(slide_id, name).items() for name, files in attention.items()]
            content = feature_collection(catalogue, slide_id, config.contents, encoder, dict(chain(*measured)))
            write_text(output / f"{slide_id}.geojson", json.dumps(content, allow_nan=False) + "\n")
            written.append(output / f"{slide_id}.geojson")
            bar.advance(note=slide_id)
    notes = [f"clusters of {encoder.encoder}"] if encoder else []
    notes += [f"attention by {files.made_by}" for files in attention.values()]
    progress.say(", ".join([f"{len(written)} files written to {output}", *notes]))
    return written


def _check(config: ViewConfig) -> None:
    check_clusters(config.clusters)
    for name in ("open_slides", "cache_mb", "num_workers"):
        if getattr(config, name) < 1:
            raise ConfigError(f"expected {name} to be at least 1, found {getattr(config, name)}")
    if not 0 <= config.port < 2**16:
        raise ConfigError(f"expected a port from 0 to {2**16 - 1}, found {config.port}")
    if config.token is not None and (len(config.token) < 8 or not config.token.isascii() or not config.token.isalnum()):
        raise ConfigError(
            "expected a token of at least 8 letters and digits, found another one; omit it for a random one"
        )


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, so that a port in use is an error before anything is printed."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With the protocol named, asyncio turns Nagle's algorithm off: otherwise each small answer waits for 40 ms.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(512)
        except OSError:
            listening.close()
            raise
        return listening
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            found, do = "that it is in use", "pass another port=, or port=0 for a free one"
        else:
            found, do = error.strerror or str(error), "pass another host= or port="
        raise ConfigError(f"expected to serve on port {port} of {host}, found {found}; {do}") from None


def _address(host: str, listening: socket.socket) -> str:
    shown = socket.gethostname() if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"
