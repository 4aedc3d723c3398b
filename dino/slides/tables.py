"""Reads and writes the tables under ROOT: tiles.csv, regions.csv, slides_status.csv and tiling.json."""

import csv
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dino import files
from dino.config.load import identity_of
from dino.config.schema import TileConfig
from dino.environment import versions
from dino.errors import DataError
from dino.slides.columns import PARQUET, read_columns, read_header
from dino.slides.lattice import Geometry
from dino.slides.reader import BACKEND, RESAMPLER
from dino.slides.remote import Location, parse_location
from dino.slides.tissue import filter_config, segmentation_config

TILES_FOLDER = "patch_256_pretraining"
REGIONS_FOLDER = "region_4096_pretraining"
COORDINATES_FOLDER = "coordinates"
TILES_TABLE, REGIONS_TABLE, STATUS_TABLE, TILING_FILE = "tiles.csv", "regions.csv", "slides_status.csv", "tiling.json"
TILES_PARQUET = f"tiles{PARQUET}"
TILE_NUMBERS: dict[str, type] = {
    **dict.fromkeys(("x", "y", "step_lv0"), np.int64),
    **dict.fromkeys(("spacing_requested_um", "spacing_um", "tissue"), np.float64),
}
TILE_COLUMNS = ("slide_id", *TILE_NUMBERS)
ANNOTATION_COLUMNS = ("annotation", "annotation_fraction")  # of tiles.csv, if tiles of any slide are annotated
REGION_COLUMNS = ("slide_id", "x", "y", "step_lv0", "grid_h", "grid_w", "spacing_um", "path", "tissue")
MAX_SIDE_PX = 2**31  # of a slide; larger numbers come from damaged tables
OK, FAILED, NO_TISSUE, EXCLUDED = "ok", "failed", "no_tissue", "excluded"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TileRecord:
    """One tile: level-0 ``(x, y)``, its footprint there, requested and actual spacing, tissue fraction.

    ``annotation`` is the class with the largest share of the tile, empty if there is none; ``annotation_fraction`` is
    that share.
    """

    slide_id: str
    x: int
    y: int
    step_lv0: int
    spacing_requested_um: float
    spacing_um: float
    tissue: float
    annotation: str = ""
    annotation_fraction: float = 0.0

    @property
    def path(self) -> Path:
        """Path of its JPEG, relative to ROOT (with ``storage=jpeg``)."""
        return tile_path(self.slide_id, self.x, self.y)

    @property
    def on_lattice(self) -> bool:
        """True for a tile at a position of the lattice: no two of these overlap."""
        return self.x % self.step_lv0 == 0 and self.y % self.step_lv0 == 0


@dataclass(frozen=True, slots=True, eq=False)
class RegionRecord:
    """One region: level-0 ``(x, y)``, step of its cells, ``grid`` = (h, w) cells, actual spacing of a cell's pixels.

    ``path`` is the path of its features, relative to ROOT; ``tissue`` is float32 ``(h, w)``, the fraction of each cell.
    """

    slide_id: str
    x: int
    y: int
    step_lv0: int
    grid: tuple[int, int]
    spacing_um: float
    path: Path
    tissue: np.ndarray


@dataclass(frozen=True)
class SlideStatus:
    """Result of tiling one slide; ``spacing_um`` is level 0's, ``width`` and ``height`` are level-0 px.

    ``further`` has the cells of the slide list's other columns, where they are not blank.
    """

    slide_id: str
    status: str
    reason: str = ""
    tiles: int = 0
    regions: int = 0
    image_path: Location = Path()
    mask_path: Location | None = None
    patient_id: str = ""
    partition: str = ""
    spacing_um: float | None = None
    spacing_source: str = ""
    width: int = 0
    height: int = 0
    centre: str = ""
    scanner: str = ""
    stain: str = ""
    further: Mapping[str, str] = field(default_factory=dict, hash=False)


STATUS_COLUMNS = tuple(f.name for f in fields(SlideStatus) if f.name != "further")


@dataclass(frozen=True)
class Tiling:
    """Content of tiling.json.

    Attributes:
        geometry: The requested lattice.
        storage: ``jpeg``, ``tar`` or ``none``.
        settings: Every setting that determines the tiles and their content.
        content: The complete file.
    """

    geometry: Geometry
    storage: str
    settings: dict[str, Any]
    content: dict[str, Any]

    @property
    def reader(self) -> str:
        """What decoded the tiles; earlier versions had openslide only."""
        return str(self.settings.get("reader", BACKEND))


def tile_path(slide_id: str, x: int, y: int) -> Path:
    """Path of a tile's JPEG, relative to ROOT."""
    return Path(TILES_FOLDER, "imgs", slide_id, tile_name(slide_id, x, y))


