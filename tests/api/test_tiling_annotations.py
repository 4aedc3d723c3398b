"""`tile` with regions of interest: which tiles are cut, their classes, and what a changed file does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from painted_slide import noise, write_slide
from PIL import Image

from dino.api.tiling import tile
from dino.config.schema import TileConfig
from dino.errors import ConfigError, DataError
from dino.slides import sample_slide
from dino.slides.tables import read_regions, read_status, read_tiles

SMALL = {"tile_size_px": 64, "region_size_px": 128, "num_workers": 1, "previews": False}
TUMOUR = [[0, 0], [256, 0], [256, 192], [0, 192], [0, 0]]  # 4 x 3 tiles
ARTEFACT = [[96, 0], [192, 0], [192, 64], [96, 64], [96, 0]]  # half of the second tile, and the third


def small(**settings) -> TileConfig:
    return TileConfig(**{**SMALL, **settings})


def annotate(path: Path, **polygons: list) -> Path:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, ring in polygons.items()
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One annotated slide of tissue, one without annotations, and their list."""
    for seed, name in enumerate(("one", "two")):
        write_slide(tmp_path / f"{name}.tiff", [noise(512, 384, seed)])
    annotate(tmp_path / "one.geojson", tumour=TUMOUR, artefact=ARTEFACT)
    (tmp_path / "slides.csv").write_text(
        "sample_id,image_path,annotation_path\none,one.tiff,one.geojson\ntwo,two.tiff,\n"
    )
    return tmp_path


