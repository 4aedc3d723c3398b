"""Tables under ROOT: round trips, and errors that name damaged files."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dino.errors import DataError
from dino.slides import parts, tables
from dino.slides.lattice import Geometry
from dino.slides.tables import RegionRecord, SlideStatus, TileRecord

TILE = TileRecord("a_1,b", 256, 0, 256, 0.5, 0.499, 0.25)
REGION = RegionRecord(
    "a_1,b",
    0,
    512,
    256,
    (2, 3),
    0.499,
    tables.region_path("a_1,b", 0, 512),
    np.arange(6, dtype=np.float32).reshape(2, 3) / 8,
)
STATUS = SlideStatus(
    "a_1,b", "ok", 'said "so", then\nleft', 1, 1, Path("/x/a, b.svs"), None, "p1", "pretrain", 0.1 + 0.2, "user", 9, 8
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    parts.save_part(tmp_path, STATUS, {"image_bytes": 1}, [TILE], [REGION])
    parts.save_status(tmp_path, SlideStatus("zz", "failed", "no spacing"), {})
    parts.merge(tmp_path)
    return tmp_path


def test_round_trip(root: Path) -> None:
    assert tables.read_tiles(root) == [TILE]
    (region,) = tables.read_regions(root)
    assert (region.slide_id, region.x, region.y, region.grid, region.path) == ("a_1,b", 0, 512, (2, 3), REGION.path)
    np.testing.assert_allclose(region.tissue, REGION.tissue, atol=5e-4)  # row-major, three decimals
    statuses = tables.read_status(root)
    assert list(statuses) == ["a_1,b", "zz"]
    found = statuses["a_1,b"]
    assert found.reason == 'said "so", then left'
    assert (found.image_path, found.mask_path, found.spacing_um) == (STATUS.image_path, None, 0.1 + 0.2)
    assert parts.tile_positions(root, "a_1,b") == [(256, 0)]


def test_further_columns_of_the_slide_list_are_kept(root: Path) -> None:
    further = {"grade": "3", "site, ward": 'the "east" one'}
    parts.save_status(root, SlideStatus("a", "no_tissue", further=further), {})
    parts.save_status(root, SlideStatus("b", "no_tissue", further={"her2": "0"}), {})
    parts.merge(root)
    statuses = tables.read_status(root)
    assert [statuses[name].further for name in ("a", "b", "zz")] == [further, {"her2": "0"}, {}]
    header = (root / "slides_status.csv").read_text().splitlines()[0]
    assert header.startswith(",".join(tables.STATUS_COLUMNS)) and header.endswith(',grade,her2,"site, ward"')


@pytest.mark.parametrize("many", [10**9, 0], ids=["csv", "parquet"])
def test_columns_of_tiles_are_those_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    """Also of ids that look like numbers or missing values, and without a table for either kind left from before."""
    for limit in (many, 10**9 - many, many):
        monkeypatch.setattr(parts, "MANY_ROWS", limit)
        for slide in ("007", "7", "NA", "nan", "0", "1e3", 'a,"b'):
            tiles = [
                TileRecord(slide, 256 * i, 512, 256, 0.5, 0.499, 0.25 * i, "tumour" * (i > 1), 0.5) for i in range(3)
            ]
            parts.save_part(tmp_path, SlideStatus(slide, "ok", tiles=3), {}, tiles)
        parts.merge(tmp_path)
        assert [path.name for path in tmp_path.glob("tiles.*")] == ["tiles.parquet" if limit == 0 else "tiles.csv"]
    rows = tables.read_tiles(tmp_path)
    found = tables.read_slide_tiles(tmp_path)
    assert len(rows) == 21 and list(found) == list(dict.fromkeys(row.slide_id for row in rows))
    for slide, one in found.items():
        own = [row for row in rows if row.slide_id == slide]
        assert one.coords.tolist() == [[row.x, row.y] for row in own] and one.coords.dtype == np.int64
        assert one.tissue.tolist() == [row.tissue for row in own]
        assert list(one.annotations) == [row.annotation for row in own]
    assert tables.read_tile_spacings(tmp_path) == dict.fromkeys(found, 0.499)


def test_a_table_that_was_edited_with_pandas_is_read_alike_from_both_files(tmp_path: Path) -> None:
    """Empty cells, categories and columns of numbers: all further columns are texts."""
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"slide_id": [7, 7, 8, 8], "x": [0, 256, 0, 256], **dict.fromkeys(tables.TILE_NUMBERS, 1)})
    frame["tissue"] = [0.5, float("nan"), 1.0, 0.25]
    further = {
        "text": ["a", None, "b", ""],
        "kind": pd.Categorical(["u", "v", None, "u"]),
        "cluster": [0, 1, 2, 0],
        "score": [0.0, 1.5, float("nan"), 2.0],
        "good": [True, False, True, False],
        "blank": [None] * 4,
    }
    frame = frame.assign(**further)
    found = []
    for kind in ("csv", "parquet"):
        root = tmp_path / kind
        root.mkdir()
        frame.to_csv(root / "tiles.csv", index=False, na_rep="")
        if kind == "parquet":
            frame.to_parquet(root / "tiles.parquet", engine="pyarrow", index=False)
        numbers = {name: tables.TILE_NUMBERS[name] for name in ("x", "y", "step_lv0")}  # a CSV needs the others
        pieces = tables.tile_chunks(root, list(further), numbers)
        found.append([(slide, {name: columns[name].tolist() for name in columns}) for slide, columns in pieces])
    assert found[0] == found[1] and [slide for slide, _ in found[0]] == ["7", "8"]
    assert found[0][0][1]["cluster"] == ["0", "1"] and found[0][0][1]["text"] == ["a", ""]
    assert np.isnan(tables.read_slide_tiles(tmp_path / "parquet")["7"].tissue).tolist() == [False, True]


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        ("x", [0, None], "1 empty cells in column x"),
        ("x", [0, 0.5], "0.5.* was truncated"),
        ("y", ["0", "down"], "'down'"),
        ("slide_id", ["a", None], "'' cannot be a slide's name"),
    ],
)
def test_cells_of_parquet_that_a_csv_could_not_have_are_refused(
    tmp_path: Path, column: str, cells: list, message: str
) -> None:
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"slide_id": ["a", "a"], **dict.fromkeys(tables.TILE_NUMBERS, 1), column: cells})
    frame.to_parquet(tmp_path / "tiles.parquet", engine="pyarrow", index=False)
    with pytest.raises(DataError, match=f"tiles.parquet as written by .*{message}"):
        list(tables.tile_chunks(tmp_path))


def test_a_large_table_is_written_only_where_slides_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(parts, "MANY_ROWS", 0)

    def merged(slide: str, *places: int) -> int:
        """Merge after a slide was tiled; returns which file the table is."""
        tiles = [TileRecord(slide, x, 0, 256, 0.5, 0.5, 1.0) for x in places]
        parts.save_part(tmp_path, SlideStatus(slide, "ok", tiles=len(tiles)), {}, tiles)
        parts.merge(tmp_path)
        return table.stat().st_mtime_ns

    table = tmp_path / "tiles.parquet"
    first = merged("one", 0, 256)
    parts.merge(tmp_path)
    assert table.stat().st_mtime_ns == first
    second = merged("one", 0, 512)  # as many tiles, of the same size on disk
    assert second != first and [row.x for row in tables.read_tiles(tmp_path)] == [0, 512]
    third = merged("two", 0)
    assert third != second and len(tables.read_tiles(tmp_path)) == 3
    table.write_bytes(b"damaged")
    parts.merge(tmp_path)
    assert len(tables.read_tiles(tmp_path)) == 3


def test_merging_does_not_write_unchanged_tables(root: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in root.glob("*.csv")}
    parts.merge(root)
    assert {path.name: path.stat().st_mtime_ns for path in root.glob("*.csv")} == before
    parts.save_status(root, SlideStatus("zz", "no_tissue"), {})
    parts.merge(root)
    after = {path.name: path.stat().st_mtime_ns for path in root.glob("*.csv")}
    assert [name for name in after if after[name] != before[name]] == ["slides_status.csv"]


def test_an_unfinished_slide_is_in_no_table(root: Path) -> None:
    parts.drop_part(root, "a_1,b")
    parts.merge(root)
    assert tables.read_tiles(root) == [] and tables.read_regions(root) == []
    assert list(tables.read_status(root)) == ["zz"]


def test_a_slide_with_missing_rows_is_unfinished(root: Path) -> None:
    (root / "coordinates/parts/a_1,b.regions.csv").unlink()
    assert parts.load_part(root, "a_1,b") is None
    parts.merge(root)
    assert list(tables.read_status(root)) == ["zz"]


def test_paths() -> None:
    assert TILE.path == Path("patch_256_pretraining/imgs/a_1,b/a_1,b_256_0.jpg")
    assert REGION.path == Path("region_4096_pretraining/a_1,b_0_512.pt")


READERS = {"tiles.csv": tables.read_tiles, "regions.csv": tables.read_regions, "slides_status.csv": tables.read_status}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", ["absent", "header", "cut", "binary", "word", "empty"])
def test_errors_name_the_damaged_file(root: Path, name: str, damage: str) -> None:
    path = root / name
    text = path.read_text()
    header, row = text.split("\n", 1)
    wrong = {
        "header": text.replace("slide_id", "name"),
        "cut": header + "\n" + row[: len(row) // 3] + "\n",
        "word": header + "\n" + row.replace("ok,", "fine,").replace("256", "many").replace("9,8", "9,tall"),
        "empty": "",
    }
    if damage == "absent":
        path.unlink()
    elif damage == "binary":
        path.write_bytes(header.encode() + b"\n\xff\xfe\n")
    else:
        path.write_text(wrong[damage])
    with pytest.raises(DataError, match=name) as caught:
        READERS[name](root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{}", '{"settings": {}, "geometry": {"colour": 1}}', "[1]"])
def test_a_damaged_tiling_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tiling.json").write_text(content)
    with pytest.raises(DataError, match=r"tiling\.json"):
        tables.read_tiling(tmp_path)


def test_a_tiling_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """As written by version 0.1.0: its keys are public."""
    content = {
        "format": "histodino-tiling/1",
        "settings": {"spacing_um": 0.7, "tile_size_px": 64, "region_size_px": 128, "storage": "tar", "qc": True},
        "geometry": {
            "spacing_um": 0.7,
            "tile_size_px": 64,
            "overlap": 0.5,
            "region_cells": 2,
            "region_overlap_cells": 0,
            "tolerance": 0.05,
        },
        "region_size_px": 128,
    }
    (tmp_path / "tiling.json").write_text(json.dumps(content))
    tiling = tables.read_tiling(tmp_path)
    assert tiling.geometry == Geometry(0.7, 64, 0.5, 2)
    assert (tiling.storage, tiling.settings, tiling.content) == ("tar", content["settings"], content)


def test_annotations_are_columns_only_where_a_tile_has_one(root: Path) -> None:
    """Parts of earlier versions, and of slides without annotations, have two cells less."""
    plain = (root / "tiles.csv").read_text()
    assert plain.splitlines()[0] == "slide_id,x,y,step_lv0,spacing_requested_um,spacing_um,tissue"
    annotated = TileRecord("b", 0, 0, 256, 0.5, 0.499, 1.0, "tumour, high", 0.625)
    other = TileRecord("b", 256, 0, 256, 0.5, 0.499, 1.0)
    parts.save_part(root, SlideStatus("b", "ok", tiles=2), {}, [annotated, other])
    parts.merge(root)
    header, first, second, third = (root / "tiles.csv").read_text().splitlines()
    assert header == plain.splitlines()[0] + ",annotation,annotation_fraction"
    assert first == plain.splitlines()[1] + ",," and second.endswith(',1.0000,"tumour, high",0.6250')
    assert third.endswith(",1.0000,,")
    assert tables.read_tiles(root) == [TILE, annotated, other]
    assert parts.tile_positions(root, "b") == [(0, 0), (256, 0)]