def tile_name(slide_id: str, x: int, y: int) -> str:
    """File name of a tile; parse it from the right, since ids may contain underscores."""
    return f"{slide_id}_{x}_{y}.jpg"


def region_path(slide_id: str, x: int, y: int) -> Path:
    """Path of a region's features, relative to ROOT."""
    return Path(REGIONS_FOLDER, f"{slide_id}_{x}_{y}.pt")


def csv_line(cells: Iterable[Any]) -> str:
    """One line of a table; None becomes an empty cell."""
    texts = ("" if cell is None else str(cell) for cell in cells)
    return ",".join('"' + text.replace('"', '""') + '"' if set(text) & set(',"\n\r') else text for text in texts) + "\n"


def tile_lines(records: Sequence[TileRecord]) -> Iterator[str]:
    """Lines of tiles.csv, without the header; with the columns of annotations if any tile is annotated."""
    annotated = any(r.annotation for r in records)
    for r in records:
        spacings = f"{r.spacing_requested_um:.6g}", f"{r.spacing_um:.6g}"
        share = f"{r.annotation_fraction:.4f}" if r.annotation else ""
        annotation = (r.annotation, share) if annotated else ()
        yield csv_line((r.slide_id, r.x, r.y, r.step_lv0, *spacings, f"{r.tissue:.4f}", *annotation))


def region_lines(records: Iterable[RegionRecord]) -> Iterator[str]:
    """Lines of regions.csv, without the header; the tissue fractions of the grid are one table cell, row-major."""
    for r in records:
        tissue = " ".join(f"{fraction:.3f}" for fraction in r.tissue.reshape(-1))
        yield csv_line((r.slide_id, r.x, r.y, r.step_lv0, *r.grid, f"{r.spacing_um:.6g}", r.path.as_posix(), tissue))


def status_cells(status: SlideStatus) -> dict[str, str]:
    """Cells of slides_status.csv by column; line breaks become spaces."""
    values = {**{name: getattr(status, name) for name in STATUS_COLUMNS}, **status.further}
    return {name: "" if value is None else str(value).replace("\n", " ") for name, value in values.items()}


def tile_table(root: Path) -> Path:
    """The table of tiles: ROOT/tiles.parquet, which ``dino tile`` writes for many tiles, else ROOT/tiles.csv."""
    parquet = root / TILES_PARQUET
    return parquet if parquet.exists() else root / TILES_TABLE


def tile_header(root: Path) -> list[str]:
    """Names of the columns of the table of tiles.

    Raises:
        DataError: If it is absent or damaged.
    """
    path = tile_table(root)
    with _readable(path):
        return read_header(path)