def places(root: Path, slide: str = "one") -> set[tuple[int, int]]:
    return {(t.x // 64, t.y // 64) for t in read_tiles(root) if t.slide_id == slide}


INSIDE = {(x, y) for x in range(4) for y in range(3)}
ALL = {(x, y) for x in range(8) for y in range(6)}


@pytest.mark.parametrize(
    ("settings", "one", "two"),
    [
        ({}, ALL, ALL),
        ({"roi_include": ["tumour"]}, INSIDE, set()),
        ({"roi_include": ["tumour"], "roi_exclude": ["artefact"]}, INSIDE - {(2, 0)}, set()),
        ({"roi_include": ["*"], "roi_exclude": ["artefact"], "min_roi": 0.6}, INSIDE - {(1, 0), (2, 0)}, set()),
        ({"roi_exclude": ["artefact"]}, ALL - {(2, 0)}, ALL),
    ],
)
def test_tiles_lie_in_the_region_of_interest(folder: Path, settings: dict, one: set, two: set) -> None:
    root = folder / "root"
    assert tile([folder / "slides.csv"], root, small(**settings)).exit_code == 0
    assert places(root) == one and places(root, "two") == two
    cut = {path.stem for path in (root / "patch_256_pretraining/imgs/one").iterdir()}
    assert cut == {f"one_{64 * x}_{64 * y}" for x, y in one}
    classes = {(t.x // 64, t.y // 64): (t.annotation, t.annotation_fraction) for t in read_tiles(root)[: len(one)]}
    expected = dict.fromkeys(INSIDE, ("tumour", 1.0)) | {(2, 0): ("artefact", 1.0)}
    assert classes == {place: expected.get(place, ("", 0.0)) for place in one}
    for region in read_regions(root):
        if region.slide_id == "one" and "tumour" in settings.get("roi_include", []):
            assert region.x <= 128 and region.y <= 128  # at least half of its area
    if not two:
        status = read_status(root)["two"]
        assert (status.status, status.tiles) == (
            "no_tissue",
            0,
        ) and "region of interest (classes: none)" in status.reason


def test_a_changed_file_is_tiled_again(folder: Path) -> None:
    root, config = folder / "root", small(roi_include=["tumour"])
    tile([folder / "slides.csv"], root, config)
    assert tile([folder / "slides.csv"], root, config).reused == 2
    before = folder.joinpath("one.geojson").stat().st_size
    annotate(folder / "one.geojson", tumour=[[0, 0], [128, 0], [128, 192], [0, 192], [0, 0]], artefact=ARTEFACT)
    assert before == folder.joinpath("one.geojson").stat().st_size
    assert tile([folder / "slides.csv"], root, config).reused == 1
    assert places(root) == {(x, y) for x, y in INSIDE if x < 2}
    (folder / "moved").mkdir()
    (folder / "one.geojson").rename(folder / "moved/one.geojson")
    list_text = (folder / "slides.csv").read_text().replace("one.geojson", "moved/one.geojson")
    (folder / "slides.csv").write_text(list_text)
    assert tile([folder / "slides.csv"], root, config).reused == 2
    with pytest.raises(DataError, match="tiled with roi_include"):
        tile([folder / "slides.csv"], root, small(roi_include=["artefact"]))


def test_a_root_of_an_earlier_version_had_no_region_of_interest(folder: Path) -> None:
    root = folder / "root"
    tile([folder / "two.tiff"], root, small())
    tiling = json.loads((root / "tiling.json").read_text())
    tiling["settings"] = {k: v for k, v in tiling["settings"].items() if "roi" not in k}
    (root / "tiling.json").write_text(json.dumps(tiling))
    before = (root / "tiles.csv").read_bytes()
    assert tile([folder / "two.tiff"], root, small()).reused == 1 and (root / "tiles.csv").read_bytes() == before
    with pytest.raises(DataError, match=r"tiled with roi_exclude=\[\] "):
        tile([folder / "slides.csv"], root, small(roi_exclude=["artefact"]))


def test_a_bad_file_fails_its_slide_only(folder: Path) -> None:
    (folder / "one.geojson").write_text("{")
    summary = tile([folder / "slides.csv"], folder / "root", small(roi_exclude=["artefact"]))
    assert summary.exit_code == 2
    assert [s.status for s in summary.statuses] == ["failed", "ok"] and "one.geojson" in summary.statuses[0].reason


def test_what_the_user_is_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match="column annotation_path"):
        tile([folder / "one.tiff"], folder / "root", small(roi_include=["tumour"]))
    (folder / "slides.csv").write_text("sample_id,image_path,annotation_path\none,one.tiff,none.geojson\n")
    command = [sys.executable, "-m", "dino", "tile", str(folder / "slides.csv"), str(folder / "root")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "line 2: expected a file as annotation_path, found none at" in result.stderr
    (folder / "slides.csv").write_text("sample_id,image_path,annotation_path\none,one.tiff,one.geojson\n")
    command += ["roi_include=[Tumour,artefact]", "tile_size_px=64", "region_size_px=128", "dry_run=true"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no annotation has a class 'Tumour'" in " ".join((result.stdout + result.stderr).split())


def test_the_preview_of_a_real_slide_shows_the_outlines(tmp_path: Path) -> None:
    """On the sample slide: an ellipse, as QuPath exports it."""
    angles = np.linspace(0, 2 * np.pi, 200)
    ring = np.stack([1100 + 700 * np.cos(angles), 1500 + 900 * np.sin(angles)], axis=1)
    annotate(tmp_path / "a.geojson", dermis=ring.tolist())
    (tmp_path / "slides.csv").write_text(f"sample_id,image_path,annotation_path\na,{sample_slide()},a.geojson\n")
    config = TileConfig(num_workers=1, roi_include=["dermis"], storage="none", min_roi=1.0)
    tile([tmp_path / "slides.csv"], tmp_path / "root", config)
    tiles = read_tiles(tmp_path / "root")
    corners = np.array([[(t.x + dx, t.y + dy) for dx in (0, 256) for dy in (0, 256)] for t in tiles], float)
    radii = np.hypot((corners[..., 0] - 1100) / 700, (corners[..., 1] - 1500) / 900)
    assert len(tiles) > 10 and radii.max() <= 1 and {t.annotation for t in tiles} == {"dermis"}
    pixels = np.asarray(Image.open(tmp_path / "root/coordinates/previews/annotations/a.jpg")).astype(int)
    red = (pixels[..., 0] > 180) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)
    assert red[1500, 390:410].any() and red[1500, 1790:1810].any() and not red[1500, 600:1600].any()
