"""``evaluate slide`` on folders of features."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from painted_slide import noise
from painted_slide import write_slide as write_tiff
from tiny_models import save_checkpoint

from dino.api import evaluate_slide, extract, tile
from dino.config.schema import AbmilConfig, ExtractConfig, HiptConfig, SlideConfig, TileConfig
from dino.errors import ConfigError, DataError
from dino.models.weights import load_backbone_file

ROOT = Path(__file__).parents[2]
QUICK = AbmilConfig(hidden=8, attention=4, epochs=2)
SMALL = HiptConfig(hidden=6, attention=4, epochs=2, heads=2)


def config(**changes):
    return SlideConfig(**{"abmil": QUICK, "folds": 2, "inner_folds": 2, "device": "cpu", "resamples": 50, **changes})


def write_slide(folder, slide, values, **attributes):
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{slide}.h5", "w") as file:
        file["features"] = values
        file["coords"] = np.zeros((len(values), 2), np.int64)
        file["features"].attrs.update(attributes)


@pytest.fixture
def root(tmp_path):
    """Two encoders' features of 16 slides of 8 patients, the first one's shifted by the class, and labels."""
    random = np.random.default_rng(0)
    lines = ["slide_id,patient_id,label,time,event"]
    for i in range(16):
        kind = i // 2 % 2
        for encoder, dim, shift in (("ours", 6, 3.0), ("theirs", 4, 0.0)):
            values = random.normal(size=(5 + i, dim)) + shift * kind
            write_slide(tmp_path / f"features_{encoder}", f"s{i}", values.astype(np.float16), fingerprint=encoder)
        lines.append(f"s{i},p{i // 2},{'tumour' if kind else 'normal'},{10 - 5 * kind + i % 2},{int(i % 4 != 3)}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return tmp_path


def folders(root):
    return [root / "features_ours", root / "features_theirs"]


def test_every_encoder_and_method_has_a_row_with_intervals_and_differences(root):
    result = evaluate_slide(folders(root), root / "labels.csv", config(output=str(root / "out" / "slides.json")))
    names = ["features_ours: mean", "features_ours: abmil", "features_theirs: mean", "features_theirs: abmil", "chance"]
    assert [row.name for row in result.rows] == names
    assert (result.evaluation, result.primary, result.about["unit"]) == ("slide", "auc", "slide")
    first, *others = result.rows
    assert first.estimates["auc"].value == 1 and first.fingerprint == "ours" and not first.differences
    assert all(row.differences["auc"].value == row.estimates["auc"].value - 1 for row in others)
    assert others[-1].estimates["auc"].value == 0.5 and result.about["resampled"] == 8
    assert first.details["vectors"] == sum(5 + i for i in range(16))
    written = json.loads((root / "out" / "slides.json").read_text())
    assert written["rows"][1]["details"]["method"] == "abmil"
    assert "features_theirs: abmil" in (root / "out" / "slides.csv").read_text()
    assert (root / "out" / "slides.png").read_bytes().startswith(b"\x89PNG")


def test_the_written_folds_give_the_same_result(root):
    first = evaluate_slide(folders(root)[:1], root / "labels.csv", config(output=str(root / "a.json")))
    again = evaluate_slide(folders(root)[:1], root / "labels.csv", config(seed=0, splits=str(root / "a_folds.csv")))
    assert [row.estimates for row in first.rows] == [row.estimates for row in again.rows]


def test_another_process_writes_the_same_scores(root):
    evaluate_slide(folders(root), root / "labels.csv", config(output=str(root / "a.json")))
    settings = ["folds=2", "inner_folds=2", "device=cpu", "resamples=50", "output=b.json"]
    small = ["abmil.hidden=8", "abmil.attention=4", "abmil.epochs=2"]
    subprocess.run(
        [sys.executable, "-m", "dino", "evaluate", "slide", *folders(root), "labels.csv", *settings, *small],
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (root / "a.csv").read_bytes() == (root / "b.csv").read_bytes()


def test_bags_in_pieces_and_on_disk_give_the_same_scores(root):
    whole, pieces = (
        evaluate_slide(folders(root)[:1], root / "labels.csv", config(**changes))
        for changes in ({}, {"memory_gb": 0.0, "abmil": AbmilConfig(hidden=8, attention=4, epochs=2, piece=4)})
    )
    for one, other in zip(whole.rows, pieces.rows, strict=True):
        for metric, found in one.estimates.items():
            assert found.value == pytest.approx(other.estimates[metric].value, abs=1e-6)


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("classification", ["auc", "balanced_accuracy", "accuracy"]),
        ("survival", ["c_index"]),
    ],
)
def test_patients_are_predicted_from_all_their_slides(root, task, metrics):
    text = (root / "labels.csv").read_text()
    for i in range(8):  # one label for both slides of a patient
        text = text.replace(f"s{2 * i + 1},p{i}", f"s{2 * i + 1},p{i}")
    lines = [line.split(",") for line in text.splitlines()]
    for one, two in zip(lines[1::2], lines[2::2], strict=True):
        two[3:] = one[3:]
    (root / "labels.csv").write_text("\n".join(map(",".join, lines)))
    result = evaluate_slide(folders(root), root / "labels.csv", config(task=task, unit="patient"))
    assert (result.about["cases"], result.about["slides"], result.metrics) == (8, 16, metrics)


def test_a_table_of_patients_is_joined_by_a_table_of_slides(root):
    (root / "patients.csv").write_text("patient_id,label\n" + "".join(f"p{i},{'xy'[i % 2]}\n" for i in range(8)))
    with pytest.raises(DataError, match="expected features of every labelled patient .*found none of 8 .*slides=FILE"):
        evaluate_slide(folders(root), root / "patients.csv", config())
    result = evaluate_slide(folders(root), root / "patients.csv", config(slides=str(root / "labels.csv")))
    assert (result.about["cases"], result.about["slides"]) == (8, 16)


def test_numbers_are_predicted(root):
    path = root / "labels.csv"
    path.write_text(path.read_text().replace("tumour", "7.5").replace("normal", "1"))
    result = evaluate_slide(folders(root), path, config(task="regression", method=["mean"]))
    assert [row.name for row in result.rows] == ["features_ours", "features_theirs", "chance"]
    assert result.metrics == ["r2", "pearson", "mae"] and result.rows[0].estimates["r2"].value > 0.5


def test_vectors_of_slides_are_scored_without_attention(root, capsys):
    for i in range(16):
        (root / "slide_features_x").mkdir(exist_ok=True)
        torch.save(torch.randn(3), root / "slide_features_x" / f"s{i}.pt")
    result = evaluate_slide([root / "slide_features_x"], root / "labels.csv", config())
    assert [row.name for row in result.rows] == ["slide_features_x: mean", "chance"]
    assert "no attention to learn" in capsys.readouterr().out


def test_the_mean_is_scored_beside_every_method(root):
    result = evaluate_slide(folders(root)[:1], root / "labels.csv", config(method=["hipt"], hipt=SMALL))
    assert [row.name for row in result.rows] == ["features_ours: mean", "features_ours: hipt", "chance"]
    assert result.rows[1].details["method"] == "hipt" and result.rows[1].estimates["auc"].value is not None


def test_a_root_needs_an_encoder(root):
    with pytest.raises(DataError, match="found a ROOT; it has features_ours, features_theirs: give one of these"):
        evaluate_slide([root], root / "labels.csv", config())
    assert (
        evaluate_slide([root], root / "labels.csv", config(encoder="ours", method=["mean"])).rows[0].fingerprint
        == "ours"
    )


def _not_finite(root):
    values = np.ones((3, 6), np.float16)
    values[1, 2] = np.nan
    write_slide(root / "features_ours", "s3", values, fingerprint="ours")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_not_finite, "expected finite features in .*s3.h5"),
        (
            lambda root: (root / "features_theirs" / "s3.h5").unlink(),
            r"labelled slide in .*theirs, found none of 1 \(s3\)",
        ),
        (
            lambda root: write_slide(root / "features_ours", "s3", np.ones((3, 6)), fingerprint="other"),
            "expected features of one encoder in .*, found fingerprint ours of 's0' and other of 's3'",
        ),
        (
            lambda root: (root / "features_ours" / "extract.json").write_text('{"fingerprint": "other"}'),
            r"the encoder that .*extract.json records \(other\), found fingerprint ours of 's0'",
        ),
        (
            lambda root: write_slide(root / "features_ours", "s3", np.ones((3, 7)), fingerprint="ours"),
            "found D 6 of 's0' and 7 of 's3'",
        ),
        (
            lambda root: write_slide(root / "features_ours", "s3", np.ones((0, 6)), fingerprint="ours"),
            "s3.h5, found",
        ),
    ],
)
def test_bad_features_are_refused_and_nothing_is_written(root, change, message):
    change(root)
    with pytest.raises(DataError, match=message):
        evaluate_slide(folders(root), root / "labels.csv", config(output=str(root / "out" / "slides.json")))
    assert not (root / "out").exists()


def test_slides_that_the_encoder_was_pretrained_on_are_refused(root):
    checkpoint = root / "run" / "checkpoints" / "last.pt"
    save_checkpoint(checkpoint, training_slides={"slide_ids": ["s3", "other"], "patient_ids": []})
    fingerprint = load_backbone_file(root / "run").fingerprint
    for i in range(16):
        path = root / "features_ours" / f"s{i}.h5"
        with h5py.File(path, "r+") as file:
            file["features"].attrs.update({"model": str(root / "run"), "fingerprint": fingerprint})
    with pytest.raises(DataError, match=r"has not been pretrained on, found 1 that it has \(s3\)"):
        evaluate_slide(folders(root), root / "labels.csv", config())
    result = evaluate_slide(folders(root), root / "labels.csv", config(allow_leakage=True, method=["mean"]))
    assert result.rows[0].details["leakage"]["seen_slides"] == ["s3"]
    assert "not recorded" in result.rows[1].details["leakage"]["compared"]


def test_missing_slides_may_be_accepted(root):
    (root / "features_theirs" / "s3.h5").unlink()
    result = evaluate_slide(folders(root), root / "labels.csv", config(max_missing=1, method=["mean"]))
    assert result.about["cases"] == 15 and result.rows[0].details["vectors"] == sum(5 + i for i in range(16)) - 8


@pytest.mark.parametrize(
    "changes",
    [
        {"method": ["median"]},
        {"method": []},
        {"folds": 1},
        {"max_missing": -1},
        {"task": "diagnosis"},
        {"abmil": AbmilConfig(dropout=1.0)},
        {"abmil": AbmilConfig(piece=0)},
        {"abmil": AbmilConfig(tiles=0)},
        {"hipt": HiptConfig(hidden=8, heads=3)},
        {"hipt": HiptConfig(layers=0)},
    ],
)
def test_wrong_settings_are_refused(root, changes):
    with pytest.raises(ConfigError, match="expected .*, found"):
        evaluate_slide(folders(root), root / "labels.csv", config(**changes))


def test_a_result_does_not_replace_the_labels(root):
    before = (root / "labels.csv").read_bytes()
    with pytest.raises(ConfigError, match="replaces no table that is read"):
        evaluate_slide(folders(root), root / "labels.csv", config(output=str(root / "labels.json")))
    assert (root / "labels.csv").read_bytes() == before


def test_without_lifelines_the_extra_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "lifelines", None)
    with pytest.raises(ConfigError, match=r"pip install 'histodino\[evaluate\]'"):
        evaluate_slide(folders(root), root / "labels.csv", config(task="survival"))


def test_patients_are_predicted_from_what_tile_and_extract_wrote(tmp_path):
    """The patients of the slides are those of the slide list, and the model of the features is found."""
    lines = ["sample_id,image_path,patient_id"]
    for i in range(8):
        pixels = noise(5 * 32, 4 * 32, seed=i)
        pixels[..., 0] = pixels[..., 0] // 2 + 60 * (i % 2)
        write_tiff(tmp_path / f"s{i}.tiff", [pixels], mpp=0.5)
        lines.append(f"s{i},s{i}.tiff,p{i // 4 * 2 + i % 2}")
    (tmp_path / "slides.csv").write_text("\n".join(lines))
    cut = TileConfig(tile_size_px=32, region_size_px=64, tissue_downsample=16, min_tissue=0.0, num_workers=1)
    assert tile([tmp_path / "slides.csv"], tmp_path / "root", cut).exit_code == 0
    save_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", training_slides={"slide_ids": ["other"]})
    plain = ExtractConfig(encoder="ours", what="tiles", device="cpu", precision="fp32", num_workers=1)
    assert extract(str(tmp_path / "run"), tmp_path / "root", plain).exit_code == 0
    (tmp_path / "labels.csv").write_text("patient_id,label\np0,dark\np1,red\np2,dark\np3,red\n")
    result = evaluate_slide([tmp_path / "root"], tmp_path / "labels.csv", config(encoder="ours"))
    assert (result.about["cases"], result.about["slides"]) == (4, 8)
    assert result.rows[0].details["leakage"]["compared"] == "slides by slide_id"
    assert result.rows[0].details["vectors"] == 160 and result.rows[0].estimates["auc"].value is not None
