"""Reports on any run: several, running ones, without their data, without a log; and where they cannot be written."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dino import api
from dino.api.reporting import report
from dino.cli.main import app
from dino.config.load import load_config
from dino.config.schema import PatchConfig, ReportConfig, TileConfig
from dino.errors import ConfigError, DataError
from dino.report import curves, figures, montages, style
from dino.report.compared import differing_settings
from dino.slides import sample_slide
from tests.report.conftest import SMALL

JPEG = style.image_to_jpeg(np.zeros((8, 8, 3), dtype=np.uint8))
VOID = {"meta", "link", "img", "source", "br", "input", "hr"}


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    """Figures are not drawn, which takes most of the time of a report, except in the tests marked by their name."""
    if "drawn" in request.node.name:
        return
    for module, name in (
        (montages, "montage"),
        (figures, "tiling_map"),
        (figures, "feature_maps"),
        (curves, "_figure"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: JPEG)


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects headings, links and the tags inside each element."""

    def __init__(self, html):
        super().__init__()
        self.open, self.links, self.headings, self.text = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def read(path):
    html = path.read_text()
    page = Page(html)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"@import|url\(|<script|<iframe", html)
    assert len(html) < 10_000_000
    return page


def words(page):
    return " ".join(" ".join(page.text).split())


def test_report_of_a_run_finds_its_data(chain):
    page = read(report([chain.patch]))
    assert {"Slide and tiles", "Training crops", "Training", "Tile features", "Attention"} <= {*page.headings}
    assert "Left out" not in words(page)
    assert (chain.patch / "report.html").exists()
    (chain.patch / "report.html").unlink()


def test_runs_of_one_level_are_drawn_over_one_another(chain, tmp_path):
    other = shutil.copytree(chain.patch, tmp_path / "other")
    settings = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"seed: 0", "seed: 7", settings, count=1))
    page = read(report([chain.patch, other, chain.region], chain.root, tmp_path / "r.html"))
    assert "Comparison: patch level" in page.headings and "Comparison: region level" not in page.headings
    found = words(page)
    assert "Settings that differ" in found and re.search(r"seed 0 7", found)
    assert found.count("Dissimilar tiles") == 2  # neighbours of both patch-level runs


def test_settings_that_change_nothing_are_not_compared(chain):
    run = report_data(chain.patch)
    other = report_data(chain.patch, **{"data_dir": "/elsewhere", "logging.every_steps": 5, "optim.lr": 1.0})
    assert differing_settings([run, other]) == {"optim.lr": [run.settings["optim.lr"], 1.0]}


def report_data(path, **changes):
    from dataclasses import replace

    from dino.report.gather import run_data
    from dino.train.run_folder import RunReader

    data = run_data(RunReader(path), "run", None)
    return replace(data, settings={**data.settings, **changes})


def test_a_running_run_without_checkpoint_and_log(chain, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "identity.json"):
        shutil.copy(chain.patch / name, run)
    status = {
        "state": "running",
        "step": 3,
        "total_steps": 900,
        "eta_seconds": 7200,
        "warnings": ["the <disk> is full"],
    }
    (run / "status.json").write_text(json.dumps(status))
    page = read(report([run], output=tmp_path / "r.html"))
    found = words(page)
    assert "Step 3 of 900; not evaluated yet. About 2 hours are left." in found
    assert "the <disk> is full" in found and "Left out" in found and "Slide and tiles" in page.headings
    assert "not recorded" in found
    (run / "status.json").write_text("{")  # torn
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"ste')
    read(report([run], output=tmp_path / "r.html"))


def test_a_run_whose_data_are_gone(chain, tmp_path):
    run = shutil.copytree(chain.patch, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(chain.root), "/nowhere"))
    page = read(report([run], output=tmp_path / "r.html"))
    assert "Training" in page.headings and "Tile features" not in page.headings
    assert "found no such folder; name ROOT if it was moved" in words(page)
    page = read(report([run], chain.root, tmp_path / "r.html"))
    assert "Tile features" in page.headings


def test_tiles_that_are_read_from_slides_are_drawn(tmp_path):
    root, run = tmp_path / "root", tmp_path / "run"
    tiling = TileConfig(spacing_um=2.0, tile_size_px=64, region_size_px=256, num_workers=1, previews=False)
    tiling.storage = "none"
    api.tile([sample_slide()], root, tiling)
    patch = {
        **SMALL, "data_dir": str(root), "output_dir": str(run), "model.arch": "vit:dim=24,depth=2,heads=3",
        "aug.global_crops_size": 32, "aug.local_crops_size": 16, "aug.local_crops_number": 2, "logging.report": True,
    }  # fmt: skip
    api.pretrain(load_config(PatchConfig, overrides=patch))
    page = read(run / "report.html")  # written at the end of the run
    assert {"Training crops", "Tile features", "Attention"} <= {*page.headings}


