"""``dino view`` and ``dino geojson`` as commands: wrong input is one line and exit code 2; a viewer that serves."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from dino import api, environment
from dino.cli.main import app
from dino.config.load import load_config
from dino.config.schema import ExportConfig, ViewConfig
from dino.errors import ConfigError, DataError
from dino.extraction.catalogue import read_catalogue
from dino.models.weights import load_backbone_file
from dino.viewer.attention import AttentionFiles
from dino.viewer.models import RunModels
from dino.viewer.runs import Runs, sort_runs
from tests.tiny_models import save_checkpoint
from tests.viewer.conftest import DIM, write_features, write_grids, write_maps


def _view(root, *runs, **settings):
    api.view(root, list(runs), load_config(ViewConfig, overrides={"port": 0, **settings}))


def _fails(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and lines[-1].startswith("error: ") and len(lines) <= 2, result.output
    return lines[-1]


def test_a_port_in_use(painted):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = _fails("view", painted, f"port={port}")
    assert f"expected to serve on port {port} of 127.0.0.1, found that it is in use; pass another port=" in line


def test_an_address_that_is_not_of_this_computer(painted):
    with pytest.raises(
        ConfigError, match=r"expected to serve on port \d+ of 203.0.113.7, found .*; pass another host="
    ):
        _view(painted, host="203.0.113.7", port=1)


def test_no_root(tmp_path):
    assert "expected the ROOT of `dino tile` at" in _fails("view", tmp_path / "nowhere")
    assert "expected " in _fails("view", tmp_path)
    assert "expected ROOT, found no arguments" in _fails("view")


def test_no_features_of_the_run(painted, features):
    with pytest.raises(
        DataError, match=r"expected features of 'patch' in .*features_patch, found none \(encoders: ran"
    ):
        _view(painted, "runs/patch")


def test_features_of_other_slides(painted, features, tmp_path):
    folder = painted / "features_foreign"
    folder.mkdir()
    (folder / "elsewhere.h5").write_bytes(b"")
    try:
        with pytest.raises(DataError, match="expected features of the slides of .*, found none of them"):
            _view(painted, "foreign")
    finally:
        (folder / "elsewhere.h5").unlink()
        folder.rmdir()


def test_features_of_another_model_than_the_run(painted, tmp_path):
    """The model is loaded while the server runs already; the server ends, with one line."""
    write_features(painted, "model")
    folder = painted / "features_model"
    (folder / "extract.json").write_text(json.dumps({"fingerprint": "0" * 64}))
    try:
        line = _fails("view", painted, save_checkpoint(tmp_path / "model.pt"), "port=0")
    finally:
        shutil.rmtree(folder)
    assert "expected features of" in line and "found those of another model (000000000000, not " in line


def test_maps_of_another_model_than_the_run(painted, catalogue, tmp_path):
    """Features without a record cannot tell; the run can."""
    pytest.importorskip("tifffile")
    write_features(painted, "model")
    write_maps(catalogue, painted / "attention_model")
    (painted / "attention_model" / "attention.json").write_text(json.dumps({"model": "a", "fingerprint": "0" * 64}))
    try:
        line = _fails("view", painted, save_checkpoint(tmp_path / "model.pt"), "port=0")
    finally:
        shutil.rmtree(painted / "features_model")
        shutil.rmtree(painted / "attention_model")
    assert "expected maps of the model of" in line and "now 000000000000 (a)" in line


@pytest.fixture
def two_levels(painted, features, tmp_path):
    """A ROOT of its own with features and grids of a level-1 model, whose fingerprint is recorded, and that model."""
    root = shutil.copytree(painted, tmp_path / "data")
    level_1 = save_checkpoint(tmp_path / "runs" / "patch" / "checkpoints" / "last.pt").parents[1]
    fingerprint = load_backbone_file(level_1).fingerprint
    record = {"model": str(level_1), "fingerprint": fingerprint, "precision": "fp32", "transform": None}
    (root / "features_random").rename(root / "features_patch")
    write_grids(root, "patch")
    for folder in ("features_patch", "region_4096_pretraining_patch"):
        (root / folder / "extract.json").write_text(json.dumps(record))
    return root, level_1, record


def _level_2(folder, grids):
    """A level-2 run, whose grids are recorded as in runs; None for one that records nothing."""
    more = {} if grids is None else {"grids": grids}
    run = save_checkpoint(folder / "checkpoints" / "last.pt", "region", DIM, **more).parents[1]
    if grids is not None:
        (run / "identity.json").write_text(json.dumps({"level": "region", "grids": grids}))
    return run


def test_level_2_without_its_level_1_is_one_line(two_levels, tmp_path):
    """Whatever says what it is of: a run folder, its checkpoint, or nothing at all."""
    root, _, record = two_levels
    other = record | {"fingerprint": "0" * 64, "model": "runs/other"}
    run = _level_2(tmp_path / "region", other)
    for given in (run, run / "checkpoints" / "last.pt"):
        assert _fails("view", root, given) == (
            f"error: expected features of runs/other (000000000000), the level-1 model of the level-2 run {given}, in "
            f"{root}, found those of patch; run `dino extract runs/other {root}`, then "
            f"`dino view {root} runs/other {given}`"
        )
    unknown = _level_2(tmp_path / "unknown", None)
    line = (
        f"error: expected the level-1 run whose features {unknown} reads, which is of level 2 and has no record of it"
    )
    assert _fails("view", root, unknown) == f"{line}, found none; pass it first: dino view {root} LEVEL1 {unknown}"
    shutil.rmtree(root / "features_patch")
    assert "found those of none; run `dino extract runs/other" in _fails("view", root, run)


def test_level_2_where_level_1_is_expected_is_one_line(two_levels, tmp_path):
    """A checkpoint that has the name of features: the server has started already when it is loaded."""
    root, _, _ = two_levels
    file = save_checkpoint(tmp_path / "patch.pt", "region", DIM)
    assert _fails("view", root, file, "port=0") == (
        f"error: expected the level-1 run that made the features in {root / 'features_patch'}, found {file}, which is "
        f"of level 2; pass the level-1 run first: dino view {root} LEVEL1 {file}"
    )
    assert _fails("words", file, root) == (
        f"error: expected the level-1 run that made the features of tiles in {root}, found {file}, which is of "
        "level 2; pass the level-1 run"
    )


def test_level_2_without_grids_or_twice_is_one_line(two_levels, tmp_path):
    root, level_1, record = two_levels
    run, again = _level_2(tmp_path / "region", record), _level_2(tmp_path / "again", record)
    assert _fails("view", root, level_1, run, again) == (
        f"error: expected at most one level-2 run of the features of 'patch', found {run} and {again}; pass one of them"
    )
    other = {**record, "precision": "bf16"}
    (root / "region_4096_pretraining_patch" / "extract.json").write_text(json.dumps(other))
    assert f"expected feature grids of {level_1} (" in (line := _fails("view", root, level_1, run))
    assert "precision fp32, now bf16" in line
    shutil.rmtree(root / "region_4096_pretraining_patch")
    assert _fails("view", root, level_1, run) == (
        f"error: expected the features of regions in {root} for the level-2 run {run}, found none; extract them with "
        f"the level-1 run: dino extract LEVEL1 {root}"
    )


def test_maps_of_another_level_2_model_than_the_run(two_levels, tmp_path):
    """Maps of level 1 alone are shown with any level-2 run."""
    pytest.importorskip("tifffile")
    root, level_1, record = two_levels
    run, maps = str(_level_2(tmp_path / "region", record)), root / "attention_patch"
    catalogue = read_catalogue(root)
    write_maps(catalogue, maps)
    (maps / "attention.json").write_text(json.dumps(record | {"region": {"model": "b", "fingerprint": "1" * 64}}))
    line = _fails("view", root, level_1, run, "port=0")
    assert f"expected maps of the model of {run} in {maps}, found those of another model" in line and "(b)" in line
    (maps / "attention.json").write_text(json.dumps(record | {"region": None}))
    AttentionFiles(catalogue, maps).check_made_by({"fingerprint": "1" * 64}, run, level_2=True)


def test_runs_of_both_levels_are_sorted(two_levels, tmp_path, monkeypatch):
    """In any order, by their folders, files and exports; a level-2 run finds its features by their fingerprint."""
    root, level_1, record = two_levels
    catalogue, grids = read_catalogue(root), root / "region_4096_pretraining_patch"
    run = str(_level_2(tmp_path / "region", record))
    for given in ([str(level_1), run], [run, str(level_1)]):
        assert sort_runs(catalogue, given) == Runs(["patch"], {"patch": str(level_1)}, {"patch": (run, grids)})
    assert sort_runs(catalogue, [run]) == Runs(["patch"], {}, {"patch": (run, grids)})
    api.export(run, tmp_path / "export", ExportConfig())
    export = str(tmp_path / "export")
    assert sort_runs(catalogue, ["patch", export]) == Runs(["patch"], {}, {"patch": (export, grids)})
    unknown = str(_level_2(tmp_path / "unknown", None))
    assert sort_runs(catalogue, ["patch", unknown]).regions == {"patch": (unknown, grids)}
    models = RunModels(catalogue, sort_runs(catalogue, [str(level_1), run]))
    models.start(lambda: None)
    next(thread for thread in threading.enumerate() if thread.name == "models").join()
    models.check()
    assert models.regions["patch"].maps("one", 0).shape == (3, 4, 4)
    assert models.tiles["patch"].maps("one", 0).shape == (3, 4, 4)
    assert sort_runs(catalogue, ["patch"]) == Runs(["patch"], {})  # the features of that name
    (tmp_path / "patch").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sort_runs(catalogue, ["patch"]) == Runs(["patch"], {})  # a folder of that name that is no run
    monkeypatch.chdir(level_1.parent)
    assert sort_runs(catalogue, ["patch"]) == Runs(["patch"], {"patch": "patch"})  # the run folder of that name


def test_moved_slides(catalogue):
    status = {
        slide: replace(row, image_path=row.image_path / "moved") for slide, row in catalogue.slides.status.items()
    }
    moved = replace(catalogue, slides=replace(catalogue.slides, status=status))
    with pytest.raises(
        DataError, match="expected the files of 3 slides .*name their folder or slides.csv with slides="
    ):
        moved.check_slides()
    found = {slide: row.image_path for slide, row in catalogue.slides.status.items() if slide != "one"}
    replace(moved, slides=replace(moved.slides, moved=found)).check_slides()  # a warning


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": 1}, "expected 2 to 64 clusters, found 1"),
        ({"port": 70000}, "expected a port from 0 to 65535, found 70000"),
        ({"cache_mb": 0}, "expected cache_mb to be at least 1, found 0"),
        ({"token": "short"}, "expected a token of at least 8 letters and digits"),
    ],
)
def test_settings_out_of_range(painted, settings, message):
    with pytest.raises(ConfigError, match=message):
        _view(painted, **settings)


def test_without_the_server_package(painted, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert environment.import_extra  # the message is that of all extras
    with pytest.raises(ConfigError, match=r"expected the package uvicorn for the viewer, .*'histodino\[viewer\]'"):
        _view(painted)


def test_export_geojson_is_geojson_but_for_a_model_of_that_name(painted, tmp_path):
    settings = ["contents=tiles", "clusters=4"]
    for command, folder in ((["geojson"], "a"), (["export", "geojson"], "b")):
        result = CliRunner().invoke(app, [*command, str(painted), str(tmp_path / folder), *settings])
        assert result.exit_code == 0, result.output
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 3 and files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert "geojson" in _fails("export", "geojson", tmp_path / "model")  # a model that is not there
    assert not (tmp_path / "model").exists()


def test_damaged_maps_are_one_line(painted, tmp_path):
    """In another process, because tifffile writes to stderr too where no logging is set up."""
    pytest.importorskip("tifffile")
    folder = painted / "attention_broken"
    folder.mkdir()
    try:
        (folder / "one.ome.tif").write_bytes(b"II*\0\x08\0\0\0" + b"\xff" * 40)
        command = [sys.executable, "-m", "dino", "geojson", str(painted), str(tmp_path / "out"), "contents=tiles"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: expected maps of `dino attention` in {folder / 'one.ome.tif'}, could not read them")


def test_the_command_serves_until_it_is_interrupted(painted, features):
    """Another process; the address that it prints opens the viewer, and nothing is written to ROOT."""
    pytest.importorskip("uvicorn")
    before = sorted((path, path.stat().st_mtime_ns) for path in painted.rglob("*"))
    command = [sys.executable, "-m", "dino", "view", str(painted), "random", "port=0"]
    environment_variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment_variables) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", process.stdout.readline())
        assert found is not None
        with urllib.request.urlopen(found[0], timeout=30) as answer:
            assert b"openseadragon" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
    assert sorted((path, path.stat().st_mtime_ns) for path in painted.rglob("*")) == before


def test_the_command_starts_without_torch():
    """Their imports take several times as long as everything else that `dino view` does at its start."""
    script = (
        "import sys; sys.argv = ['dino']\n"
        "import dino.cli.main, dino.api.viewing, dino.viewer.server, dino.viewer.guard\n"
        "print(sorted({'torch', 'timm', 'sklearn', 'matplotlib', 'hs2p'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
