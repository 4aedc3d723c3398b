"""The web application of the viewer: what each address answers. Slides are named by their ids only, never by paths."""

import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any

import anyio.to_thread
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dino.errors import DataError, DinoError
from dino.extraction.catalogue import Catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.extraction.word_table import TableChanged
from dino.slides.tables import STATUS_COLUMNS
from dino.viewer.attention import AttentionFiles
from dino.viewer.geojson import CONTENTS, feature_collection
from dino.viewer.models import RegionAttention, TileAttention
from dino.viewer.naming import save_name
from dino.viewer.pixels import OVERLAP_PX, TILE_PX, SlidePixels
from dino.viewer.selections import save_selection

THUMBNAIL_PX, CELL_PX, REGION_PX = 256, 128, 256
MAX_NEIGHBOURS = 60
HIDDEN = ("image_path", "mask_path")  # columns of slides_status.csv that are paths of this computer
COMPARED = ("centre", "scanner", "stain")  # columns that features should not be alike by
MEDIA = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "txt": "text/plain"}
PICTURE = {"cache-control": "private, max-age=3600"}
SCRIPTS = (
    "viewer.js",
    "page.js",
    "legend.js",
    "names.js",
    "tile.js",
    "selection.js",
    "overlay.js",
    "maps.js",
    "state.js",
)
ASSETS = ("index.html", "style.css", *SCRIPTS, "vendor/openseadragon.min.js")

log = logging.getLogger("dino.viewer")


class NotFound(DataError):
    """There is no such slide, tile or encoder."""