@pytest.fixture
def flat_run(tmp_path):
    """A run on a folder of images of four slides, without tables."""
    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"slide{i % 4}_{i * 48}_0.png")
    patch = {
        **SMALL, "data_dir": str(folder), "output_dir": str(tmp_path / "run"),
        "model.arch": "vit:dim=24,depth=2,heads=3",
        "aug.global_crops_size": 32, "aug.local_crops_size": 16, "aug.local_crops_number": 2,
    }  # fmt: skip
    api.pretrain(load_config(PatchConfig, overrides=patch))
    return tmp_path / "run"


def test_neighbours_of_a_folder_of_images(flat_run):
    (flat_run / "quarantine.csv").write_text("path,reason\nslide0_<b>.png,torn\n")
    page = read(report([flat_run]))
    found = words(page)
    assert "neighbours among 20 tiles of 4 patients; neighbours are of other patients" in found
    assert "slide0_<b>.png torn" in found and "samples that could not be read" in found


def test_damaged_results_are_said_and_skipped(chain, tmp_path):
    run = shutil.copytree(chain.patch, tmp_path / "run")
    (run / "linear_l.json").write_text(json.dumps({"evaluation": "linear", "labels": "l.csv"}))
    (run / "knn_l.json").write_text('{"evaluation": ')
    page = read(report([run], output=tmp_path / "r.html"))
    assert "linear_l.json is not a complete result" in words(page) and "knn_l.json is damaged" in words(page)
    assert "Scores" not in page.headings


def test_study_section(chain, tmp_path):
    root = shutil.copytree(chain.root, tmp_path / "root")
    table = (root / "slides_status.csv").read_text().splitlines()
    columns = table[0].split(",")
    row = dict.fromkeys(columns, "") | {"slide_id": "blurred", "status": "excluded", "reason": "out of focus"}
    row |= {"tiles": "0", "regions": "0", "width": "0", "height": "0", "patient_id": "P9"}
    (root / "slides_status.csv").write_text("\n".join([*table, ",".join(row[name] for name in columns)]) + "\n")
    found = words(read(report([chain.patch], root, tmp_path / "r.html")))
    assert "blurred excluded out of focus" in found
    assert re.search(r"used for pretraining 1 not recorded \d+ \d+ excluded 1 1 0 0", found)


def test_energy_is_the_logged_power_times_the_processes(chain):
    from dataclasses import replace

    from dino.report.study import energy_kwh

    run = report_data(chain.patch)
    assert energy_kwh(run) is None
    lines = [{"step": i, "seconds": 1800.0, "gpu_watts": 500.0} for i in (1, 2)]
    assert energy_kwh(replace(run, lines=lines, status={"processes": 4})) == pytest.approx(2.0)


def test_no_permission_to_write(chain, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="expected to write to"):
        report([chain.patch], output=tmp_path / "file" / "r.html")


def test_a_report_without_matplotlib_is_said_and_the_run_finishes(chain, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        report([chain.patch], output=tmp_path / "r.html")
    from dino.api.ending import write_report

    write_report(chain.patch, api_config(chain))
    assert "no report" in capsys.readouterr().out and not (chain.patch / "report.html").exists()


def test_a_report_without_openslide_reads_tile_files(chain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    page = read(report([chain.patch], output=tmp_path / "r.html"))
    assert "openslide-python is required" in words(page)
    assert {"Slides", "Training crops", "Tile features"} <= {*page.headings} and "Slide and tiles" not in page.headings


def test_a_fault_in_the_report_is_a_warning(chain, monkeypatch, capsys):
    from dino.api import reporting
    from dino.api.ending import write_report

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reporting, "report", fail)
    write_report(chain.patch, api_config(chain))
    assert "no report: RuntimeError: out of memory" in capsys.readouterr().out


def api_config(chain):
    from dino.train.run_folder import RunReader

    return RunReader(chain.patch).config()


def test_arguments_are_told_apart(chain, tmp_path):
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(
        app, ["report", str(tmp_path / "out"), str(chain.region), str(chain.root), str(chain.patch), "tiles=20"]
    )
    assert result.exit_code == 0, result.output
    page = read(tmp_path / "out" / "report.html")
    assert "Region level" in words(page) and "Patch level" in words(page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected at least one RUN, found no arguments"),
        (["missing"], "found missing, which is not there"),
        (["RUN", "a.html", "b.html"], "expected one OUT"),
        (["RUN", "ROOT", "ROOT"], "expected one ROOT"),
        (["RUN", "slide=nothing"], "expected slide=nothing among the slides"),
    ],
)
def test_wrong_arguments_end_with_one_line(chain, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {"RUN": str(chain.patch), "ROOT": str(chain.root)}
    result = CliRunner().invoke(app, ["report", *(named.get(word, word) for word in arguments)])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_settings_of_a_report():
    with pytest.raises(ConfigError, match="unknown setting"):
        load_config(ReportConfig, overrides=["slied=a"])
