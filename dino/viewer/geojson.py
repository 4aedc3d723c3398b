"""Tiles, clusters and regions of a slide as GeoJSON that QuPath 0.5 and later open.

A ``FeatureCollection`` of polygons in level-0 px, with the members that QuPath reads (qupath.readthedocs.io, "Exporting
annotations"): ``objectType``, ``name``, ``classification`` with ``name`` and ``color``, ``measurements``.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from dino.extraction.catalogue import Catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.slides.tables import RegionRecord, SlideTiles

TILES, CLUSTERS, REGIONS = "tiles", "clusters", "regions"
CONTENTS = (TILES, CLUSTERS, REGIONS)
TILE_CLASS, TILE_COLOUR = "Tile", (150, 150, 150)
REGION_CLASS, REGION_COLOUR = "Region", (0, 90, 200)


def feature_collection(
    catalogue: Catalogue,
    slide_id: str,
    contents: Sequence[str],
    encoder: EncoderFeatures | None = None,
    measured: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """What is known of a slide.

    Args:
        catalogue: The ROOT.
        slide_id: The slide.
        contents: ``tiles`` (one object each, classified by cluster if there are features), ``clusters`` (one annotation
            each, the union of its tiles; words with the names that people gave them), ``regions`` (one annotation
            each).
        encoder: Features for the clusters; None for tiles without classes.
        measured: Further measurements of the tiles by name, ``(N,)`` each, NaN where nothing is known.

    Returns:
        The GeoJSON object.

    Raises:
        DataError: If the features cannot be read.
    """
    features: list[dict[str, Any]] = []
    if REGIONS in contents:
        features += [_region(record) for record in catalogue.regions.get(slide_id, ())]
    tiles = catalogue.tiles.get(slide_id)
    if tiles is not None:
        has_features = encoder is not None and slide_id in encoder.slide_ids
        clusters = encoder.cluster(slide_id) if encoder is not None and has_features else None
        classes = _classes(encoder) if encoder is not None else {}
        if CLUSTERS in contents and clusters is not None:
            features += _cluster_outlines(tiles, clusters, classes)
        if TILES in contents:
            kind = "Word" if encoder is not None and encoder.words is not None else "Cluster"
            features += _tiles(tiles, clusters, classes, kind, measured or {})
    return {"type": "FeatureCollection", "features": features}


def _classes(encoder: EncoderFeatures) -> Mapping[int, dict[str, Any]]:
    return {i: _classification(label.name, label.colour) for i, label in enumerate(encoder.labels())}


def _region(record: RegionRecord) -> dict[str, Any]:
    h, w = record.grid
    return _feature(
        [_rectangle(record.x, record.y, w * record.step_lv0, h * record.step_lv0)],
        key=f"{record.slide_id}/region/{record.x}/{record.y}",
        kind="annotation",
        classification=_classification(REGION_CLASS, REGION_COLOUR),
        name=f"Region {record.x}, {record.y}",
        measurements={"Tissue": float(record.tissue.mean())},
    )


def _tiles(
    tiles: SlideTiles,
    clusters: np.ndarray | None,
    classes: Mapping[int, dict[str, Any]],
    kind: str,
    measured: Mapping[str, np.ndarray],
) -> Iterator[dict[str, Any]]:
    plain = _classification(TILE_CLASS, TILE_COLOUR)
    for i, (x, y) in enumerate(tiles.coords.tolist()):
        cluster = int(clusters[i]) if clusters is not None else -1
        measurements = {"Tissue": float(tiles.tissue[i])} | {name: float(of[i]) for name, of in measured.items()}
        measurements = {name: round(value, 4) for name, value in measurements.items()}
        yield _feature(
            [_rectangle(x, y, tiles.step_lv0, tiles.step_lv0)],
            key=f"{tiles.slide_id}/tile/{x}/{y}",
            kind="tile",
            classification=classes.get(cluster, plain),
            name=f"{x}, {y}",
            measurements=measurements | ({kind: cluster + 1} if cluster >= 0 else {}),
        )


def _cluster_outlines(
    tiles: SlideTiles, clusters: np.ndarray, classes: Mapping[int, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    same: dict[str, list[int]] = {}  # words of one name are one class
    for cluster, classification in classes.items():
        same.setdefault(classification["name"], []).append(cluster)
    for members in same.values():
        chosen = np.flatnonzero(np.isin(clusters, members))
        if len(chosen):
            yield _outline(tiles, chosen, classes[members[0]], f"cluster/{members[0]}")


def outline_feature(
    tiles: SlideTiles, chosen: Sequence[int], name: str, colour: tuple[int, int, int], key: str
) -> dict[str, Any]:
    """The union of some tiles of a slide as one annotation.

    Args:
        tiles: The tiles of the slide.
        chosen: Indices of the tiles.
        name: Its name, which is also its class.
        colour: RGB of the class.
        key: What distinguishes it from other objects of the slide.
    """
    return _outline(tiles, np.asarray(chosen), _classification(name, colour), key)


def _outline(tiles: SlideTiles, chosen: np.ndarray, classification: dict[str, Any], key: str) -> dict[str, Any]:
    import shapely
    from shapely.geometry.polygon import orient

    x, y = tiles.coords[chosen].T
    union = shapely.unary_union(shapely.box(x, y, x + tiles.step_lv0, y + tiles.step_lv0))
    # Outer rings counterclockwise and holes clockwise, as RFC 7946, section 3.1.6, demands.
    parts = [orient(part) for part in getattr(union, "geoms", [union])]
    return _feature(
        [[_ring(part.exterior.coords), *(_ring(hole.coords) for hole in part.interiors)] for part in parts],
        key=f"{tiles.slide_id}/{key}",
        kind="annotation",
        classification=classification,
        name=classification["name"],
        measurements={"Tiles": len(chosen), "Area px^2": float(union.area)},
    )


def _feature(
    polygons: Sequence[list[list[list[float]]]],
    *,
    key: str,
    kind: str,
    classification: dict[str, Any],
    name: str,
    measurements: Mapping[str, float],
) -> dict[str, Any]:
    single = len(polygons) == 1
    return {
        "type": "Feature",
        "id": str(uuid5(NAMESPACE_URL, key)),  # the same each time, so that QuPath recognises an object
        "geometry": {
            "type": "Polygon" if single else "MultiPolygon",
            "coordinates": polygons[0] if single else list(polygons),
        },
        "properties": {
            "objectType": kind,
            "name": name,
            "classification": classification,
            "isLocked": kind == "annotation",
            "measurements": {name: value for name, value in measurements.items() if math.isfinite(value)},
        },
    }


def _classification(name: str, colour: tuple[int, int, int]) -> dict[str, Any]:
    return {"name": name, "color": list(colour)}


def _rectangle(x: int, y: int, width: int, height: int) -> list[list[list[float]]]:
    corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    return [[[float(a), float(b)] for a, b in corners]]


def _ring(coords: Any) -> list[list[float]]:
    return [[float(x), float(y)] for x, y in coords]