@dataclass(frozen=True)
class Viewer:
    """What the pages are made of.

    Attributes:
        catalogue: The ROOT.
        encoders: Features by encoder, in the order in which they are offered.
        pixels: The slides.
        writable: Let the page save selections and names of words.
        workers: Number of threads that read slides and features.
        attention: Maps of ``dino attention`` by encoder.
        models: Models by encoder, whose attention over a tile is computed on demand; None while one is being loaded.
        regions: The same of level-2 models over regions, by the encoder whose grids they read.
    """

    catalogue: Catalogue
    encoders: Mapping[str, EncoderFeatures]
    pixels: SlidePixels
    writable: bool = False
    workers: int = 8
    attention: Mapping[str, AttentionFiles] = field(default_factory=dict)
    models: Mapping[str, TileAttention | None] = field(default_factory=dict)
    regions: Mapping[str, RegionAttention | None] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------ what is asked for

    def slide_id(self, request: Request) -> str:
        """The slide of a request, which must be one of the table."""
        slide_id = request.path_params["slide"]
        if slide_id not in self.catalogue.slides.status:
            raise NotFound("expected the id of a slide of this ROOT, found another one")
        return slide_id

    def encoder(self, request: Request) -> EncoderFeatures:
        """The encoder of a request, which must have features."""
        name = request.query_params.get("encoder", "")
        if name not in self.encoders:
            raise NotFound("expected the name of an encoder with features in this ROOT, found another one")
        return self.encoders[name]

    def maps(self, request: Request) -> AttentionFiles:
        """The attention maps of the encoder of a request."""
        name = request.query_params.get("encoder", "")
        if name not in self.attention:
            raise NotFound("expected the name of an encoder with attention maps, found another one")
        return self.attention[name]

    def tile(self, slide_id: str, text: str) -> int:
        """The index of a tile of a slide."""
        count = len(self.catalogue.tiles[slide_id].coords) if slide_id in self.catalogue.tiles else 0
        tile = _number(text)
        if tile >= count:
            raise NotFound(f"expected the index of one of {count} tiles, found {tile}")
        return tile

    # ------------------------------------------------------------------------------------------------- answers

    def root(self, request: Request) -> Response:
        """Slides with the columns of their table, encoders, geometry."""
        own = [name for name in STATUS_COLUMNS if name not in HIDDEN]
        further = list(dict.fromkeys(n for one in self.catalogue.slides.status.values() for n in one.further))
        slides = []
        for slide_id, status in self.catalogue.slides.status.items():
            cells = {name: getattr(status, name) for name in own} | {n: status.further.get(n, "") for n in further}
            slides.append(cells | {"readable": self.catalogue.slides.path(slide_id) is not None})
        return _json(
            {
                "name": self.catalogue.root.resolve().name,
                "columns": [*own, *further],
                "compared": [*(name for name in COMPARED if name in own), *further],
                "slides": slides,
                "encoders": list(dict.fromkeys([*self.encoders, *self.attention])),
                "features": list(self.encoders),
                "attention": list(self.attention),
                "models": list(self.models),
                "deep_zoom": {"tile_px": TILE_PX, "overlap_px": OVERLAP_PX},
                "writable": self.writable,
            }
        )

    def slide(self, request: Request) -> Response:
        """Size, tiles and regions of a slide."""
        slide_id = self.slide_id(request)
        status, tiles = self.catalogue.slides.status[slide_id], self.catalogue.tiles.get(slide_id)
        regions = [
            [one.x, one.y, one.grid[1] * one.step_lv0, one.grid[0] * one.step_lv0]
            for one in self.catalogue.regions.get(slide_id, ())
        ]
        content = {
            "slide_id": slide_id,
            "width": status.width,
            "height": status.height,
            "spacing_um": status.spacing_um,
            "regions": regions,
            "tiles": None,
        }
        if tiles is not None:
            content["tiles"] = {
                "step": tiles.step_lv0,
                "x": tiles.coords[:, 0].tolist(),
                "y": tiles.coords[:, 1].tolist(),
                "tissue": np.round(tiles.tissue, 4).tolist(),
                "annotations": list(tiles.annotations),
            }
        return _json(content)

    def colours(self, request: Request) -> Response:
        """Principal components as red, green and blue of the tiles of a slide; null where there are no features."""
        rgb = self.encoder(request).rgb(self.slide_id(request))  # (N, 3)
        return _json([row if row[0] >= 0 else None for row in rgb.tolist()])

    def clusters(self, request: Request) -> Response:
        """Cluster of the tiles of a slide; -1 where there are no features."""
        return _json(self.encoder(request).cluster(self.slide_id(request)).tolist())

    def legend(self, request: Request) -> Response:
        """Name, colour and typical tiles of each cluster or word; of words also what people wrote, and its version."""
        features = self.encoder(request)
        names = features.words.names() if features.words else None
        labels = features.labelled(names.shown if names else None)
        rows = [
            asdict(label) | {"written": written, "examples": [list(tile) for tile in tiles]}
            for label, written, tiles in zip(
                labels, names.written if names else [""] * len(labels), features.examples(), strict=True
            )
        ]
        return _json({"words": names is not None, "version": names.version if names else "", "clusters": rows})

    def save_name(self, request: Request, body: bytes) -> Response:
        """Save the name of a word; the answer is the legend with it."""
        save_name(self.encoder(request), body)
        return self.legend(request)

    def similarity(self, request: Request) -> Response:
        """Cosine similarity of the tiles of a slide to a tile, of the same or of another slide."""
        features, slide_id = self.encoder(request), self.slide_id(request)
        other = request.query_params.get("of", slide_id)
        if other not in self.catalogue.tiles:
            raise NotFound("expected the id of a slide with tiles, found another one")
        query = features.vector(other, self.tile(other, request.query_params.get("tile", "")))
        values = features.similarity(slide_id, query).tolist()
        return _json([None if math.isnan(value) else round(value, 4) for value in values])

    def neighbours(self, request: Request) -> Response:
        """The most similar tiles of other patients, and where there are words that of each, and of the tile itself."""
        features, slide_id = self.encoder(request), self.slide_id(request)
        tile = self.tile(slide_id, request.path_params["tile"])
        count = _number(request.query_params.get("count", "12"))
        others = request.query_params.get("others", "1") != "0"
        if not 1 <= count <= MAX_NEIGHBOURS:
            raise DataError(f"expected 1 to {MAX_NEIGHBOURS} neighbours, found {count}")
        found = features.neighbours(slide_id, tile, count, others)
        described = [
            self._described(one.slide_id, one.tile)
            | {"similarity": one.similarity, "word": features.word_of(one.slide_id, one.tile)}
            for one in found
        ]
        return _json({"word": features.word_of(slide_id, tile), "neighbours": described})

    def _described(self, slide_id: str, tile: int) -> dict[str, Any]:
        tiles = self.catalogue.tiles[slide_id]
        x, y = tiles.coords[tile].tolist()
        status = self.catalogue.slides.status[slide_id]
        return {
            "slide_id": slide_id,
            "patient_id": status.patient_id,
            "tile": tile,
            "x": x,
            "y": y,
            "annotation": tiles.annotations[tile] if tiles.annotations else "",
        }

    def attention_maps(self, request: Request) -> Response:
        """Channels, levels and places of the attention maps of a slide."""
        return _json(self.maps(request).describe(self.slide_id(request)))

    def attention_tile(self, request: Request) -> Response:
        """A tile of an attention map."""
        names = ("channel", "level", "column", "row")
        channel, level, column, row = (_number(request.path_params[name]) for name in names)
        content = self.maps(request).picture(self.slide_id(request), channel, level, column, row)
        return Response(content, media_type="image/png", headers=PICTURE)

    def tile_attention(self, request: Request) -> Response:
        """Attention of a model over a tile, row-major: the mean over heads, then each head. Null without a model."""
        slide_id, model = self.slide_id(request), self.models.get(request.query_params.get("encoder", ""))
        tile = self.tile(slide_id, request.path_params["tile"])
        if model is None:
            return _json(None)
        return _json(_maps(model.maps(slide_id, tile)))

    def region_attention(self, request: Request) -> Response:
        """The region that contains a tile, the tile's cell in it, and attention over its cells, as of a tile.

        It is that of the level-2 model, or of the maps of ``dino attention``. Without either, and while the model is
        being loaded, there are no maps; nothing at all where no region contains the tile.
        """
        slide_id, name = self.slide_id(request), request.query_params.get("encoder", "")
        tile = self.tile(slide_id, request.path_params["tile"])
        region = self.catalogue.region_of(slide_id, tile)
        if region is None:
            return _json(None)
        record, model = self.catalogue.regions[slide_id][region], self.regions.get(name)
        x, y = (self.catalogue.tiles[slide_id].coords[tile] - (record.x, record.y)).tolist()
        maps = model.maps(slide_id, region) if model else None
        if name not in self.regions and name in self.attention:
            maps = self.attention[name].region(slide_id, record)
        content = {
            "region": region,
            "box": [record.x, record.y, record.grid[1] * record.step_lv0, record.grid[0] * record.step_lv0],
            "cell": [
                round(x / record.step_lv0, 4),
                round(y / record.step_lv0, 4),
            ],  # overlapping tiles lie between cells
            "loading": name in self.regions and model is None,
            "computed": model is not None,
        }
        return _json(content | (_maps(maps) if maps is not None else {"maps": None}))

    def deep_zoom(self, request: Request) -> Response:
        """A deep-zoom tile."""
        level, column, row = (_number(request.path_params[name]) for name in ("level", "column", "row"))
        return _picture(self.pixels.tile(self.slide_id(request), level, column, row))

    def cell(self, request: Request) -> Response:
        """A small picture of a tile."""
        slide_id = self.slide_id(request)
        tiles, tile = self.catalogue.tiles.get(slide_id), self.tile(slide_id, request.path_params["tile"])
        assert tiles is not None
        x, y = tiles.coords[tile].tolist()
        return _picture(self.pixels.cell(slide_id, x, y, tiles.step_lv0, CELL_PX))

    def region(self, request: Request) -> Response:
        """A small picture of a region."""
        slide_id, region = self.slide_id(request), _number(request.path_params["region"])
        regions = self.catalogue.regions.get(slide_id, ())
        if region >= len(regions):
            raise NotFound(f"expected the index of one of {len(regions)} regions, found {region}")
        one = regions[region]
        return _picture(self.pixels.cell(slide_id, one.x, one.y, max(one.grid) * one.step_lv0, REGION_PX))

    def thumbnail(self, request: Request) -> Response:
        """A small picture of a slide."""
        return _picture(self.pixels.thumbnail(self.slide_id(request), THUMBNAIL_PX))

    def geojson(self, request: Request) -> Response:
        """Tiles, clusters and regions of a slide for QuPath."""
        slide_id = self.slide_id(request)
        features = self.encoder(request) if "encoder" in request.query_params else None
        name = request.query_params.get("encoder", "")
        measured = self.attention[name].measurements(slide_id, name) if name in self.attention else {}
        return _json(feature_collection(self.catalogue, slide_id, CONTENTS, features, measured), "application/geo+json")

    def save(self, request: Request, body: bytes) -> Response:
        """Save a selection of tiles under ROOT."""
        return _json({"saved": save_selection(self.catalogue, self.slide_id(request), body)})


