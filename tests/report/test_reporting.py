"""Reports on a real, if tiny, chain: whole, in parts, and with names that would break a careless page."""

import re
import shutil

import numpy as np
import pytest

from dino.api.own_place import measure_own_place
from dino.api.report_evidence import TiledSlide, crop_evidence, feature_evidence, open_run, region_attention
from dino.api.reporting import report
from dino.config.schema import PatchConfig
from dino.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def patch_run(chain):
    return open_run(chain.patch, PatchConfig)


@pytest.fixture(scope="module")
def slide(chain):
    slide = TiledSlide(chain.root)
    yield slide
    slide.close()


def headings(html):
    return re.findall(r"<h2>(.*?)</h2>", html)


def pictures(html):
    return len(re.findall(r'src="data:image/(?:jpeg|png|svg)', html))


def test_whole_report(chain, tmp_path):
    own_place = {"tiles": 44, "teacher": 0.5, "untrained": 0.25, "pixels": 0.125}
    output = report(
        chain.root, chain.patch, chain.region, tmp_path / "r.html", own_place=own_place, notice="Mind this."
    )
    html = output.read_text()
    assert headings(html) == [
        "Slide and tiles", "What the network sees", "Training", "What the features hold", "Attention", "Methods",
        "Settings",
    ]  # fmt: skip
    assert pictures(html) == 8
    assert "Mind this." in html
    for share in ("50.0%", "25.0%", "12.5%", "2.3%"):
        assert share in html
    links = re.findall(r'(?:src|href|srcset|action)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in html and "<script" not in html and "<iframe" not in html


def test_report_without_a_region_run(chain, tmp_path):
    html = report(chain.root, chain.patch, None, tmp_path / "r.html").read_text()
    assert "Region level" not in html
    assert pictures(html) == 6
    assert "Attention" in headings(html)


def test_report_on_a_region_run_alone(chain, tmp_path):
    html = report(chain.root, None, chain.region, tmp_path / "r.html").read_text()
    assert pictures(html) == 3
    assert "What the features hold" not in headings(html)


def test_report_on_runs_whose_slides_are_gone(chain, tmp_path):
    root = tmp_path / "moved"
    shutil.copytree(chain.root, root)
    status = root / "slides_status.csv"
    status.write_text(re.sub(r"[^,]*\.svs", "/nowhere/<script>.svs", status.read_text()))
    html = report(root, chain.patch, chain.region, tmp_path / "r.html").read_text()
    assert "Slide and tiles" not in headings(html)
    assert "Training" in headings(html)


def test_a_slide_named_like_a_script_stays_text(chain, tmp_path):
    root, name = tmp_path / "root", "<script>alert(1)<&script>"
    shutil.copytree(chain.root, root)
    for table in ("tiles.csv", "regions.csv", "slides_status.csv"):
        text = (root / table).read_text()
        (root / table).write_text(re.sub(r"^CMU-1-Small-Region,", f"{name},", text, flags=re.MULTILINE))
    html = report(root, None, chain.region, tmp_path / "r.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;&amp;script&gt;" in html


def test_nothing_to_report_on_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a ROOT or a run"):
        report(None, None, None, tmp_path / "r.html")
    with pytest.raises(CheckpointError):
        report(None, tmp_path, None, tmp_path / "r.html")


def test_crops_are_those_of_the_first_draws(patch_run):
    crops = crop_evidence(patch_run)
    assert [len(row) for row in crops.crops] == [4] * len(crops.tiles)
    assert [crop.shape[0] for crop in crops.crops[0]] == [32, 32, 16, 16]
    again = crop_evidence(patch_run)
    assert all((a == b).all() for a, b in zip(crops.crops[0], again.crops[0], strict=True))
    assert crops.tiles[0].shape == (64, 64, 3)


def test_features_are_those_of_the_tiles_in_their_places(slide, patch_run):
    features = feature_evidence(slide, patch_run, "cpu")
    assert features.trained.shape == features.untrained.shape == (len(slide.tiles), 24)
    assert features.square == slide.reader.lattice.step_lv0 / 2
    corner = np.array([slide.tiles[0].x, slide.tiles[0].y]) + features.square / 2
    np.testing.assert_allclose(features.squares[0], corner)
    assert len(features.separate) == len(features.pixels) < len(slide.tiles)


def test_a_large_slide_gets_a_coarser_map(slide, patch_run, monkeypatch):
    monkeypatch.setattr("dino.api.report_evidence.LARGEST_MAP", 20)
    features = feature_evidence(slide, patch_run, "cpu")
    assert 0 < len(features.trained) <= 20
    assert features.square >= 2 * slide.reader.lattice.step_lv0


def test_attention_over_regions_lies_on_their_cells(chain, slide):
    from dino.config.schema import RegionConfig

    seen = region_attention(slide, open_run(chain.region, RegionConfig), "cpu")
    assert seen is not None
    assert seen.trained.shape == (3, 2, 4, 4)
    assert (seen.trained.sum((2, 3)) <= 1 + 1e-6).all()
    assert seen.um_per_px == pytest.approx(slide.spacing_um * 64 / 128)  # a cell is 512 / 4 px in the picture


def test_own_place_repeats(chain, patch_run):
    first = measure_own_place(chain.root, patch_run.trained, patch_run.untrained, device="cpu")
    second = measure_own_place(chain.root, patch_run.trained, patch_run.untrained, device="cpu")
    assert first == second
    assert first.tiles > 20
    assert all(0 <= share <= 1 for share in (first.teacher, first.untrained, first.pixels))
    few = measure_own_place(chain.root, patch_run.trained, patch_run.untrained, device="cpu", limit=5)
    assert few.tiles == 5
