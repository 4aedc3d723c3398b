"""Pixels of cells: independent of how they are read, and at the right position."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest
from painted_slide import coordinates, halved, noise, write_slide
from PIL import Image

from dino.errors import ConfigError, DataError
from dino.slides import sample_slide
from dino.slides.lattice import Geometry
from dino.slides.reader import SlideReader, spacing_of
from dino.slides.storage import encode


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pixels = noise(1003, 771)
    return write_slide(tmp_path_factory.mktemp("slides") / "noise.tiff", [pixels, halved(pixels)], mpp=0.25)


@pytest.mark.parametrize("spacing_um", [0.25, 0.5, 0.7, 1.0])
def test_the_cells_of_a_region_equal_the_tiles_at_their_positions(slide: Path, spacing_um: float) -> None:
    """One reader cuts all tiles, another reads a region's cells in another order: equal to the last bit."""
    geometry = Geometry(spacing_um=spacing_um, tile_size_px=32, region_cells=3, overlap=0.5)
    with SlideReader(slide, geometry) as reader:
        tiles = {(x, y): reader.read_cell(x, y) for x, y in reader.lattice.tile_origins().tolist()}
    with SlideReader(slide, geometry) as reader:
        regions = reader.lattice.region_origins().tolist()
        assert regions
        for x, y in reversed(regions):
            for position in reader.lattice.cells_of_region(x, y).tolist():
                np.testing.assert_array_equal(reader.read_cell(*position), tiles[tuple(position)])


def test_cells_at_a_native_spacing_are_not_resampled() -> None:
    with (
        SlideReader(sample_slide(), Geometry(region_cells=4)) as reader,
        openslide.OpenSlide(sample_slide()) as direct,
    ):
        whole = np.asarray(direct.read_region((0, 0), 0, direct.dimensions).convert("RGB"))
        for x, y in reader.lattice.tile_origins()[::13]:
            np.testing.assert_array_equal(reader.read_cell(x, y), whole[y : y + 256, x : x + 256])
        assert reader.spacing_um == 0.499 and reader.spacing_source == "metadata"