def build_app(viewer: Viewer) -> Starlette:
    """The ASGI application, without the checks of :class:`dino.viewer.guard.Guard`."""
    assets = {name: _asset(name) for name in ASSETS}

    async def asset(request: Request) -> Response:
        found = assets.get(request.path_params.get("name", "index.html"))
        return found if found is not None else await _nothing_here(request, None)

    slow = _Threads(viewer.workers)
    routes = [
        Route("/", asset),
        Route("/static/{name:path}", asset),
        Route("/api/root", slow(viewer.root)),
        Route("/api/legend", slow(viewer.legend)),
        Route("/api/slides/{slide}", slow(viewer.slide)),
        Route("/api/slides/{slide}/colours", slow(viewer.colours)),
        Route("/api/slides/{slide}/clusters", slow(viewer.clusters)),
        Route("/api/slides/{slide}/similarity", slow(viewer.similarity)),
        Route("/api/slides/{slide}/neighbours/{tile}", slow(viewer.neighbours)),
        Route("/api/slides/{slide}/attention", slow(viewer.attention_maps)),
        Route("/api/slides/{slide}/attention/{tile}", slow(viewer.tile_attention)),
        Route("/api/slides/{slide}/attention/{tile}/region", slow(viewer.region_attention)),
        Route("/api/slides/{slide}/geojson", slow(viewer.geojson)),
        Route("/slides/{slide}/thumbnail.jpg", slow(viewer.thumbnail)),
        Route("/slides/{slide}/tiles/{tile}.jpg", slow(viewer.cell)),
        Route("/slides/{slide}/regions/{region}.jpg", slow(viewer.region)),
        Route("/slides/{slide}/attention/{channel}/{level}/{column}_{row}.png", slow(viewer.attention_tile)),
        Route("/slides/{slide}/zoom/{level}/{column}_{row}.jpg", slow(viewer.deep_zoom)),
    ]
    if viewer.writable:
        routes.append(Route("/api/slides/{slide}/selections", slow.with_body(viewer.save), methods=["POST"]))
        routes.append(Route("/api/words", slow.with_body(viewer.save_name), methods=["POST"]))
    return Starlette(routes=routes, exception_handlers={404: _nothing_here, 405: _nothing_here})


