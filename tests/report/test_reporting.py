"""Reports on a small slide and two short runs: complete, in parts, and with names that contain markup."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from dino import api
from dino.api.levels import build_level
from dino.api.reporting import report
from dino.config.schema import WordsConfig
from dino.errors import ConfigError
from dino.report.gather import feature_data, first_crops, load_run, region_attention
from dino.report.self_retrieval import measure_self_retrieval
from dino.report.slides import TiledRoot, TiledSlide

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def patch_run(chain):
    return load_run(chain.patch)


@pytest.fixture(scope="module")
def slide(chain):
    slide = TiledSlide(TiledRoot(chain.root))
    yield slide
    slide.close()


def headings(html):
    return re.findall(r"<h2>(.*?)</h2>", html)


def count_figures(html):
    return len(re.findall(r'src="data:image/(?:jpeg|png|svg)', html))


def test_complete_report(chain, tmp_path):
    own_place = {"tiles": 44, "teacher": 0.5, "untrained": 0.25, "pixels": 0.125}
    output = report(
        [chain.patch, chain.region], chain.root, tmp_path / "r.html", own_place=own_place, notice="A notice."
    )
    html = output.read_text()
    assert headings(html) == [
        "Slide and tiles", "Training crops", "Training", "Tile features", "Attention", "Study",
        "Methods", "Settings",
    ]  # fmt: skip
    assert count_figures(html) == 9
    assert "A notice." in html
    for share in ("50.0%", "25.0%", "12.5%", "2.3%"):
        assert share in html
    links = re.findall(r'(?:src|href|srcset|action)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in html and "<script" not in html and "<iframe" not in html


def test_scores_are_shown_with_their_marks(chain, tmp_path):
    run = shutil.copytree(chain.patch, tmp_path / "run")
    scores = {"knn_20_accuracy": 0.8125}
    about = {"labels": "l.csv", "queries": 9, "references": 5, "step": 2, "selection": {"seen_rows": 4}}
    result = {"model": scores, "initial_weights": scores, "random_initialization": scores, "about": about}
    (run / "knn_l.json").write_text(json.dumps(result))
    (run / "knn_old.json").write_text(json.dumps({"model": scores, "untrained": scores}))
    (run / "knn_damaged.json").write_text("{")
    html = report([run], None, tmp_path / "r.html").read_text()
    assert "Scores" in headings(html) and html.count("0.8125") == 5 and "knn_damaged.json is damaged" in html
    assert "initial weights" in html and "random initialization" in html and "Baseline: untrained" not in html
    assert "optimistic: test rows that chose the checkpoint" in html and "4 of 9" in html
    assert "These scores are optimistic" in html


def test_words_are_shown_with_their_names(chain, tmp_path):
    root = shutil.copytree(chain.root, tmp_path / "root")
    api.find_words(str(chain.patch), root, WordsConfig(count=3))
    (root / "words_patch" / "words.csv").write_text("word,name\n2,<b>keratin</b>\n")
    html = report([chain.patch], root, tmp_path / "r.html").read_text()
    assert "Words" in headings(html)
    assert "3 words, each with typical tiles: Word 1, &lt;b&gt;keratin&lt;/b&gt;, Word 3." in html
    assert "<b>keratin" not in html
    (root / "words_patch" / "words.csv").write_text("no table")
    html = report([chain.patch], root, tmp_path / "r.html").read_text()
    assert "Words" not in headings(html) and "expected columns word and name" in html


def test_report_without_a_region_run(chain, tmp_path):
    html = report([chain.patch], chain.root, tmp_path / "r.html").read_text()
    assert "Region level" not in html
    assert count_figures(html) == 7
    assert "Attention" in headings(html)


def test_report_on_a_region_run_alone(chain, tmp_path):
    html = report([chain.region], chain.root, tmp_path / "r.html").read_text()
    assert count_figures(html) == 4
    assert "Tile features" not in headings(html)


def test_report_on_runs_whose_slides_were_moved(chain, tmp_path):
    root = tmp_path / "moved"
    shutil.copytree(chain.root, root)
    status = root / "slides_status.csv"
    status.write_text(re.sub(r"[^,]*\.svs", "/nowhere/<script>.svs", status.read_text()))
    html = report([chain.patch, chain.region], root, tmp_path / "r.html").read_text()
    assert "Slide and tiles" not in headings(html)
    assert "Training" in headings(html)


def test_slide_id_with_markup_is_escaped(chain, tmp_path):
    root, name = tmp_path / "root", "<script>alert(1)<&script>"
    shutil.copytree(chain.root, root)
    for table in ("tiles.csv", "regions.csv", "slides_status.csv"):
        text = (root / table).read_text()
        (root / table).write_text(re.sub(r"^CMU-1-Small-Region,", f"{name},", text, flags=re.MULTILINE))
    html = report([chain.region], root, tmp_path / "r.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;&amp;script&gt;" in html


def test_report_needs_a_root_or_a_run(tmp_path):
    with pytest.raises(ConfigError, match="expected a run or a ROOT"):
        report([], None, tmp_path / "r.html")
    with pytest.raises(ConfigError, match="expected a run at"):
        report([tmp_path], None, tmp_path / "r.html")


def test_crops_are_those_of_the_first_draws(patch_run):
    level = build_level(patch_run.config)
    crops = first_crops(level, 0)
    assert [len(row) for row in crops.crops] == [4] * len(crops.tiles)
    assert [crop.shape[0] for crop in crops.crops[0]] == [32, 32, 16, 16]
    again = first_crops(level, 0)
    assert all((a == b).all() for a, b in zip(crops.crops[0], again.crops[0], strict=True))
    assert crops.tiles[0].shape == (64, 64, 3)


def test_features_are_those_of_the_tiles_at_their_positions(slide, patch_run):
    features = feature_data("run", patch_run, None, slide.read_map(), CPU)
    assert features.map.trained.shape == features.map.untrained.shape == (len(slide.tiles), 24)
    assert features.map.square == slide.reader.lattice.step_lv0 / 2
    corner = np.array([slide.tiles[0].x, slide.tiles[0].y]) + features.map.square / 2
    np.testing.assert_allclose(features.map.corners[0], corner)
    assert len(features.trained) == len(features.tiles.pixels) < len(slide.tiles)


@pytest.mark.parametrize("limit", [3, 5, 20])
def test_a_coarser_map_keeps_every_nth_row_and_column(slide, limit):
    tiles, corners, square = slide.map_tiles(limit)
    stride = round(square / slide.reader.lattice.step_lv0)
    kept = [t for t in slide.tiles if t.x % square == 0 and t.y % square == 0]
    assert tiles == kept and 0 < len(kept) <= limit
    assert (corners == [(t.x, t.y) for t in kept]).all()
    coarse = square * (stride - 1) / stride  # the next finer map has too many tiles
    assert sum(t.x % coarse == 0 and t.y % coarse == 0 for t in slide.tiles) > limit


def test_attention_over_regions_has_one_weight_per_cell(chain, slide):
    attention = region_attention(slide, load_run(chain.region), CPU)
    assert attention is not None
    assert attention.trained.shape == (3, 2, 4, 4)
    assert (attention.trained.sum((2, 3)) <= 1 + 1e-6).all()
    assert attention.um_per_px == pytest.approx(slide.spacing_um * 64 / 128)  # a cell is 512 / 4 px in the picture


def test_self_retrieval_is_reproducible(chain, patch_run):
    first = measure_self_retrieval(chain.root, patch_run.trained, patch_run.untrained, device="cpu")
    second = measure_self_retrieval(chain.root, patch_run.trained, patch_run.untrained, device="cpu")
    assert first == second
    assert first.tiles > 20
    assert all(0 <= share <= 1 for share in (first.teacher, first.untrained, first.pixels))
    few = measure_self_retrieval(chain.root, patch_run.trained, patch_run.untrained, device="cpu", limit=5)
    assert few.tiles == 5
