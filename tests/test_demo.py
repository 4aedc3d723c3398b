"""The demo with one and two steps of training."""

import json
import re

import pytest

from dino.config.schema import DemoConfig
from dino.demo import run_demo
from dino.errors import ConfigError

pytestmark = pytest.mark.slow  # tests/report tests the same parts at a smaller size

CONFIG = DemoConfig(patch_steps=1, region_steps=2, device="cpu", num_workers=0)
STAGES = [
    "tile",
    "pretrain patch",
    "extract tiles",
    "words",
    "pretrain region",
    "extract regions",
    "evaluate",
    "report",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    return directory, run_demo(directory, CONFIG)


def sources(html):
    return re.findall(r'(?:src|href)="([^"]*)"', html)


def test_summary_has_the_results_of_every_stage(demo):
    directory, summary = demo
    written = json.loads((directory / "summary.json").read_text())
    assert written["tiles"] == summary.tiles > 100
    assert written["regions"] == len(list((directory / "slides/region_4096_pretraining").glob("*.pt"))) > 10
    assert list(written["seconds"]) == list(written["results"]) == STAGES
    assert set(written["losses"]) == set(written["entropies"]) == set(written["verdicts"]) == {"patch", "region"}
    assert 0 < written["losses"]["patch"] < 2
    for network in ("teacher", "untrained", "pixels"):
        assert 0 <= written["own_place"][network] <= 1
    assert {"histodino", "torch", "timm", "hs2p"} <= set(written["versions"])
    assert written["settings"]["seed"] == 0
    folders = [path.parent.name for path in sorted((directory / "slides").rglob("*.h5"))]
    assert folders == ["features_patch", "slide_features"]


def test_report_has_every_section_and_loads_nothing(demo):
    _, summary = demo
    html = summary.report.read_text()
    for heading in ("Slide and tiles", "Training crops", "Training", "Tile features", "Words", "Attention", "Methods",
                    "Settings"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in html
    assert "does not evaluate the method" in html
    assert len(re.findall(r'src="data:image/(?:jpeg|png|svg)', html)) == 11
    assert all(source.startswith(("data:", "#")) for source in sources(html))
    assert len(html) < 4_000_000


def test_running_again_changes_nothing(demo):
    directory, summary = demo
    checkpoint = directory / "patch/checkpoints/last.pt"
    before = checkpoint.stat().st_mtime_ns
    again = run_demo(directory, CONFIG)
    assert checkpoint.stat().st_mtime_ns == before
    assert again.own_place == summary.own_place
    assert again.losses == summary.losses
    assert again.seconds["pretrain patch"] == summary.seconds["pretrain patch"]


def test_other_settings_need_another_folder(demo):
    with pytest.raises(ConfigError, match="belongs to another run"):
        run_demo(demo[0], DemoConfig(patch_steps=3, region_steps=2, device="cpu", num_workers=0))
