"""`tile` end to end, on synthetic slides and on the sample slide."""

import csv
import tarfile
from pathlib import Path

import numpy as np
import pytest
from painted_slide import halved, noise, write_slide
from PIL import Image

from dino.api.tiling import tile
from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError
from dino.lock import RunLock
from dino.slides import sample_slide, storage, tiling
from dino.slides.lattice import Geometry
from dino.slides.reader import SlideReader
from dino.slides.tables import read_regions, read_status, read_tiles, read_tiling

SMALL = {"tile_size_px": 64, "region_size_px": 128, "num_workers": 1, "previews": False}


def small(**settings) -> TileConfig:
    return TileConfig(**{**SMALL, **settings})


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides: two of tissue (the first a pyramid of odd size), one of glass."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("one", "two")):
        pixels = noise(517, 391, seed)
        write_slide(folder / f"{name}.tiff", [pixels, halved(pixels)])
    write_slide(folder / "glass.tiff", [np.full((300, 300, 3), 245, np.uint8)])
    return folder


def contents(root: Path) -> dict[str, tuple[int, int]]:
    """Every file under ``root``, with its inode and time."""
    return {str(p.relative_to(root)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


def write_list(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, sorted({column for row in rows for column in row}), restval="")
        table.writeheader()
        table.writerows(rows)
    return path


def test_the_sample_slide(tmp_path: Path) -> None:
    """Tiles overlap by half, regions by all but one cell."""
    config = TileConfig(overlap=0.5, region_size_px=1024, region_overlap_cells=3, num_workers=1)
    summary = tile([sample_slide()], tmp_path, config)
    assert summary.exit_code == 0 and summary.tiles == 176 and summary.regions == 34
    tiles, regions = read_tiles(tmp_path), read_regions(tmp_path)
    assert len(tiles) == 176 and len(regions) == 34
    assert {t.path for t in tiles} == {
        p.relative_to(tmp_path) for p in tmp_path.rglob("patch_256_pretraining/**/*.jpg")
    }
    assert {(t.x % 128, t.y % 128, t.step_lv0, t.spacing_um) for t in tiles} == {(0, 0, 256, 0.499)}
    assert min(t.tissue for t in tiles) >= 0.25
    assert all(r.grid == (4, 4) and r.x % 256 == 0 and r.x + 1024 <= 2220 and r.y + 1024 <= 2967 for r in regions)
    assert all(r.tissue.mean() >= 0.249 for r in regions)
    status = read_status(tmp_path)["CMU-1-Small-Region"]
    assert (status.spacing_um, status.spacing_source, status.width, status.height) == (0.499, "metadata", 2220, 2967)
    assert read_tiling(tmp_path).geometry == Geometry(overlap=0.5, region_cells=4, region_overlap_cells=3)
    for kind in ("tissue", "tiles", "regions"):
        assert Image.open(tmp_path / f"coordinates/previews/{kind}/CMU-1-Small-Region.jpg").width >= 2220
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize("spacing_um", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_files_contain_the_cells_for_every_storage(
    slides: Path, tmp_path: Path, spacing_um: float, overlap: float
) -> None:
    config = {"spacing_um": spacing_um, "overlap": overlap}
    tile([slides / "one.tiff"], tmp_path / "jpeg", small(**config))
    tile([slides / "one.tiff"], tmp_path / "tar", small(**config, storage="tar"))
    tile([slides / "one.tiff"], tmp_path / "parquet", small(**config, storage="parquet"))
    tiles = read_tiles(tmp_path / "jpeg")
    assert tiles and tiles == read_tiles(tmp_path / "tar")
    geometry = read_tiling(tmp_path / "jpeg").geometry
    with SlideReader(slides / "one.tiff", geometry) as reader:
        assert len(tiles) == len(reader.lattice.tile_origins())
        cut = {(t.x, t.y): storage.encode(reader.read_cell(t.x, t.y), 90) for t in tiles}
    assert cut == {(t.x, t.y): (tmp_path / "jpeg" / t.path).read_bytes() for t in tiles}
    file = pytest.importorskip("pyarrow.parquet").ParquetFile(
        tmp_path / "parquet/patch_256_pretraining/parquet/one.parquet"
    )
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert file.schema_arrow.names == ["slide_id", "x", "y", "jpeg"] and set(groups[:-1]) <= {64} and groups[-1] <= 64
    rows = file.read().to_pylist()
    assert {(row["x"], row["y"]): row["jpeg"] for row in rows} == cut and {row["slide_id"] for row in rows} == {"one"}
    folder = tmp_path / "tar/patch_256_pretraining/tars"
    with tarfile.open(folder / "one.tiles.tar") as tar, (folder / "one.tiles.manifest.csv").open() as manifest:
        for row in csv.DictReader(manifest):
            member = tar.extractfile(f"{int(row['tile_index']):06d}.jpg")
            assert member is not None and member.read() == cut.pop((int(row["x"]), int(row["y"])))
    assert not cut
    for region in read_regions(tmp_path / "jpeg"):  # with all of the slide tissue, each cell of a region was cut
        assert {tuple(p) for p in reader.lattice.cells_of_region(region.x, region.y)} <= {(t.x, t.y) for t in tiles}


def test_coordinates_are_read_by_hs2p(slides: Path, tmp_path: Path) -> None:
    from hs2p.artifacts import load_tiling_result

    tile([slides / "one.tiff"], tmp_path, small(storage="none"))
    assert not (tmp_path / "patch_256_pretraining").exists()
    stem = tmp_path / "coordinates/one.coordinates"
    result = load_tiling_result(stem.with_suffix(".coordinates.npz"), stem.with_suffix(".coordinates.meta.json"))
    places = list(zip(result.x.tolist(), result.y.tolist(), strict=True))
    assert places == sorted((t.x, t.y) for t in read_tiles(tmp_path))  # x, then y
    assert (result.tile_size_lv0, result.requested_tile_size_px, result.backend) == (64, 64, "openslide")


def test_one_bad_slide_does_not_stop_the_others(slides: Path, tmp_path: Path) -> None:
    broken, coarse = tmp_path / "in/broken.tiff", tmp_path / "in/coarse.tiff"
    write_slide(coarse, [noise(128, 128)], mpp=2.0)
    broken.write_bytes((slides / "two.tiff").read_bytes()[:5000])
    bare = write_slide(tmp_path / "in/bare.tiff", [noise(128, 128)], mpp=None)
    summary = tile([slides, broken, coarse, bare], tmp_path / "out", small(num_workers=2))
    assert summary.exit_code == 2
    statuses = read_status(tmp_path / "out")
    words = {slide_id: status.status for slide_id, status in statuses.items()}
    assert words == {
        "one": "ok", "two": "ok", "glass": "no_tissue", "broken": "failed", "coarse": "failed", "bare": "failed"
    }  # fmt: skip
    assert "openslide" in statuses["broken"].reason and "2" in statuses["coarse"].reason
    assert "spacing_at_level_0" in statuses["bare"].reason
    assert {t.slide_id for t in read_tiles(tmp_path / "out")} == {"one", "two"}
    again = tile([bare], tmp_path / "again", small(spacing_at_level_0=0.5))
    assert again.exit_code == 0 and again.statuses[0].spacing_source == "user"


def test_a_second_run_writes_only_missing_files(slides: Path, tmp_path: Path) -> None:
    tile([slides], tmp_path, small(previews=True))
    before = contents(tmp_path)
    summary = tile([slides], tmp_path, small(previews=True))
    assert contents(tmp_path) == before and summary.reused == 3
    lost = next((tmp_path / "patch_256_pretraining/imgs/two").iterdir())
    content = lost.read_bytes()
    lost.unlink()
    assert tile([slides], tmp_path, small(previews=True)).reused == 2
    assert lost.read_bytes() == content
    after = contents(tmp_path)
    assert set(after) == set(before)
    untouched = {name for name in after if "one" in name or name in ("tiles.csv", "regions.csv", "slides_status.csv")}
    assert all(after[name] == before[name] for name in untouched)


def test_an_interrupted_slide_leaves_no_tile_and_is_repeated(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, cut = storage.encode, []

    def interrupted(pixels: np.ndarray, quality: int) -> bytes:
        cut.append(1)
        if len(cut) == 60:  # within the second slide that has tissue
            raise KeyboardInterrupt
        return encode(pixels, quality)

    monkeypatch.setattr(storage, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tile([slides], tmp_path, small())
    assert [p.name for p in (tmp_path / "patch_256_pretraining/imgs").iterdir()] == ["one"]
    assert {t.slide_id for t in read_tiles(tmp_path)} == {"one"}
    monkeypatch.setattr(storage, "encode", encode)
    (tmp_path / ".partial/two").mkdir(parents=True)  # as a kill would leave it
    (tmp_path / ".partial/two/two_0_0.jpg").write_bytes(b"half")
    first = contents(tmp_path / "patch_256_pretraining")
    tile([slides], tmp_path, small())
    assert first.items() <= contents(tmp_path / "patch_256_pretraining").items()
    tile([slides], tmp_path / "fresh", small())
    for name in ("tiles.csv", "regions.csv", "slides_status.csv"):
        assert (tmp_path / name).read_text() == (tmp_path / "fresh" / name).read_text()


def test_tables_are_rebuilt_from_the_parts(slides: Path, tmp_path: Path) -> None:
    tile([slides], tmp_path, small())
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.csv")}
    for path in tmp_path.glob("*.csv"):
        path.unlink()
    tile([slides / "one.tiff"], tmp_path, small())  # another list: the other slides stay in the tables
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.csv")} == before


def test_tiles_made_with_different_settings_are_not_mixed(slides: Path, tmp_path: Path) -> None:
    tile([slides / "one.tiff"], tmp_path, small())
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"min_tissue=0\.25 \(now 0\.5\)"):
        tile([slides / "two.tiff"], tmp_path, small(min_tissue=0.5))
    with pytest.raises(DataError, match=r"overlap"):
        tile([slides / "two.tiff"], tmp_path, small(overlap=0.5, dry_run=True))
    assert contents(tmp_path) == before
    tile([slides / "one.tiff"], tmp_path, small(num_workers=2, previews=True))  # these may change


def test_a_dry_run_counts_and_writes_nothing(slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    guess = tile([slides], root, small(dry_run=True))
    assert not root.exists()
    assert "GB" in capsys.readouterr().out
    done = tile([slides], root, small())
    assert (guess.tiles, guess.regions, guess.exit_code) == (done.tiles, done.regions, done.exit_code)
    files = [p for p in root.rglob("coordinates/**/*") if p.is_file()] + list(root.rglob("*.jpg"))
    assert guess.files >= len(files) > guess.files - 5  # a slide without tiles writes fewer
    size = sum(p.stat().st_size for p in root.rglob("*.jpg"))
    assert guess.gigabytes * 1e9 == pytest.approx(size, rel=0.2)
    left = tile([slides], root, small(dry_run=True))
    assert (left.reused, left.files, left.gigabytes, left.tiles) == (3, 0, 0.0, done.tiles)


def test_a_random_subset_depends_on_the_seed_alone(slides: Path, tmp_path: Path) -> None:
    def chosen(name: str, **settings) -> list[tuple[str, int, int]]:
        tile([slides], tmp_path / name, small(storage="none", **settings))
        return [(t.slide_id, t.x, t.y) for t in read_tiles(tmp_path / name)]

    everything, five = chosen("all"), chosen("five", max_tiles_per_slide=5)
    assert len(five) == 10 and set(five) < set(everything)
    assert chosen("again", max_tiles_per_slide=5) == five != chosen("other", max_tiles_per_slide=5, seed=1)


def test_list_columns_masks_and_exclusion(slides: Path, tmp_path: Path) -> None:
    mask = np.zeros((391, 517), np.uint8)
    mask[:128, :128] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    one = {"sample_id": "s_1", "image_path": str(slides / "one.tiff"), "mask_path": "mask.png", "patient_id": "p1"}
    two = {"sample_id": "s_2", "image_path": "gone.tiff", "exclude_reason": "pen marks"}
    listed, root = tmp_path / "slides.csv", tmp_path / "root"
    tile([write_list(listed, [one, two])], root, small())
    assert [(t.slide_id, t.x, t.y) for t in read_tiles(root)] == [
        ("s_1", 0, 0), ("s_1", 64, 0), ("s_1", 0, 64), ("s_1", 64, 64)
    ]  # fmt: skip
    statuses = read_status(root)
    assert (statuses["s_2"].status, statuses["s_2"].reason) == ("excluded", "pen marks")
    assert statuses["s_1"].patient_id == "p1" and statuses["s_1"].mask_path == tmp_path / "mask.png"
    before = contents(root / "patch_256_pretraining")
    tile([write_list(listed, [{**one, "patient_id": "p2", "partition": "test"}, two])], root, small())
    assert (read_status(root)["s_1"].patient_id, read_status(root)["s_1"].partition) == ("p2", "test")
    assert contents(root / "patch_256_pretraining") == before
    tile([write_list(listed, [{**one, "exclude_reason": "withdrawn"}, two])], root, small())
    assert read_tiles(root) == [] and read_status(root)["s_1"].status == "excluded"
    tile([write_list(listed, [one, two])], root, small())
    assert len(read_tiles(root)) == 4


def test_another_slide_of_the_same_name_is_tiled_again(slides: Path, tmp_path: Path) -> None:
    path = tmp_path / "in/one.tiff"
    path.parent.mkdir()
    path.write_bytes((slides / "one.tiff").read_bytes())
    root = tmp_path / "root"
    tile([path], root, small())
    moved = path.rename(tmp_path / "one.tiff")
    assert tile([moved], root, small()).reused == 1  # only its path is new
    assert read_status(root)["one"].image_path == moved
    moved.write_bytes((slides / "glass.tiff").read_bytes())
    assert tile([moved], root, small()).reused == 0
    assert read_tiles(root) == [] and not list(root.rglob("*.jpg"))


def test_a_slide_smaller_than_a_region_still_has_tiles(slides: Path, tmp_path: Path) -> None:
    summary = tile([slides / "one.tiff"], tmp_path, small(region_size_px=1024))
    assert summary.regions == 0 and summary.tiles > 0 and summary.exit_code == 0
    reason = read_status(tmp_path)["one"].reason
    assert "no region of 16 x 16 cells fits" in reason and "a smaller region_size_px (now 1024)" in reason
    assert read_regions(tmp_path) == []
    smallest = tile([slides / "one.tiff"], tmp_path / "none", small(tile_size_px=512, region_size_px=512))
    assert smallest.statuses[0].status == "no_tissue" and "smaller than one tile" in smallest.statuses[0].reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"storage": "zip"}, {"overlap": 0.3}, {"region_size_px": 100}, {"tissue_method": "magic"}, {"jpeg_quality": 0},
        {"num_workers": 0}, {"min_tissue": 2.0}, {"max_tiles_per_slide": -1}, {"spacing_at_level_0": -1.0},
    ],
)  # fmt: skip
def test_settings_out_of_range(slides: Path, tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        tile([slides], tmp_path / "root", small(**wrong))
    assert not (tmp_path / "root").exists()


def test_root_must_be_a_folder(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="folder"):
        tile([slides], tmp_path / "file", small())


def test_a_real_slide_without_spacing(real_tissue: Path, tmp_path: Path) -> None:
    slide = real_tissue / "slides/tcga-cr-7395-01a-01-ts1.svs"
    config = {"num_workers": 1, "previews": False, "region_size_px": 1024, "storage": "none"}
    failed = tile([slide], tmp_path / "without", TileConfig(**config))
    assert failed.exit_code == 2 and "spacing_at_level_0" in failed.failures[0].reason
    given = tile([slide], tmp_path / "with", TileConfig(**config, spacing_at_level_0=0.25))
    assert given.exit_code == 0 and given.tiles > 10
    tiles = read_tiles(tmp_path / "with")
    assert {(t.step_lv0, t.spacing_um) for t in tiles} == {(512, 0.500126)}  # its second level is 2.0005 x coarser


def test_a_root_in_use_is_rejected(slides: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    tile([slides / "one.tiff"], root, small())
    before = contents(root)
    with RunLock(root, name=tiling.LOCK).held():
        with pytest.raises(ConfigError, match="is in use by PID"):
            tile([slides], root, small())
        tile([slides], root, small(dry_run=True))
    assert contents(root) == before
    assert tile([slides], root, small()).reused == 1
