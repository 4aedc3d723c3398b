"""Serves the viewer on a socket until it is interrupted."""

import socket
from collections.abc import Mapping

import uvicorn

from dino.config.schema import ViewConfig
from dino.extraction.catalogue import Catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.viewer.attention import AttentionFiles
from dino.viewer.guard import LOCAL_HOSTS, Guard
from dino.viewer.models import RunModels
from dino.viewer.pixels import SlidePixels
from dino.viewer.server import Viewer, build_app


def serve(
    listening: socket.socket,
    token: str,
    catalogue: Catalogue,
    encoders: Mapping[str, EncoderFeatures],
    attention: Mapping[str, AttentionFiles],
    models: RunModels,
    config: ViewConfig,
    only_local: bool,
) -> None:
    """Serve until Ctrl-C.

    Args:
        listening: A socket that listens.
        token: What opens the viewer.
        catalogue: The ROOT.
        encoders: Features by encoder, in the order in which they are offered.
        attention: Attention maps by encoder.
        models: Models of runs, which are loaded meanwhile.
        config: Settings.
        only_local: Whether only this computer can connect.

    Raises:
        CheckpointError: If a run cannot be loaded.
        DataError: If a level-1 run did not make the features of its name.
    """
    pixels = SlidePixels(catalogue.slides, config.open_slides, config.cache_mb)
    viewer = Viewer(
        catalogue, encoders, pixels, config.annotate, config.num_workers, attention, models.tiles, models.regions
    )
    app = Guard(build_app(viewer), token, LOCAL_HOSTS if only_local else None, config.annotate)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=2, ws="none")
    )
    models.start(lambda: setattr(server, "should_exit", True))
    server.run(sockets=[listening])
    models.check()
