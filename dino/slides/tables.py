"""The tables under ROOT: tiles.csv, regions.csv, slides_status.csv and tiling.json, written and read in one place."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dino.errors import DataError
from dino.files import read_json
from dino.slides.lattice import Geometry

TILES_FOLDER = "patch_256_pretraining"
REGIONS_FOLDER = "region_4096_pretraining"
TILES_TABLE, REGIONS_TABLE, STATUS_TABLE, TILING_FILE = "tiles.csv", "regions.csv", "slides_status.csv", "tiling.json"
TILE_COLUMNS = ("slide_id", "x", "y", "step_lv0", "spacing_requested_um", "spacing_um", "tissue")
REGION_COLUMNS = ("slide_id", "x", "y", "step_lv0", "grid_h", "grid_w", "spacing_um", "path", "tissue")
LARGEST_PX = 2**31  # of a slide's side; larger numbers come from damaged tables
OK, FAILED, NO_TISSUE, EXCLUDED = "ok", "failed", "no_tissue", "excluded"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TileRecord:
    """One tile: level-0 ``(x, y)``, its footprint there, requested and actual spacing, tissue fraction."""

    slide_id: str
    x: int
    y: int
    step_lv0: int
    spacing_requested_um: float
    spacing_um: float
    tissue: float

    @property
    def path(self) -> Path:
        """Where its JPEG lies, relative to ROOT (with ``storage=jpeg``)."""
        return tile_path(self.slide_id, self.x, self.y)


@dataclass(frozen=True, slots=True, eq=False)
class RegionRecord:
    """One region: level-0 ``(x, y)``, step of its cells, ``grid`` = (h, w) cells, actual spacing of a cell's pixels.

    ``path`` is where its features go, relative to ROOT; ``tissue`` is float32 ``(h, w)``, the fraction of each cell.
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
    """What became of one slide; ``spacing_um`` is level 0's, ``width`` and ``height`` are level-0 px."""

    slide_id: str
    status: str
    reason: str = ""
    tiles: int = 0
    regions: int = 0
    image_path: Path = Path()
    mask_path: Path | None = None
    patient_id: str = ""
    partition: str = ""
    spacing_um: float | None = None
    spacing_source: str = ""
    width: int = 0
    height: int = 0
    centre: str = ""
    scanner: str = ""
    stain: str = ""


STATUS_COLUMNS = tuple(f.name for f in fields(SlideStatus))


@dataclass(frozen=True)
class Tiling:
    """What tiling.json records.

    Attributes:
        geometry: The lattice that was asked for.
        storage: ``jpeg``, ``tar`` or ``none``.
        settings: Every setting that decides which tiles there are and what is in them.
        content: The whole file.
    """

    geometry: Geometry
    storage: str
    settings: dict[str, Any]
    content: dict[str, Any]


def tile_path(slide_id: str, x: int, y: int) -> Path:
    """Path of a tile's JPEG, relative to ROOT."""
    return Path(TILES_FOLDER, "imgs", slide_id, tile_name(slide_id, x, y))


def tile_name(slide_id: str, x: int, y: int) -> str:
    """File name of a tile; read it from the right, since ids may hold underscores."""
    return f"{slide_id}_{x}_{y}.jpg"


def region_path(slide_id: str, x: int, y: int) -> Path:
    """Path of a region's features, relative to ROOT."""
    return Path(REGIONS_FOLDER, f"{slide_id}_{x}_{y}.pt")


def csv_line(cells: Iterable[Any]) -> str:
    """One line of a table; None becomes an empty cell."""
    texts = ("" if cell is None else str(cell) for cell in cells)
    return ",".join('"' + text.replace('"', '""') + '"' if set(text) & set(',"\n\r') else text for text in texts) + "\n"


def tile_lines(records: Iterable[TileRecord]) -> Iterator[str]:
    """Lines of tiles.csv, without the header."""
    for r in records:
        spacings = f"{r.spacing_requested_um:.6g}", f"{r.spacing_um:.6g}"
        yield csv_line((r.slide_id, r.x, r.y, r.step_lv0, *spacings, f"{r.tissue:.4f}"))


def region_lines(records: Iterable[RegionRecord]) -> Iterator[str]:
    """Lines of regions.csv, without the header; the cells' tissue is one cell of the table, row-major."""
    for r in records:
        tissue = " ".join(f"{fraction:.3f}" for fraction in r.tissue.reshape(-1))
        yield csv_line((r.slide_id, r.x, r.y, r.step_lv0, *r.grid, f"{r.spacing_um:.6g}", r.path.as_posix(), tissue))


