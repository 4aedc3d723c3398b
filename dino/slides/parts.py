"""The rows of each slide while slides are being tiled, and the tables that are merged from them.

Each slide has a part: its rows in separate files under ROOT/coordinates/parts. The part of a slide is written after all
its other files, and the ``.json`` of the part last: it marks the slide as done. The tables are merged from the parts. A
killed run therefore loses at most the slides it was working on, and several runs may tile different slides into one
ROOT.
"""

import csv
import hashlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino import files
from dino.errors import DataError
from dino.slides.columns import write_parquet
from dino.slides.tables import (
    ANNOTATION_COLUMNS,
    COORDINATES_FOLDER,
    NO_TISSUE,
    OK,
    REGION_COLUMNS,
    REGIONS_TABLE,
    STATUS_COLUMNS,
    STATUS_TABLE,
    TILE_COLUMNS,
    TILE_NUMBERS,
    TILES_FOLDER,
    TILES_PARQUET,
    TILES_TABLE,
    TILING_FILE,
    RegionRecord,
    SlideStatus,
    TileRecord,
    csv_line,
    parse_status,
    region_lines,
    status_cells,
    tile_lines,
)

MANY_ROWS = 5_000_000  # from which the table of tiles is parquet, which is smaller and is read faster
PROGRESS = "progress.json"  # in ROOT/coordinates
MERGED = "merged.json"  # there too: the parts that tiles.parquet was merged from


@dataclass(frozen=True)
class Part:
    """Record of a finished slide: its status, and the identity of its inputs."""

    status: SlideStatus
    made_from: dict[str, Any]


def save_part(
    root: Path,
    status: SlideStatus,
    made_from: dict[str, Any],
    tiles: Sequence[TileRecord] = (),
    regions: Sequence[RegionRecord] = (),
) -> None:
    """Record a finished slide: its rows of the tables, then the file that marks it as done."""
    files.write_text(_part_path(root, status.slide_id, "tiles.csv"), "".join(tile_lines(tiles)))
    files.write_text(_part_path(root, status.slide_id, "regions.csv"), "".join(region_lines(regions)))
    save_status(root, status, made_from)


def save_status(root: Path, status: SlideStatus, made_from: dict[str, Any]) -> None:
    """Write only the file that marks a slide as done, if it has no tiles or only columns of the slide list changed."""
    content = {"status": status_cells(status), "made_from": made_from}
    files.write_json(_part_path(root, status.slide_id, "json"), content)


def load_part(root: Path, slide_id: str) -> Part | None:
    """Record of a slide from an earlier run; None if it is absent, incomplete or damaged."""
    try:
        content = files.read_json(_part_path(root, slide_id, "json"))
        part = Part(parse_status(content["status"]), dict(content["made_from"]))
        complete = part.status.status != OK or all(
            _part_path(root, slide_id, kind).is_file() for kind in ("tiles.csv", "regions.csv")
        )
        return part if complete else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_tiled(root: Path) -> bool:
    """Whether a slide was tiled into ``root``, or tiles were cut from one: slides that failed leave nothing behind."""
    parts = (load_part(root, path.name.removesuffix(".json")) for path in _parts_folder(root).glob("*.json"))
    tiles = (path for path in (root / TILES_FOLDER).rglob("*") if path.is_file())
    return any(part.status.status in (OK, NO_TISSUE) for part in parts if part) or any(tiles)


def save_progress(root: Path, slide_ids: Iterable[str], processes: int) -> None:
    """Record how many slides a run will have tiled in the end, and by how many processes, for :func:`progress_line`."""
    known = {path.name.removesuffix(".json") for path in _parts_folder(root).glob("*.json")}
    plan = {"slides": len({*slide_ids} | known), "processes": processes}
    if _read_plan(root) != plan:
        files.write_json(root / COORDINATES_FOLDER / PROGRESS, plan)