class _Threads:
    """Runs the functions of the viewer on a limited number of threads, and turns their errors into answers."""

    def __init__(self, count: int) -> None:
        self._limiter: anyio.CapacityLimiter | None = None
        self._count = count

    def __call__(self, function: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await self._run(function, request)

        return endpoint

    def with_body(self, function: Callable[[Request, bytes], Response]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that saves something."""

        async def endpoint(request: Request) -> Response:
            body = await request.body()  # its length is limited by the guard
            return await self._run(lambda asked: function(asked, body), request)

        return endpoint

    async def _run(self, function: Callable[[Request], Response], request: Request) -> Response:
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(self._count)
        return await anyio.to_thread.run_sync(_answered, function, request, limiter=self._limiter)


def _answered(function: Callable[[Request], Response], request: Request) -> Response:
    try:
        return function(request)
    except NotFound as error:
        return _error(404, str(error))
    except TableChanged as error:
        return _error(409, str(error))
    except DinoError as error:
        return _error(422, str(error))
    except Exception:  # a fault of this package: described in the terminal, not to the client
        log.exception("cannot answer a request")
        return _error(500, "this cannot be shown; the terminal of `dino view` says why")


async def _nothing_here(request: Request, error: Exception | None) -> Response:
    return _error(404, "there is nothing at this address")


def _number(text: str) -> int:
    """A number that is not negative, of at most nine digits."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise NotFound("expected a number")
    return int(text)


def _error(status: int, message: str) -> Response:
    return Response(json.dumps({"error": message}), status, media_type="application/json")


def _json(content: Any, media_type: str = "application/json") -> Response:
    return Response(json.dumps(content, separators=(",", ":"), allow_nan=False), media_type=media_type)


def _maps(maps: np.ndarray) -> dict[str, Any]:
    """Maps ``(C, h, w)`` as rows of numbers, null where nothing is known."""
    rows = np.round(maps.astype(np.float64), 4).reshape(len(maps), -1).tolist()
    return {"side": maps.shape[2], "maps": [[None if math.isnan(value) else value for value in row] for row in rows]}


def _picture(content: bytes) -> Response:
    return Response(content, media_type="image/jpeg", headers=PICTURE)


def _asset(name: str) -> Response:
    content = resources.files("dino.viewer").joinpath("static", name).read_bytes()
    return Response(content, media_type=MEDIA[name.rpartition(".")[2]])
