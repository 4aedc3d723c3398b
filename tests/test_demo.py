"""The whole chain on the sample slide, with as little training as there can be."""

import json
import re

import pytest

from dino.config.schema import DemoConfig
from dino.demo import run_demo
from dino.errors import ConfigError

pytestmark = pytest.mark.slow  # the same pieces are tested at toy size in tests/report

CONFIG = DemoConfig(patch_steps=1, region_steps=2, device="cpu", num_workers=0)
STAGES = ["tile", "pretrain patch", "extract tiles", "pretrain region", "extract regions", "evaluate", "report"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    return directory, run_demo(directory, CONFIG)


def sources(html):
    return re.findall(r'(?:src|href)="([^"]*)"', html)


def test_summary_holds_the_numbers_of_everything(demo):
    directory, summary = demo
    written = json.loads((directory / "summary.json").read_text())
    assert written["tiles"] == summary.tiles > 100
    assert written["regions"] == len(list((directory / "slides/region_4096_pretraining").glob("*.pt"))) > 10
    assert list(written["seconds"]) == list(written["results"]) == STAGES
    assert set(written["losses"]) == set(written["entropies"]) == set(written["verdicts"]) == {"patch", "region"}
    assert 0 < written["losses"]["patch"] < 2
    for who in ("teacher", "untrained", "pixels"):
        assert 0 <= written["own_place"][who] <= 1
    assert {"histodino", "torch", "timm", "hs2p"} <= set(written["versions"])
    assert written["settings"]["seed"] == 0
    assert len(list((directory / "slides").rglob("*.h5"))) == 1


def test_report_has_every_section_and_fetches_nothing(demo):
    _, summary = demo
    html = summary.report.read_text()
    for heading in ("Slide and tiles", "What the network sees", "Training", "What the features hold", "Attention",
                    "Methods", "Settings"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in html
    assert "proves the plumbing, not the model" in html
    assert len(re.findall(r'src="data:image/(?:jpeg|png|svg)', html)) == 8
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


def test_other_settings_are_refused(demo):
    with pytest.raises(ConfigError, match="belongs to another run"):
        run_demo(demo[0], DemoConfig(patch_steps=3, region_steps=2, device="cpu", num_workers=0))
