"""Each slide's own share of the tables, kept under ROOT/coordinates/parts, and their merging.

A slide's part is written when all else of it stands, and its ``.json`` last of all: it is the mark that the slide is
done. The tables under ROOT are merged from the parts, so that a run that was killed loses at most the slides it was
working on, and several runs may fill one ROOT, one after the other, each with slides of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino import files
from dino.slides import tables
from dino.slides.tables import RegionRecord, SlideStatus, TileRecord

COORDINATES_FOLDER = "coordinates"


@dataclass(frozen=True)
class Part:
    """What is known of a slide that was worked on before: its status, and what it was made from."""

    status: SlideStatus
    made_from: dict[str, Any]


def save_part(
    root: Path,
    status: SlideStatus,
    made_from: dict[str, Any],
    tiles: Sequence[TileRecord] = (),
    regions: Sequence[RegionRecord] = (),
) -> None:
    """Record a finished slide: its lines of the tables, then the mark that it is done."""
    files.write_text(_path(root, status.slide_id, "tiles.csv"), "".join(tables.tile_lines(tiles)))
    files.write_text(_path(root, status.slide_id, "regions.csv"), "".join(tables.region_lines(regions)))
    save_status(root, status, made_from)


def save_status(root: Path, status: SlideStatus, made_from: dict[str, Any]) -> None:
    """Write the mark alone: for a slide without tiles, or one of which only the list's columns changed."""
    content = {"status": tables.status_cells(status), "made_from": made_from}
    files.write_json(_path(root, status.slide_id, "json"), content)


def load_part(root: Path, slide_id: str) -> Part | None:
    """What an earlier run recorded of a slide; None if nothing, or if some of it is lost."""
    try:
        content = files.read_json(_path(root, slide_id, "json"))
        part = Part(tables.parse_status(content["status"]), dict(content["made_from"]))
        whole = part.status.status != tables.OK or all(
            _path(root, slide_id, kind).is_file() for kind in ("tiles.csv", "regions.csv")
        )
        return part if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def drop_part(root: Path, slide_id: str) -> None:
    """Take away the mark, before anything of the slide is written anew."""
    _path(root, slide_id, "json").unlink(missing_ok=True)


def tidy(root: Path) -> None:
    """Take away what a killed process left half-written of parts and tables; only while nobody tiles into ROOT."""
    files.tidy(_folder(root))
    for name in (tables.TILES_TABLE, tables.REGIONS_TABLE, tables.STATUS_TABLE, tables.TILING_FILE):
        files.tidy(root, name)


def tile_places(root: Path, slide_id: str) -> list[tuple[int, int]] | None:
    """Level-0 ``(x, y)`` of the slide's recorded tiles; None if its lines are lost."""
    try:
        lines = _path(root, slide_id, "tiles.csv").read_text().splitlines()
        # Counted from the right, since an id may hold commas.
        cells = [line.rsplit(",", len(tables.TILE_COLUMNS) - 1) for line in lines]
        return [(int(x), int(y)) for _, x, y, *_ in cells]
    except (OSError, ValueError):
        return None


def merge(root: Path) -> None:
    """Rebuild the three tables from all parts; a table that would not change is left untouched."""
    marks = sorted(_folder(root).glob("*.json"))
    parts = [part for part in (load_part(root, mark.name[: -len(".json")]) for mark in marks) if part]
    statuses = [part.status for part in parts]
    done = [status.slide_id for status in statuses if status.status == tables.OK]
    _rewrite(root / tables.TILES_TABLE, lambda: _table(root, tables.TILE_COLUMNS, done, "tiles.csv"))
    _rewrite(root / tables.REGIONS_TABLE, lambda: _table(root, tables.REGION_COLUMNS, done, "regions.csv"))
    _rewrite(root / tables.STATUS_TABLE, lambda: _status_table(statuses))


def _table(root: Path, columns: Sequence[str], slide_ids: Iterable[str], name: str) -> Iterator[bytes]:
    yield tables.csv_line(columns).encode()
    for slide_id in slide_ids:
        yield _path(root, slide_id, name).read_bytes()


def _status_table(statuses: Iterable[SlideStatus]) -> Iterator[bytes]:
    yield tables.csv_line(tables.STATUS_COLUMNS).encode()
    for status in statuses:
        yield tables.csv_line(tables.status_cells(status).values()).encode()


def _rewrite(path: Path, chunks: Callable[[], Iterator[bytes]]) -> None:
    if _holds(path, chunks()):
        return
    with files.atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(chunks())


def _holds(path: Path, chunks: Iterator[bytes]) -> bool:
    try:
        with path.open("rb") as file:
            return all(file.read(len(chunk)) == chunk for chunk in chunks) and not file.read(1)
    except FileNotFoundError:
        return False


def _path(root: Path, slide_id: str, kind: str) -> Path:
    return _folder(root) / f"{slide_id}.{kind}"


def _folder(root: Path) -> Path:
    return root / COORDINATES_FOLDER / "parts"
