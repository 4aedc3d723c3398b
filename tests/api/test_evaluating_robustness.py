"""``dino evaluate robustness`` from models and a table of labels to a result and its files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import save_checkpoint
from typer.testing import CliRunner

from dino import api
from dino.cli.main import app
from dino.config.schema import RobustnessConfig
from dino.errors import DataError

SETTINGS = {"device": "cpu", "precision": "fp32", "num_workers": 1, "k": [3, 5], "m": 2, "apd": 2, "folds": 3}
MEASURES = ["ri", "mari", "croma", "croma_tail", "apd", "label_probe", "scanner_probe"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """160 tiles of two classes (a bright corner), 16 patients and two scanners (a tint), also in slides.csv."""
    random = np.random.default_rng(0)
    rows, slides = [], {}
    for i in range(160):
        patient, label = i % 16, i // 16 % 2
        scanner = "XR"[patient % 2]
        tile = random.integers(60, 120, (32, 32, 3)) + 30 * np.array([patient % 2, 0, 0])
        tile[:16, :16] += 60 * label
        Image.fromarray(tile.astype(np.uint8)).save(tmp_path / f"{i}.png")
        rows.append([f"{i}.png", "normal" if label else "tumour", scanner, f"s{patient}", f"p{patient}"])
        slides[f"s{patient}"] = scanner
    write(tmp_path / "labels.csv", ["image_path", "label", "scanner", "slide_id", "patient_id"], rows)
    write(tmp_path / "slides.csv", ["sample_id", "image_path", "scanner"], [[s, "x.svs", v] for s, v in slides.items()])
    save_checkpoint(tmp_path / "ours.pt")
    save_checkpoint(tmp_path / "theirs.pt", seed=1)
    return tmp_path


def write(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def without(folder: Path, column: str) -> Path:
    """A copy of the labels without a column."""
    with (folder / "labels.csv").open() as file:
        rows = [{name: value for name, value in row.items() if name != column} for row in csv.DictReader(file)]
    return write(folder / f"without_{column}.csv", list(rows[0]), [list(row.values()) for row in rows])


def evaluate(folder: Path, labels: Path, **changes: object):
    settings = RobustnessConfig(**{**SETTINGS, "by": "scanner", "output": str(folder / "out.json"), **changes})  # type: ignore[arg-type]
    return api.evaluate_robustness([str(folder / "ours.pt"), str(folder / "theirs.pt")], labels, settings)


def test_models_and_baselines_are_scored_with_intervals_and_figures(folder: Path) -> None:
    result = evaluate(folder, folder / "labels.csv")
    assert [row.name for row in result.rows] == [
        "ours.pt",
        "theirs.pt",
        "random initialization",
        "pixels 8x8",
        "chance",
    ]
    assert result.evaluation == "robustness" and result.primary == "ri" and result.about["resampled"] == 16
    for row in result.rows[:4]:
        assert list(row.estimates) == MEASURES
        assert sum(row.details["neighbours"].values()) == pytest.approx(1)
        for name in ("ri", "croma", "scanner_probe"):
            estimate = row.estimates[name]
            assert estimate.value is not None and estimate.low is not None and estimate.high is not None
            assert estimate.low <= estimate.value <= estimate.high
        assert row.estimates["apd"].low is None
    chance = result.rows[-1]
    assert {name: chance.estimates[name].value for name in MEASURES[4:]} == {
        "apd": 0, "label_probe": 0.5, "scanner_probe": 0.5
    }  # fmt: skip
    # The same bootstrap samples: a network is equal to itself.
    same = result.rows[2].differences["ri"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert json.loads((folder / "out.json").read_text())["primary"] == "ri"
    assert {path.name for path in folder.glob("out*")} == {
        "out.json", "out.csv", "out.png", "out_features.png", "out_folds.csv"
    }  # fmt: skip
    with Image.open(folder / "out_features.png") as picture:
        assert picture.width == 1650


def test_the_confounder_may_be_a_column_of_the_slides(folder: Path) -> None:
    expected = evaluate(folder, folder / "labels.csv", apd=0, resamples=20)
    joined = evaluate(folder, without(folder, "scanner"), slides=str(folder / "slides.csv"), apd=0, resamples=20)
    assert [row.estimates for row in joined.rows] == [row.estimates for row in expected.rows]
    root = folder / "root"
    root.mkdir()
    (root / "slides_status.csv").write_text((folder / "slides.csv").read_text().replace("sample_id", "slide_id"))
    from_root = evaluate(folder, without(folder, "scanner"), slides=str(root), apd=0, resamples=20)
    assert [row.estimates for row in from_root.rows] == [row.estimates for row in expected.rows]


def test_the_written_folds_can_be_given_again(folder: Path) -> None:
    first = evaluate(folder, folder / "labels.csv", apd=0, resamples=20)
    other = {"seed": 5, "output": str(folder / "again.json"), "apd": 0, "resamples": 0}
    again = evaluate(folder, folder / "labels.csv", splits=str(folder / "out_folds.csv"), **other)
    values = [[row.estimates["scanner_probe"].value for row in one.rows] for one in (first, again)]
    assert values[0] == pytest.approx(values[1], abs=0.02)
    assert again.about["folds"] == first.about["folds"] == 3


def test_only_test_rows_of_a_split_table_are_scored(folder: Path) -> None:
    with (folder / "labels.csv").open() as file:
        header, *rows = csv.reader(file)
    split = [[*row, "train" if int(row[4][1:]) < 4 else "test"] for row in rows]
    table = write(folder / "split.csv", [*header, "partition"], split)
    tested = [row[:5] for row in split if row[5] == "test"]
    alone = write(folder / "alone.csv", header, tested)
    first, second = (evaluate(folder, labels, apd=0, resamples=20) for labels in (table, alone))
    assert first.about["queries"] == len(tested)
    assert first.rows[0].estimates["ri"] == second.rows[0].estimates["ri"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "scaner"}, r"expected a column scaner, found .*; did you mean 'scanner'\?"),
        (
            {"by": "lab", "slides": "slides.csv"},
            r"slides.csv: expected columns lab; missing lab; found sample_id, image_path",
        ),
        ({"slides": "none.csv"}, r"expected a slides.csv, or a ROOT with slides_status.csv, at .*none.csv, found none"),
        ({"by": "slide_id"}, r"at least m=2 rows of other patients of another class and the same slide_id .* found 0"),
        ({"k": [3, 200]}, r"expected at least k=200 rows of other patients for every row, found 150"),
    ],
)
def test_invalid_input_is_one_line_and_leaves_no_file(folder: Path, changes: dict, message: str) -> None:
    if "slides" in changes:
        changes = {**changes, "slides": str(folder / changes["slides"])}
    with pytest.raises(DataError, match=message) as caught:
        evaluate(folder, folder / "labels.csv", **changes)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("out*"))


def test_slides_without_a_value_are_named(folder: Path) -> None:
    lines = (folder / "slides.csv").read_text().splitlines()
    (folder / "slides.csv").write_text("\n".join(line for line in lines if not line.startswith(("s3,", "s7,"))))
    with pytest.raises(DataError, match=r"a scanner of every labelled slide, found none of 2 of 16 \(s3, s7\)"):
        evaluate(folder, folder / "labels.csv", slides=str(folder / "slides.csv"))


def test_the_command_prints_a_row_per_model_and_ends_with_2_for_wrong_input(folder: Path) -> None:
    table = str(folder / "labels.csv")
    settings = ["by=scanner", "device=cpu", "k=[3]", "m=2", "apd=0", "folds=2", "resamples=10", "cache=none"]
    done = CliRunner().invoke(app, ["evaluate", "robustness", str(folder / "ours.pt"), table, *settings])
    assert done.exit_code == 0, done.output
    assert "ours.pt" in done.output and "chance" in done.output
    wrong = CliRunner().invoke(app, ["evaluate", "robustness", str(folder / "ours.pt"), table, "by=label"])
    assert wrong.exit_code == 2
    shown = CliRunner().invoke(app, ["evaluate", "robustness", "--help"])
    assert "robustness index" in shown.output