@pytest.mark.parametrize(("spacing_um", "read"), [(1.0, 513), (0.7, 359)])
def test_resampled_cells_equal_those_of_pillow(spacing_um: float, read: int) -> None:
    with SlideReader(sample_slide(), Geometry(spacing_um=spacing_um, region_cells=2)) as reader:
        assert reader.lattice.step_lv0 == read
        x, y = reader.lattice.tile_origins()[-1]
        source = reader.slide.read_region((x, y), 0, (read, read))
        expected = Image.fromarray(source).resize((256, 256), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(reader.read_cell(x, y), np.asarray(expected))


def test_cells_are_in_row_major_order(tmp_path: Path) -> None:
    """On a slide whose pixels encode their coordinates, the cells of a region are in row-major order (y, then x)."""
    path = write_slide(tmp_path / "painted.tiff", [coordinates(640, 512, unit=64)], mpp=0.5)
    with SlideReader(path, Geometry(tile_size_px=64, region_cells=4)) as reader:
        assert reader.lattice.region_origins().tolist() == [[0, 0], [256, 0], [0, 256], [256, 256]]
        cells = np.stack(
            [reader.read_cell(*position) for position in reader.lattice.cells_of_region(256, 256)]
        )  # (16, S, S, 3)
    corners = cells[:, 0, 0].reshape(4, 4, 3)  # (row, column, RGB)
    np.testing.assert_array_equal(corners[..., 0], np.tile(np.arange(4, 8), (4, 1)))  # red: x
    np.testing.assert_array_equal(corners[..., 1], np.tile(np.arange(4, 8)[:, None], (1, 4)))  # green: y
    assert (cells == cells[:, :1, :1]).all()  # each cell has one colour


def test_encoding_is_plain_pillow() -> None:
    pixels = noise(64, 64)
    assert Image.open(io.BytesIO(encode(pixels, 90))).size == (64, 64)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    assert encode(pixels, 90) == buffer.getvalue()


def test_sources_of_the_spacing() -> None:
    mpp, power = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, {"openslide.objective-power": "20"}
    assert spacing_of({**mpp, **power}, "s", fallback=1.0) == (0.25, "metadata")
    assert spacing_of(power, "s", fallback=1.0) == (0.5, "objective power")
    assert spacing_of({}, "s", fallback=1.0) == (1.0, "user")
    assert spacing_of(mpp, "s", given=0.3) == (0.3, "user")
    assert spacing_of({"openslide.mpp-x": "oops", **power}, "s") == (0.5, "objective power")
    with pytest.raises(DataError, match=r"'s'.*spacing_at_level_0"):
        spacing_of({"openslide.mpp-x": "0", "openslide.objective-power": "nan"}, "s")
    with pytest.raises(DataError, match="square"):
        spacing_of({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, "s")


def test_a_given_spacing_overrides_without_a_warning(slide: Path, recwarn: pytest.WarningsRecorder) -> None:
    with SlideReader(slide, Geometry(tile_size_px=32), spacing_at_level_0=0.5) as reader:
        assert (reader.spacing_um, reader.spacing_source, reader.lattice.step_lv0) == (0.5, "user", 32)
    assert not recwarn.list


def test_files_that_are_not_slides(tmp_path: Path) -> None:
    text = tmp_path / "notes.svs"
    text.write_text("not a slide")
    for path in (text, tmp_path / "absent.svs"):
        with pytest.raises(DataError, match=path.name):
            SlideReader(path, Geometry())


@pytest.mark.parametrize("cache_mb", [0.0, 0.5, 100.0])
def test_the_cache_changes_no_pixel(slide: Path, cache_mb: float) -> None:
    geometry = Geometry(spacing_um=0.7, tile_size_px=32)
    with SlideReader(slide, geometry) as plain, SlideReader(slide, geometry, cache_mb=cache_mb) as reader:
        for x, y in plain.lattice.tile_origins().tolist():
            np.testing.assert_array_equal(reader.read_cell(x, y), plain.read_cell(x, y))


@pytest.mark.slow
def test_a_small_cache_bounds_the_memory_of_a_slide(tmp_path: Path) -> None:
    """A slide of 34 MB (at 4 bytes per px) is read completely, by a process of its own for each cache."""
    path = write_slide(tmp_path / "large.tiff", [np.full((2944, 2944, 3), 7, np.uint8)])
    program = f"""
from pathlib import Path
from dino.slides.lattice import Geometry
from dino.slides.reader import SlideReader
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
with SlideReader(Path({str(path)!r}), Geometry(tile_size_px=256), cache_mb=CACHE) as reader:
    origins = reader.lattice.tile_origins().tolist()
    reader.read_cell(*origins[0])
    before = resident()
    for x, y in origins:
        reader.read_cell(x, y)
    print(resident() - before)
"""
    grown = {}
    for cache in (1, 100):
        command = [sys.executable, "-c", program.replace("CACHE", str(cache))]
        grown[cache] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown[1] < 10 and grown[100] > grown[1] + 20


def test_fastslide_is_close_to_openslide_on_a_real_slide() -> None:
    pytest.importorskip("fastslide")
    with (
        SlideReader(sample_slide(), Geometry()) as plain,
        SlideReader(sample_slide(), Geometry(), reader="fastslide") as f,
    ):
        for x, y in plain.lattice.tile_origins().tolist()[::17]:
            np.testing.assert_allclose(f.read_cell(x, y).astype(int), plain.read_cell(x, y).astype(int), atol=2)


def test_without_fastslide_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastslide", None)
    with pytest.raises(ConfigError, match=r"histodino\[fastslide\]"):
        SlideReader(sample_slide(), Geometry(), reader="fastslide")
