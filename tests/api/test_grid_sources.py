"""A level-2 model is trained, resumed and used on the feature grids of one level-1 model only."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_models import save_checkpoint
from typer.testing import CliRunner

from dino import api
from dino.cli.main import app
from dino.config.load import load_config
from dino.config.schema import ExportConfig, ExtractConfig, KnnConfig
from dino.data.grids import GridEntry
from dino.data.packed import GridFiles, find_packed, pack
from dino.errors import DataError

X = {
    "level": "patch",
    "model": "runs/x/best.pt",
    "fingerprint": "1" * 64,
    "embed_dim": 10,
    "transform": {"name": "imagenet", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "input_size_px": None},
    "precision": "bf16",
    "geometry": {"spacing_um": 0.5, "tile_size_px": 256, "tolerance": 0.05, "region_cells": 6},
}
OTHERS = {
    "fingerprint": "2" * 64,
    "transform": {**X["transform"], "std": [0.25, 0.25, 0.25]},
    "precision": "fp32",
    "geometry": {**X["geometry"], "spacing_um": 0.25},
}
EXTRACT = load_config(ExtractConfig, overrides={"device": "cpu", "precision": "fp32", "num_workers": 1})
KNN = load_config(
    KnnConfig,
    overrides={"device": "cpu", "precision": "fp32", "k": [1], "num_workers": 1, "allow_leakage": True},
)


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    """The folder of the grids of a ROOT, extracted with model X."""
    folder = tiny_runs.make_grids(tmp_path / "root" / "region_4096_pretraining")
    record(folder)
    return folder


def record(grids: Path, **changes: object) -> None:
    (grids.parent / "extract.json").write_text(json.dumps({**X, **changes}))


def other_model(grids: Path) -> None:
    record(grids, model="runs/y/best.pt", fingerprint="2" * 64)


def train(grids: Path, name: str = "run", **changes: object) -> Path:
    settings = tiny_runs.config(grids, grids.parent.parent / name, **{"training.max_steps": 4, **changes})
    assert api.pretrain(settings).state == "finished"
    return Path(settings.output_dir)


def refused(action: object, *arguments: object) -> str:
    """The message of a refusal, which names both models (that of an export without its folder)."""
    with pytest.raises(DataError, match=r"(runs/x/)?best\.pt \(1{12}\).*runs/y/best\.pt \(2{12}\)") as caught:
        action(*arguments)  # type: ignore[operator]
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


EVALUATED = {"evaluate.k": [1], "evaluate.allow_leakage": True}


def labels(grids: Path) -> Path:
    rows = [
        f"{path},{'ab'[i % 2]},{'train' if i < 6 else 'test'},held{i}"
        for i, path in enumerate(sorted(grids.glob("*.pt")))
    ]
    table = grids.parent.parent / "labels.csv"
    table.write_text("\n".join(["image_path,label,partition,slide_id", *rows]))
    return table


def test_identity_checkpoint_and_export_record_the_model_of_the_grids(grids: Path, tmp_path: Path) -> None:
    run = train(grids)
    api.export(str(run), tmp_path / "export", ExportConfig())
    found = [
        api.info(str(run))["grids"],
        json.loads((run / "identity.json").read_text())["grids"],
        *(tiny_runs.last(run)["grids"], torch.load(run / "checkpoints" / "start.pt", weights_only=True)["grids"]),
    ]
    exports = [api.info(str(folder))["grids"] for folder in (run / "backbone", tmp_path / "export")]
    expected = {key: X[key] for key in ("model", "fingerprint", "transform", "precision")}
    expected |= {"spacing_um": 0.5, "tile_size_px": 256}
    assert all(one == expected for one in found)
    assert all(one == {**expected, "model": "best.pt"} for one in exports)  # without its folder


@pytest.mark.parametrize("changed", OTHERS)
def test_a_run_is_not_resumed_on_other_grids(grids: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    with monkeypatch.context() as patched:
        tiny_runs.crash_after(patched, 3)
        with pytest.raises(tiny_runs.Crash):
            train(grids)
    before = {path: path.read_bytes() for path in (grids.parent.parent / "run").rglob("*") if path.is_file()}
    record(grids, **{"model": "runs/y/best.pt", changed: OTHERS[changed]})
    with pytest.raises(DataError, match=r"runs/x/best\.pt.*runs/y/best\.pt"):
        train(grids)
    assert {path: path.read_bytes() for path in (grids.parent.parent / "run").rglob("*") if path.is_file()} == before
    record(grids, model="moved/x.pt")  # the same model at another place
    assert api.info(str(train(grids)))["grids"]["model"] == "runs/x/best.pt"


def test_extraction_with_a_run_or_an_export_refuses_other_grids(grids: Path, tmp_path: Path) -> None:
    run = train(grids)
    shutil.copytree(run / "backbone", tmp_path / "elsewhere")
    other_model(grids)
    for model in (run, tmp_path / "elsewhere"):
        refused(api.extract, str(model), grids.parent, EXTRACT)
    assert not (grids.parent / "slide_features").exists()
    assert CliRunner().invoke(app, ["extract", str(run), str(grids.parent), "device=cpu"]).exit_code == 2
    record(grids)
    assert api.extract(str(run), grids.parent, EXTRACT).written == 1


def test_evaluation_refuses_other_grids_during_and_after_training(grids: Path) -> None:
    run, table = train(grids), labels(grids)
    assert api.evaluate_knn(str(run), table, KNN)["model"]
    other_model(grids)
    refused(api.evaluate_knn, str(run), table, KNN)
    own = tiny_runs.make_grids(grids.parent.parent / "own" / "region_4096_pretraining")
    record(own)
    refused(lambda: train(own, "third", **EVALUATED, **{"evaluate.labels": str(table)}))


def test_training_does_not_start_from_a_model_of_other_grids(grids: Path) -> None:
    run = train(grids)
    train(grids, "second", **{"model.init": str(run)})
    other_model(grids)
    refused(lambda: train(grids, "third", **{"model.init": str(run)}))


def test_labelled_grids_of_two_models_are_refused(grids: Path, tmp_path: Path) -> None:
    other = tiny_runs.make_grids(tmp_path / "other" / "region_4096_pretraining", 2)
    record(other, model="runs/y/best.pt", fingerprint="2" * 64)
    first, second = next(grids.glob("*.pt")), tiny_runs.negative(next(other.glob("*.pt")), other)
    table = tmp_path / "labels.csv"
    table.write_text(f"image_path,label,partition\n{first},a,train\n{second},b,test\n")
    model = save_checkpoint(tmp_path / "model.pt", "region", 10)  # without a record
    with pytest.raises(DataError, match=r"runs/.*runs/"):
        api.evaluate_knn(str(model), table, KNN)


def test_grids_without_a_record_are_said_once_and_recorded_as_unknown(
    grids: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (grids.parent / "extract.json").unlink()
    run = train(grids)
    assert capsys.readouterr().out.count("no record of the model") == 1
    assert json.loads((run / "identity.json").read_text())["grids"] == "unknown"
    assert tiny_runs.last(run)["grids"] == api.info(str(run / "backbone"))["grids"] == "unknown"
    other_model(grids)
    assert api.pretrain(tiny_runs.config(grids, run, **{"training.max_steps": 4})).state == "finished"
    assert api.extract(str(run), grids.parent, EXTRACT).written == 1
    assert capsys.readouterr().out.count("no record of the level-1 model") == 1


def test_a_run_without_a_record_goes_on_and_stays_unknown(
    grids: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As runs of earlier versions are."""
    with monkeypatch.context() as patched:
        tiny_runs.crash_after(patched, 3)
        with pytest.raises(tiny_runs.Crash):
            train(grids)
    run = grids.parent.parent / "run"
    for path in (run / "checkpoints").glob("*.pt"):
        content = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in content.items() if key != "grids"}, path)
    identity = json.loads((run / "identity.json").read_text())
    (run / "identity.json").write_text(json.dumps({key: v for key, v in identity.items() if key != "grids"}))
    other_model(grids)
    assert train(grids) == run
    assert "it stays unknown" in capsys.readouterr().out
    assert tiny_runs.last(run)["grids"] == "unknown"


def test_grids_of_another_model_are_packed_again(grids: Path, tmp_path: Path) -> None:
    """Also where sizes and modification times of the files are those of the grids that were packed."""
    train(grids)
    paths = sorted(grids.glob("*.pt"))
    times = [path.stat().st_mtime_ns for path in paths]
    for path, time in zip(paths, times, strict=True):
        torch.save(torch.load(path) + 1, path)
        os.utime(path, ns=(time, time))
    other_model(grids)
    run = train(grids, "second")
    (tmp_path / "fresh").mkdir()
    fresh = train(grids, "fresh/run", **{"speed.cache_dir": "none"})
    tiny_runs.assert_same_bits(run, fresh)


def test_the_key_of_packed_grids_contains_their_model(tmp_path: Path) -> None:
    folder = tiny_runs.make_grids(tmp_path / "grids")
    entries = [GridEntry(path) for path in sorted(folder.glob("*.pt"))]
    first, second = (GridFiles(folder, entries, source=source) for source in ("x", "y"))
    pack(tmp_path / "cache", first, 0.0)
    assert find_packed(tmp_path / "cache", first, 0.0) is not None
    assert find_packed(tmp_path / "cache", second, 0.0) is None