def _read_plan(root: Path) -> dict[str, int]:
    """The record of :func:`save_progress`; empty if there is none, as in a ROOT of an earlier version."""
    try:
        plan = files.read_json(root / COORDINATES_FOLDER / PROGRESS)
        return {name: int(plan[name]) for name in ("slides", "processes")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def progress_line(root: Path) -> str:
    """How far the tiling of ``root`` is, over all processes, in one line.

    Raises:
        DataError: If nothing was tiled into it.
    """
    if not (root / TILING_FILE).exists():
        raise DataError(f"expected {root / TILING_FILE}, which `dino tile` writes, found none; is {root} its ROOT?")
    found = [load_part(root, path.name.removesuffix(".json")) for path in _parts_folder(root).glob("*.json")]
    statuses = [part.status for part in found if part]
    plan = _read_plan(root)
    total, processes = plan.get("slides", len(statuses)), plan.get("processes", 1)
    counts = Counter(status.status for status in statuses)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
    tiles = sum(status.tiles for status in statuses)
    by = f"; {processes} processes" if processes > 1 else ""
    return f"{len(statuses):,} of {total:,} slides tiled ({kinds or 'none yet'}), {tiles:,} tiles{by}"


def drop_part(root: Path, slide_id: str) -> None:
    """Remove the mark that a slide is done, before its files are written again."""
    _part_path(root, slide_id, "json").unlink(missing_ok=True)


def tidy(root: Path) -> None:
    """Remove temporary files that killed processes left. Call it only while no other run is tiling into ROOT."""
    files.tidy(_parts_folder(root))
    for name in (TILES_TABLE, TILES_PARQUET, REGIONS_TABLE, STATUS_TABLE, TILING_FILE):
        files.tidy(root, name)


def tile_positions(root: Path, slide_id: str) -> list[tuple[int, int]] | None:
    """Level-0 ``(x, y)`` of the slide's recorded tiles; None if its rows are missing or damaged."""
    try:
        with _part_path(root, slide_id, "tiles.csv").open(newline="", encoding="utf-8") as file:
            return [(int(x), int(y)) for _, x, y, *_ in csv.reader(file, strict=True)]
    except (OSError, ValueError, csv.Error):
        return None


def merge(root: Path) -> None:
    """Rebuild the three tables from all parts; a table that would not change is not written."""
    records = sorted(_parts_folder(root).glob("*.json"))
    found = (load_part(root, record.name[: -len(".json")]) for record in records)
    statuses = [part.status for part in found if part]
    done = [status.slide_id for status in statuses if status.status == OK]
    _merge_tiles(root, done, sum(status.tiles for status in statuses if status.status == OK))
    _rewrite(root / REGIONS_TABLE, lambda: _table(root, REGION_COLUMNS, done, "regions.csv"))
    _rewrite(root / STATUS_TABLE, lambda: _status_table(statuses))


def _merge_tiles(root: Path, slide_ids: Sequence[str], rows: int) -> None:
    """Write tiles.csv, or tiles.parquet where there are many rows and pyarrow is installed; a run reads the latter."""
    parquet = root / TILES_PARQUET
    if rows <= MANY_ROWS or importlib.util.find_spec("pyarrow") is None:
        parquet.unlink(missing_ok=True)  # first: it would be read in place of the other
        _rewrite(root / TILES_TABLE, lambda: _tile_table(root, slide_ids))
        return
    merged_from = _stamps(root, slide_ids)
    if not _is_merged(root, merged_from):  # writing a large table takes minutes
        with files.atomic_path(parquet) as temporary:
            write_parquet(temporary, _tile_table(root, slide_ids), TILE_NUMBERS)
        record = {"parts": merged_from, "table": list(files.stamp(parquet))}
        files.write_json(root / COORDINATES_FOLDER / MERGED, record)
    (root / TILES_TABLE).unlink(missing_ok=True)


def _stamps(root: Path, slide_ids: Sequence[str]) -> str:
    """Hash of which parts there are, their sizes and modification times."""
    digest = hashlib.sha256()
    for slide_id in slide_ids:
        digest.update(f"{slide_id}\0{files.stamp(_part_path(root, slide_id, 'tiles.csv'))}\0".encode())
    return digest.hexdigest()


def _is_merged(root: Path, merged_from: str) -> bool:
    """Whether tiles.parquet is the one that was merged from these parts."""
    try:
        record = files.read_json(root / COORDINATES_FOLDER / MERGED)
        return record == {"parts": merged_from, "table": list(files.stamp(root / TILES_PARQUET))}
    except (OSError, ValueError):
        return False


def _table(root: Path, columns: Sequence[str], slide_ids: Iterable[str], name: str) -> Iterator[bytes]:
    yield csv_line(columns).encode()
    for slide_id in slide_ids:
        yield _part_path(root, slide_id, name).read_bytes()


def _tile_table(root: Path, slide_ids: Sequence[str]) -> Iterator[bytes]:
    """tiles.csv; the rows of slides without annotations are filled up with empty cells where others have them."""
    annotated = {slide_id for slide_id in slide_ids if _has_annotations(root, slide_id)}
    yield csv_line((*TILE_COLUMNS, *ANNOTATION_COLUMNS) if annotated else TILE_COLUMNS).encode()
    for slide_id in slide_ids:
        rows = _part_path(root, slide_id, "tiles.csv").read_bytes()
        empty = b"," * len(ANNOTATION_COLUMNS) if annotated and slide_id not in annotated else b""
        yield rows.replace(b"\n", empty + b"\n") if empty else rows


def _has_annotations(root: Path, slide_id: str) -> bool:
    with _part_path(root, slide_id, "tiles.csv").open(newline="", encoding="utf-8") as file:
        return len(next(csv.reader(file), [])) > len(TILE_COLUMNS)


def _status_table(statuses: Sequence[SlideStatus]) -> Iterator[bytes]:
    columns = (*STATUS_COLUMNS, *sorted({name for status in statuses for name in status.further}))
    yield csv_line(columns).encode()
    for status in statuses:
        cells = status_cells(status)
        yield csv_line(cells.get(name) for name in columns).encode()


def _rewrite(path: Path, chunks: Callable[[], Iterator[bytes]]) -> None:
    if _has_content(path, chunks()):
        return
    with files.atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(chunks())


def _has_content(path: Path, chunks: Iterator[bytes]) -> bool:
    try:
        with path.open("rb") as file:
            return all(file.read(len(chunk)) == chunk for chunk in chunks) and not file.read(1)
    except FileNotFoundError:
        return False


def _part_path(root: Path, slide_id: str, kind: str) -> Path:
    return _parts_folder(root) / f"{slide_id}.{kind}"


def _parts_folder(root: Path) -> Path:
    return root / COORDINATES_FOLDER / "parts"
