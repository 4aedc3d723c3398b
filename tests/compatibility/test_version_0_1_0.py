"""What version 0.1.0 wrote still loads, resumes and extracts: see README.md beside this file."""

import dataclasses
import json
import tarfile
from pathlib import Path

import h5py
import pytest
import torch
import yaml

from dino import api
from dino.config.load import load_config
from dino.config.schema import ExtractConfig, PatchConfig, RegionConfig, ReportConfig
from dino.errors import DataError

ARCHIVE = Path(__file__).with_name("version_0_1_0.tar.gz")
SCHEMAS = {"patch": PatchConfig, "region": RegionConfig}
EXTRACT = {"precision": "fp32", "device": "cpu", "num_workers": 0}
# Weights are compared after eight steps of Adam, on a processor that may round differently.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The files of version 0.1.0."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def settings(old: Path, level: str) -> PatchConfig | RegionConfig:
    """The settings of an old run from its own ``config.yaml``, with its folders where they are now."""
    run = old / f"{level}_run"
    config = load_config(SCHEMAS[level], file=run / "config.yaml")
    if config.evaluate.labels:
        config.evaluate.labels = str(old / "labels.csv")
    return dataclasses.replace(config, data_dir=str(old / "root"), output_dir=str(run))


def checkpoint(run: Path, name: str = "last.pt") -> dict:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("level", ["patch", "region"])
def test_a_finished_run_is_left_as_it_is(old: Path, level: str) -> None:
    run = old / f"{level}_run"
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    assert api.pretrain(settings(old, level)).state == "finished"
    assert {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("level", ["patch", "region"])
def test_a_stopped_run_resumes_to_the_same_end(old: Path, level: str) -> None:
    run = old / f"{level}_run"
    expected, lines = checkpoint(run), log(run)
    checkpoints = run / "checkpoints"
    (checkpoints / "step_4.pt").replace(checkpoints / "last.pt")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "stopped", "step": 4}))

    assert api.pretrain(settings(old, level)).state == "finished"

    found = checkpoint(run)
    assert found["step"] == 8
    for part in ("student", "teacher"):
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            if "qkv.bias" not in name:  # its key part has no true gradient, and Adam amplifies the noise of that
                torch.testing.assert_close(found[part][name], tensor, **TOLERANCE)
    resumed = log(run)
    assert [line["step"] for line in resumed] == [line["step"] for line in lines]
    losses = [[line["loss"] for line in found if "loss" in line] for found in (resumed, lines)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("level", ["patch", "region"])
def test_a_run_an_export_and_a_checkpoint_give_the_same_features(old: Path, level: str) -> None:
    run = old / f"{level}_run"
    # Level 1 was exported from best.pt, which is of step 4, with a position table for tiles of 64 px.
    sources = [run / "backbone", run / "checkpoints" / ("step_4.pt" if level == "patch" else "last.pt")]
    models = [api.load_backbone(source) for source in sources]
    dim, side = models[0].spec.input_dim, 64 if level == "patch" else 4
    inputs = torch.randn(2, dim, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = (model(inputs) for model in models)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert first.shape == (2, 8)
    said = api.info(str(run / "backbone"))
    assert said["level"] == level and said["contains"]["slides"] == "2 ids"


def test_grids_are_known_as_done_and_those_of_a_slide_that_are_gone_are_made_again(old: Path) -> None:
    """The slides are not here, so that the grids of one are made from its tiles: JPEG, which differs slightly."""
    root, model = old / "root", str(old / "patch_run" / "checkpoints" / "step_4.pt")
    config = load_config(ExtractConfig, overrides=EXTRACT)
    grids = {path: path.read_bytes() for path in (root / "region_4096_pretraining").glob("*.pt")}

    assert api.extract(model, root, config).exit_code == 0
    assert all(path.read_bytes() == content for path, content in grids.items())

    gone = {path: torch.load(path, weights_only=True) for path in grids if path.name.startswith("a1_")}
    next(iter(gone)).unlink()
    with pytest.raises(DataError, match="delete its features"):
        api.extract(model, root, config)
    for path in gone:
        path.unlink(missing_ok=True)
    assert api.extract(model, root, config).exit_code == 0
    for path, expected in gone.items():
        assert torch.cosine_similarity(torch.load(path, weights_only=True), expected).min() > 0.95
    record = json.loads((root / "extract.json").read_text())
    assert record["fingerprint"].startswith("151be2106d488658") and record["pixels"]["a1"] == "tiles"


def test_slide_files_are_known_as_done_and_one_that_is_gone_is_made_again(old: Path) -> None:
    root, path = old / "root", old / "root" / "slide_features" / "b2.h5"
    with h5py.File(path) as file:
        expected = {name: file[name][:] for name in file}
    path.unlink()

    assert api.extract(str(old / "region_run"), root, load_config(ExtractConfig, overrides=EXTRACT)).exit_code == 0

    with h5py.File(path) as file:
        assert file.keys() == expected.keys()
        for name, values in expected.items():
            assert file[name][:] == pytest.approx(values, rel=1e-4, abs=1e-5)


def test_another_model_is_still_refused(old: Path) -> None:
    with pytest.raises(DataError, match=r"extract\.json|another|other"):
        model = str(old / "patch_run" / "checkpoints" / "last.pt")
        api.extract(model, old / "root", load_config(ExtractConfig, overrides=EXTRACT))


def test_a_report_is_written_on_old_runs(old: Path, tmp_path: Path) -> None:
    page = api.report(
        [old / "patch_run", old / "region_run"], old / "root", tmp_path / "report.html", ReportConfig(device="cpu")
    )
    text = page.read_text()
    assert "collapsed" in text.lower()
    assert "3-NN accuracy 0.500" in text


@pytest.mark.parametrize("level", ["patch", "region"])
def test_the_settings_of_a_run_are_a_config_file(old: Path, level: str) -> None:
    path = old / f"{level}_run" / "config.yaml"
    written = yaml.safe_load(path.read_text())
    config = load_config(SCHEMAS[level], file=path)
    assert written["model"]["out_dim"] == config.model.out_dim == 12
    # Settings that were added since have their defaults.
    assert dataclasses.asdict(SCHEMAS[level]().aug) | written["aug"] == dataclasses.asdict(config.aug)