def tile_chunks(
    root: Path, further: Sequence[str] = (), numbers: Mapping[str, type] = TILE_NUMBERS
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The table of tiles in pieces of consecutive tiles of one slide, without an object of any tile.

    Args:
        root: The data folder.
        further: Columns beside :data:`TILE_COLUMNS` to read.
        numbers: Those of :data:`TILE_NUMBERS` to read, with positions and steps among them.

    Yields:
        The slide, and the columns: numbers (int64, float64), or objects for those of ``further``.

    Raises:
        DataError: If the table is absent or damaged.
    """
    path = tile_table(root)
    texts = ["slide_id", *(name for name in further if name not in TILE_COLUMNS)]
    with _readable(path):
        for piece in read_columns(path, texts, numbers):
            _check_positions(piece)
            slides = [_slide_id(slide) for slide in piece["slide_id/values"]]
            cuts = [0, *(np.flatnonzero(np.diff(piece["slide_id"])) + 1), len(piece["slide_id"])]
            for start, end in pairwise(cuts):
                if start == end:  # of an empty table
                    continue
                columns = {name: piece[name][start:end] for name in numbers}
                columns |= {name: piece[f"{name}/values"][piece[name][start:end]] for name in texts[1:]}
                yield slides[piece["slide_id"][start]], columns


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading a table of tiles into a DataError that names the line where that is known."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"expected {path}, which `dino tile` writes, found none") from None
    except (OSError, ValueError) as error:
        if path.suffix != PARQUET:
            deque(_rows(path, TILE_COLUMNS, _tile), maxlen=0)  # raises for the first damaged line
        reason = " ".join(str(error).split())
        raise DataError(f"expected {path} as written by `dino tile`, could not read it: {reason}") from None


def read_tiles(root: Path) -> list[TileRecord]:
    """Every tile of every slide that was tiled.

    Raises:
        DataError: If the table of tiles is absent or damaged.
    """
    if tile_table(root).suffix != PARQUET:
        return _read_table(root / TILES_TABLE, TILE_COLUMNS, _tile)
    further = [name for name in ANNOTATION_COLUMNS if name in tile_header(root)]
    found = []
    for slide, columns in tile_chunks(root, further):
        for cells in zip(*(columns[name].tolist() for name in (*TILE_NUMBERS, *further)), strict=True):
            found.append(_tile(dict(zip(("slide_id", *TILE_NUMBERS, *further), (slide, *cells), strict=True))))
    return found


def read_tile_spacings(root: Path) -> dict[str, float]:
    """Actual spacing in µm/px of the tiles of each slide with tiles; the memory needed does not depend on their number.

    Raises:
        DataError: If the table of tiles is absent or damaged.
    """
    first: dict[str, float] = {}  # the tiles of a slide have the same spacing
    read = {name: TILE_NUMBERS[name] for name in ("x", "y", "step_lv0", "spacing_um")}
    for slide, columns in tile_chunks(root, numbers=read):
        first.setdefault(slide, float(columns["spacing_um"][0]))
    return first


@dataclass(frozen=True, eq=False)
class SlideTiles:
    """The tiles of one slide: level-0 ``coords`` (N, 2) int64 in the order of tiles.csv, footprint, actual spacing.

    ``tissue`` is their tissue fraction, float32 (N,), and ``annotations`` their classes of annotations, empty if no
    slide has any.
    """

    slide_id: str
    coords: np.ndarray
    step_lv0: int
    spacing_um: float
    tissue: np.ndarray
    annotations: Sequence[str] = ()

    def some(self, kept: np.ndarray) -> "SlideTiles":
        """Those of ``kept``, (N,) bool."""
        classes = [one for one, keep in zip(self.annotations, kept.tolist(), strict=False) if keep]
        return replace(self, coords=self.coords[kept], tissue=self.tissue[kept], annotations=classes)


def read_slide_tiles(root: Path) -> dict[str, SlideTiles]:
    """The tiles of each slide that has any, in 20 bytes of memory per tile (28 where they are annotated).

    Raises:
        DataError: If the table of tiles is absent or damaged.
    """
    further = [name for name in ANNOTATION_COLUMNS[:1] if name in tile_header(root)]
    pieces: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    for slide, columns in tile_chunks(root, further):
        pieces[slide].append(
            {
                "coords": np.stack([columns["x"], columns["y"]], 1),  # (N, 2)
                "tissue": columns["tissue"].astype(np.float32),
                "first": np.array([columns["step_lv0"][0], columns["spacing_um"][0]]),
                **{name: columns[name] for name in further},
            }
        )
    return {slide: _slide_tiles(slide, pieces.pop(slide)) for slide in list(pieces)}


def _slide_tiles(slide: str, pieces: Sequence[Mapping[str, np.ndarray]]) -> SlideTiles:
    step, spacing = pieces[0]["first"].tolist()
    joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    classes = joined.get(ANNOTATION_COLUMNS[0], np.array([], object)).tolist()
    return SlideTiles(slide, joined["coords"], int(step), spacing, joined["tissue"], classes if any(classes) else ())


def read_regions(root: Path) -> list[RegionRecord]:
    """Every region of every slide that was tiled.

    Raises:
        DataError: If ROOT/regions.csv is absent or damaged.
    """
    return _read_table(root / REGIONS_TABLE, REGION_COLUMNS, _region)


def write_regions(root: Path, records: Iterable[RegionRecord]) -> None:
    """Write ROOT/regions.csv of a folder that ``dino tile`` did not write."""
    files.write_text(root / REGIONS_TABLE, csv_line(REGION_COLUMNS) + "".join(region_lines(records)))


def read_status(root: Path) -> dict[str, SlideStatus]:
    """Status of every slide, by id.

    Raises:
        DataError: If ROOT/slides_status.csv is absent or damaged.
    """
    return {s.slide_id: s for s in _read_table(root / STATUS_TABLE, STATUS_COLUMNS, parse_status)}


def read_tiling(root: Path) -> Tiling:
    """Read ROOT/tiling.json.

    Raises:
        DataError: If ROOT/tiling.json is absent or damaged.
    """
    path = root / TILING_FILE
    try:
        content = files.read_json(path)
        settings = dict(content["settings"])
        geometry = Geometry(**content["geometry"])
        return Tiling(geometry, str(settings["storage"]), settings, content)
    except FileNotFoundError:
        raise DataError(f"expected {path}, which `dino tile` writes, found none; is {root} its ROOT?") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"expected {path} as written by `dino tile`, could not read it: {error!r}") from None


def write_tiling(root: Path, config: TileConfig) -> None:
    """Write ROOT/tiling.json: the settings that must match, and for information how they were applied."""
    import openslide

    geometry = Geometry.of(config)
    content = {
        "format": "histodino-tiling/1",
        "settings": identity_of(config),
        "geometry": asdict(geometry),
        "region_size_px": geometry.region_size_px,
        "backend": BACKEND,
        "resampler": RESAMPLER,
        "jpeg": {"encoder": "PIL", "quality": config.jpeg_quality},
        "segmentation": asdict(segmentation_config(config)),
        "qc": asdict(filter_config(config)) if config.qc else None,
        "versions": {**versions(), "openslide": openslide.__library_version__},
    }
    files.write_json(root / TILING_FILE, content)


def _slide_id(text: str) -> str:
    """Check that files can be named after the id and are inside ROOT, and return it."""
    if not text or text in (".", "..") or "/" in text or "\0" in text:
        raise ValueError(f"'{text}' cannot be a slide's name")
    return text


def _relative_path(text: str) -> Path:
    """Check that a path relative to ROOT is inside ROOT, and return it."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in text:
        raise ValueError(f"path '{text}' is not inside ROOT")
    return path


def _position(row: dict[str, str]) -> tuple[int, int, int]:
    """Level-0 ``(x, y)`` and step, checked against the largest possible slide."""
    x, y, step = (int(row[name]) for name in ("x", "y", "step_lv0"))
    if max(abs(x), abs(y), step) > MAX_SIDE_PX or step < 1:
        raise ValueError(f"({x}, {y}) with cells of {step} px is not a position on a slide")
    return x, y, step


def _check_positions(columns: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError if a position is not on a slide, see :func:`_position`."""
    bounds = [columns[name] for name in ("x", "y", "step_lv0")]
    if any(np.abs(values).max(initial=0) > MAX_SIDE_PX for values in bounds) or columns["step_lv0"].min(initial=1) < 1:
        raise ValueError("expected positions on slides, found larger or negative numbers")


def _tile(row: dict[str, str]) -> TileRecord:
    requested, spacing, tissue = (float(row[name]) for name in ("spacing_requested_um", "spacing_um", "tissue"))
    share = float(row.get("annotation_fraction") or 0)
    annotation = row.get("annotation", "")
    return TileRecord(
        _slide_id(row["slide_id"]), *_position(row), requested, spacing, tissue, annotation, annotation_fraction=share
    )


def _region(row: dict[str, str]) -> RegionRecord:
    h, w = int(row["grid_h"]), int(row["grid_w"])
    if min(h, w) < 1:
        raise ValueError(f"{h} x {w} cells are not a grid")
    tissue = np.array(row["tissue"].split(), dtype=np.float32).reshape(h, w)  # (h, w)
    return RegionRecord(
        _slide_id(row["slide_id"]),
        *_position(row),
        (h, w),
        float(row["spacing_um"]),
        _relative_path(row["path"]),
        tissue,
    )


def parse_status(row: dict[str, str]) -> SlideStatus:
    """The inverse of :func:`status_cells`.

    Raises:
        ValueError: If a cell is not a value of its column.
    """
    converted: dict[str, Any] = {name: row[name] for name in STATUS_COLUMNS}
    converted["slide_id"] = _slide_id(row["slide_id"])
    for name in ("tiles", "regions", "width", "height"):
        converted[name] = int(row[name])
    try:
        converted["image_path"] = parse_location(row["image_path"])
        converted["mask_path"] = parse_location(row["mask_path"]) if row["mask_path"] else None
    except DataError as error:
        raise ValueError(str(error)) from None
    converted["spacing_um"] = float(row["spacing_um"]) if row["spacing_um"] else None
    if row["status"] not in (OK, FAILED, NO_TISSUE, EXCLUDED):
        raise ValueError(f"'{row['status']}' is not a status")
    further = {name: cell for name, cell in row.items() if cell and name not in STATUS_COLUMNS}
    return SlideStatus(**converted, further=further)


def _read_table(path: Path, columns: Sequence[str], convert: Callable[[dict[str, str]], T]) -> list[T]:
    return list(_rows(path, columns, convert))


def _rows(path: Path, columns: Sequence[str], convert: Callable[[dict[str, str]], T]) -> Iterator[T]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield from _converted(file, path, columns, convert)
    except FileNotFoundError:
        raise DataError(f"expected {path}, which `dino tile` writes, found none") from None
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"expected {path} as written by `dino tile`, could not read it: {error}") from None


def _converted(
    file: Iterable[str], path: Path, columns: Sequence[str], convert: Callable[[dict[str, str]], T]
) -> Iterator[T]:
    lines = csv.reader(file, strict=True)
    header = next(lines, [])
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(f"expected columns {', '.join(columns)} in {path}, found no {', '.join(missing)}")
    for cells in lines:
        try:
            yield convert(dict(zip(header, cells, strict=True)))
        except ValueError as error:
            raise DataError(
                f"{path}, line {lines.line_num}: expected a row as written by `dino tile`, found an invalid one "
                f"({error}); delete the table and tile again to rebuild it"
            ) from None
