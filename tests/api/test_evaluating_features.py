"""Folders of features as models of the evaluators of tiles: the scores of the encoder itself, without its images."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from painted_slide import halved, noise, write_slide
from tiny_models import save_checkpoint

from dino.api import extract
from dino.api.evaluating import evaluate
from dino.api.evaluating_robustness import evaluate_robustness
from dino.api.tiling import tile
from dino.config.schema import ExtractConfig, KnnConfig, LinearConfig, RobustnessConfig, TileConfig
from dino.errors import DataError
from dino.slides.tables import read_tiles

EXTRACT = ExtractConfig(device="cpu", what="tiles", source="tiles", precision="fp32", encoder="ours")
HOW = {"device": "cpu", "precision": "fp32", "cache": "none", "resamples": 50}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Features and tile files of six slides; labels of the tiles by file and by place."""
    for seed in range(6):
        pixels = noise(230, 170, seed)
        write_slide(tmp_path / "slides" / f"s{seed}.v2.tiff", [pixels, halved(pixels)])
    settings = TileConfig(tile_size_px=32, region_size_px=64, num_workers=1, previews=False)
    assert tile([tmp_path / "slides"], tmp_path / "root", settings).exit_code == 0
    save_checkpoint(tmp_path / "model.pt", training_slides={"slide_ids": ["s9"]})
    assert extract(tmp_path / "model.pt", tmp_path / "root", EXTRACT).written == 6
    rows = read_tiles(tmp_path / "root")[::2]
    with (tmp_path / "files.csv").open("w") as files, (tmp_path / "places.csv").open("w") as places:
        csv.writer(files).writerow(["image_path", "label", "partition", "centre"])
        csv.writer(places).writerow(["slide_id", "x", "y", "label", "partition", "centre"])
        for i, row in enumerate(rows):
            part = "test" if row.slide_id < "s2" else "train"
            rest = ["ab"[row.x // 32 % 2], part, "AB"[i % 2]]
            csv.writer(files).writerow([tmp_path / "root" / row.path, *rest])
            csv.writer(places).writerow([row.slide_id, row.x, row.y, *rest])
    return tmp_path / "root"


def values(result) -> dict:
    return {name: estimate.value for name, estimate in result.rows[0].estimates.items()}


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_scores_are_those_of_the_encoder(root: Path, kind: str) -> None:
    folder, model, tables = root / "features_ours", root.parent / "model.pt", [root.parent / "files.csv"]
    config = KnnConfig(k=[3], **HOW) if kind == "knn" else LinearConfig(**HOW)  # type: ignore[arg-type]
    expected = evaluate(kind, [str(model)], tables[0], config)
    for table in (*tables, root.parent / "places.csv"):
        found = evaluate(kind, [str(folder)], table, config)
        assert values(found) == pytest.approx(values(expected), abs=1e-6)
        assert [row.role for row in found.rows] == ["model", "chance"] and found.rows[0].source == str(folder)
        assert found.rows[0].fingerprint == expected.rows[0].fingerprint
        assert found.about["grouped_by"] == "slides"


def test_folders_and_models_stand_side_by_side_in_the_order_given(root: Path) -> None:
    config = KnnConfig(k=[3], output=str(root / "result.json"), **HOW)  # type: ignore[arg-type]
    models = [str(root / "features_ours"), str(root.parent / "model.pt"), str(root / "features_ours")]
    found = evaluate("knn", models, root.parent / "files.csv", config)
    assert [row.source for row in found.rows[:3]] == models
    assert [row.role for row in found.rows[3:]] == ["random_initialization", "pixels_8x8", "chance"]
    assert found.rows[0].estimates == found.rows[1].estimates == found.rows[2].estimates
    assert json.loads((root / "result.json").read_text())


def test_robustness_takes_folders_too(root: Path) -> None:
    config = RobustnessConfig(k=[3], m=3, folds=2, **HOW)  # type: ignore[arg-type]
    table = root.parent / "places.csv"
    found, expected = (
        evaluate_robustness([str(model)], source, config)
        for model, source in ((root / "features_ours", table), (root.parent / "model.pt", root.parent / "files.csv"))
    )
    assert values(found) == pytest.approx(values(expected), abs=1e-6)


def test_slides_that_the_encoder_was_pretrained_on_are_refused(root: Path) -> None:
    save_checkpoint(root.parent / "model.pt", training_slides={"slide_ids": ["s0.v2"]})
    with pytest.raises(DataError, match=r"test slides that the model has not been pretrained on, found 1"):
        evaluate("knn", [str(root / "features_ours")], root.parent / "places.csv", KnnConfig(k=[3], **HOW))  # type: ignore[arg-type]
    (root.parent / "model.pt").unlink()
    found = evaluate("knn", [str(root / "features_ours")], root.parent / "places.csv", KnnConfig(k=[3], **HOW))  # type: ignore[arg-type]
    assert "the model of the features is unknown" in found.rows[0].details["leakage"]["compared"]


def test_what_does_not_fit_is_refused(root: Path) -> None:
    folder, places = root / "features_ours", root.parent / "places.csv"
    config = KnnConfig(k=[3], **HOW)  # type: ignore[arg-type]
    text = places.read_text()

    def refused(models: list[str], words: str) -> None:
        with pytest.raises(DataError, match=words):
            evaluate("knn", models, places, config)

    refused([str(root.parent / "model.pt")], "expected a column image_path for the model .* folder of features")
    refused([str(root)], r"found a ROOT; it has features_ours: give one of these")
    first = text.splitlines()[1]
    places.write_text(text + first + "\n")
    refused([str(folder)], r"a tile that no earlier row has in every row, found 1 repeated ones")
    places.write_text(text.replace(first, "s0.v2,7,0,a,test,A"))
    refused([str(folder)], r"found none of 1 of \d+, the first s0.v2_7_0.jpg; are its x and y those of tiles.csv")
    places.write_text(text.replace(first, "other,0,0,a,test,A"))
    refused([str(folder)], r"expected features of every labelled slide .* the first 'other'")
    places.write_text(text.replace(first, "s0.v2,-1,0,a,test,A"))
    refused([str(folder)], r"expected slide_id, x and y \(whole level-0 px\) in every row, found 1 others \(line 2\)")
    places.write_text(text)
    with h5py.File(folder / "s3.v2.h5", "r+") as file:
        file["features"].attrs["fingerprint"] = "0" * 64
    refused([str(folder)], "expected features of one encoder")


def test_the_table_of_tiles_itself_has_labels(root: Path) -> None:
    """Its column ``annotation``, as of annotated slides; tiles without a class are left out."""
    table = root / "tiles.csv"
    lines = table.read_text().splitlines()
    classes = [["tumour", "stroma", ""][i % 3] for i in range(len(lines) - 1)]
    rows = [f"{lines[0]},annotation", *(f"{line},{name}" for line, name in zip(lines[1:], classes, strict=True))]
    table.write_text("\n".join(rows))
    config = KnnConfig(k=[3], folds=3, label="annotation", **HOW)  # type: ignore[arg-type]
    found = evaluate("knn", [str(root / "features_ours")], table, config)
    assert found.about["queries"] == sum(map(bool, classes)) and found.about["grouped_by"] == "slides"
    read = (root / "slides_status.csv").read_text().splitlines()
    place, header = read[0].split(",").index("patient_id"), read[0]
    cells = [line.split(",") for line in read[1:]]
    for number, row in enumerate(cells):  # three patients of two slides each
        row[place] = f"p{number // 2}"
    (root / "slides_status.csv").write_text("\n".join([header, *map(",".join, cells)]) + "\n")
    output = root.parent / "result.json"
    found = evaluate("knn", [str(root / "features_ours")], table, replace(config, output=str(output)))
    assert found.about["grouped_by"] == "patients"
    with (root.parent / "result_folds.csv").open(newline="") as file:
        folds = {(f"p{int(row['name'][1]) // 2}", row["fold"]) for row in csv.DictReader(file)}
    assert len(folds) == 3  # each patient in one
    elsewhere = root.parent / "elsewhere.csv"
    elsewhere.write_text(table.read_text())
    again = evaluate("knn", [str(root / "features_ours")], elsewhere, config)
    assert again.about["grouped_by"] == "patients" and values(again) == values(found)
    with pytest.raises(DataError, match="missing class; found"):
        evaluate("knn", [str(root / "features_ours")], table, KnnConfig(k=[3], label="class", **HOW))  # type: ignore[arg-type]