def status_cells(status: SlideStatus) -> dict[str, str]:
    """Cells of slides_status.csv by column; reasons are brought to one line."""
    values = zip(STATUS_COLUMNS, astuple(status), strict=True)
    return {name: "" if value is None else str(value).replace("\n", " ") for name, value in values}


def read_tiles(root: Path) -> list[TileRecord]:
    """Every tile of every slide that was tiled.

    Raises:
        DataError: If ROOT/tiles.csv is absent or damaged.
    """
    return _read_table(root / TILES_TABLE, TILE_COLUMNS, _tile)


def read_regions(root: Path) -> list[RegionRecord]:
    """Every region of every slide that was tiled.

    Raises:
        DataError: If ROOT/regions.csv is absent or damaged.
    """
    return _read_table(root / REGIONS_TABLE, REGION_COLUMNS, _region)


def read_status(root: Path) -> dict[str, SlideStatus]:
    """What became of every slide, by id.

    Raises:
        DataError: If ROOT/slides_status.csv is absent or damaged.
    """
    return {s.slide_id: s for s in _read_table(root / STATUS_TABLE, STATUS_COLUMNS, parse_status)}


def read_tiling(root: Path) -> Tiling:
    """How ROOT was tiled.

    Raises:
        DataError: If ROOT/tiling.json is absent or damaged.
    """
    path = root / TILING_FILE
    try:
        content = read_json(path)
        settings = dict(content["settings"])
        geometry = Geometry(**content["geometry"])
        return Tiling(geometry, str(settings["storage"]), settings, content)
    except FileNotFoundError:
        raise DataError(f"expected {path}, which `dino tile` writes, found none; is {root} its ROOT?") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"expected {path} as `dino tile` wrote it, could not read it: {error!r}") from None


def _slide_id(text: str) -> str:
    """The id, if files can be named after it: no table leads out of its ROOT."""
    if not text or text in (".", "..") or "/" in text or "\0" in text:
        raise ValueError(f"'{text}' cannot be a slide's name")
    return text


def _path(text: str) -> Path:
    """A path relative to ROOT, if it stays in it."""
    path = Path(text)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in text:
        raise ValueError(f"path '{text}' does not lie in ROOT")
    return path


def _place(row: dict[str, str]) -> tuple[int, int, int]:
    """Level-0 ``(x, y)`` and step, if a slide can have them."""
    x, y, step = (int(row[name]) for name in ("x", "y", "step_lv0"))
    if max(abs(x), abs(y), step) > LARGEST_PX or step < 1:
        raise ValueError(f"({x}, {y}) with cells of {step} px is no place on a slide")
    return x, y, step


def _tile(row: dict[str, str]) -> TileRecord:
    numbers = (float(row[name]) for name in ("spacing_requested_um", "spacing_um", "tissue"))
    return TileRecord(_slide_id(row["slide_id"]), *_place(row), *numbers)


def _region(row: dict[str, str]) -> RegionRecord:
    h, w = int(row["grid_h"]), int(row["grid_w"])
    if min(h, w) < 1:
        raise ValueError(f"{h} x {w} cells are no grid")
    tissue = np.array(row["tissue"].split(), dtype=np.float32).reshape(h, w)  # (h, w)
    return RegionRecord(
        _slide_id(row["slide_id"]), *_place(row), (h, w), float(row["spacing_um"]), _path(row["path"]), tissue
    )


def parse_status(row: dict[str, str]) -> SlideStatus:
    """The inverse of :func:`status_cells`.

    Raises:
        ValueError: If a cell is not what its column holds.
    """
    converted: dict[str, Any] = {name: row[name] for name in STATUS_COLUMNS}
    converted["slide_id"] = _slide_id(row["slide_id"])
    for name in ("tiles", "regions", "width", "height"):
        converted[name] = int(row[name])
    converted["image_path"] = Path(row["image_path"])
    converted["mask_path"] = Path(row["mask_path"]) if row["mask_path"] else None
    converted["spacing_um"] = float(row["spacing_um"]) if row["spacing_um"] else None
    if row["status"] not in (OK, FAILED, NO_TISSUE, EXCLUDED):
        raise ValueError(f"'{row['status']}' is no status")
    return SlideStatus(**converted)


def _read_table(path: Path, columns: Sequence[str], convert: Callable[[dict[str, str]], T]) -> list[T]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(_converted(file, path, columns, convert))
    except FileNotFoundError:
        raise DataError(f"expected {path}, which `dino tile` writes, found none") from None
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"expected {path} as `dino tile` wrote it, could not read it: {error}") from None


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
                f"{path}, line {lines.line_num}: expected a line as `dino tile` wrote it, found another ({error}); "
                "delete the table and tile again to rebuild it"
            ) from None
