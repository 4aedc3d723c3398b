"""Several models on one table: names, baselines, the cache of features, folds, and the files of results."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import save_checkpoint

from dino import api
from dino.config.schema import ClusterConfig, CompareConfig, FewshotConfig, KnnConfig, LinearConfig, RetrievalConfig
from dino.errors import ConfigError, DataError
from dino.evaluate.results import read_result
from dino.extraction import embed

SETTINGS = {"device": "cpu", "precision": "fp32", "resamples": 50}
LINEAR = LinearConfig(**SETTINGS, strengths=[0.01, 1.0])


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """48 noisy red and blue pictures of 12 patients, without partitions."""
    generator = np.random.default_rng(0)
    lines = ["image_path,label,patient_id"]
    for i in range(48):
        shift = np.array([12, 0, -12]) * (1 - 2 * (i % 2))
        pixels = 128 + shift + generator.integers(-60, 60, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{('red', 'blue')[i % 2]},patient {i // 4}")
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Two run folders of one name."""
    for folder, seed in (("ours", 1), ("theirs", 2)):
        path = tmp_path / folder / "patch" / "checkpoints" / "last.pt"
        save_checkpoint(path, config={"seed": seed}, training_slides={"slide_ids": []})
    return [str(tmp_path / "ours" / "patch"), str(tmp_path / "theirs" / "patch")]


def test_models_and_baselines_have_a_row_each_and_files_are_written(table: Path, models: list[str]) -> None:
    result = api.evaluate("linear", models, table, LINEAR)
    names = ["ours/patch", "theirs/patch", "random initialization", "pixels 8x8", "chance"]
    assert [row.name for row in result.rows] == names
    assert (result.primary, result.about["grouped_by"], result.about["resampled"]) == (
        "balanced_accuracy",
        "patients",
        12,
    )
    for row in result.rows[:4]:
        found = row.estimates["accuracy"]
        assert found.value is not None and found.low is not None and found.high is not None
        assert found.low <= found.value <= found.high
    assert not result.rows[0].differences and result.rows[1].differences.keys() == result.rows[0].estimates.keys()
    written = Path(models[0], "linear_labels.json")
    assert read_result(written).to_dict() == json.loads(written.read_text())
    assert written.with_suffix(".csv").read_text().count("\n") == 1 + 5 * 3
    with Image.open(written.with_suffix(".png")) as figure:
        assert figure.width > 1000


def test_written_folds_give_the_same_scores(table: Path, models: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out" / "first.json"
    first = api.evaluate("linear", models, table, LinearConfig(**SETTINGS, strengths=[1.0], output=str(output)))
    again = LinearConfig(**SETTINGS, strengths=[1.0], splits=str(output.with_name("first_folds.csv")), seed=9, folds=2)
    second = api.evaluate("linear", models, table, again)
    values = [[row.estimates["auc"].value for row in result.rows[:2]] for result in (first, second)]
    assert values[0] == values[1]
    assert second.about["folds"] == 5
    split = tmp_path / "split.csv"
    lines = table.read_text().splitlines()
    split.write_text(
        "\n".join(
            [lines[0] + ",partition", *(f"{line},{('train', 'test')[i // 24]}" for i, line in enumerate(lines[1:]))]
        )
    )
    with pytest.raises(ConfigError, match="found both"):
        api.evaluate("linear", models, split, again)


def test_files_are_embedded_once(
    table: Path, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    embed_files = embed.FileEmbedder.embed

    def counted(self, *arguments, **settings):
        calls.append(len(self.paths))
        return embed_files(self, *arguments, **settings)

    monkeypatch.setattr(embed.FileEmbedder, "embed", counted)
    cache = {**SETTINGS, "cache": str(tmp_path / "cache")}
    first = api.evaluate("knn", models, table, KnnConfig(**cache, k=[3]))
    assert calls == [48] * 2  # the models, whose weights are equal, with pixels; the random initialization
    for evaluation, config in (
        ("knn", KnnConfig(**cache, k=[3])),
        ("fewshot", FewshotConfig(**cache, shots=[1, 2], draws=5)),
        ("retrieval", RetrievalConfig(**cache)),
        ("cluster", ClusterConfig(**cache)),
    ):
        result = api.evaluate(evaluation, models, table, config)
        assert len(result.rows) == 5 and all(row.estimates for row in result.rows[:4])
        if evaluation == "knn":
            assert result.rows == first.rows
    assert len(calls) == 2
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(table.with_name("0.png"))  # a file that has changed
    api.evaluate("cluster", models[:1], table, ClusterConfig(**cache))
    assert len(calls) == 4
    api.evaluate("cluster", models[:1], table, ClusterConfig(**{**cache, "cache": "none"}))
    assert len(calls) == 6


def test_results_are_compared_in_one_table(table: Path, models: list[str], tmp_path: Path) -> None:
    files = [tmp_path / "linear.json", tmp_path / "retrieval.json"]
    api.evaluate("linear", models, table, LinearConfig(**SETTINGS, strengths=[1.0], output=str(files[0])))
    api.evaluate("retrieval", models, table, RetrievalConfig(**SETTINGS, output=str(files[1])))
    rows, header = api.compare(files, CompareConfig(output=str(tmp_path / "table.tex")))
    assert len(rows) == 10 and header[3] == "metric"
    text = (tmp_path / "table.tex").read_text()
    assert r"balanced accuracy" in text and r"\midrule" in text and (tmp_path / "table.png").is_file()
    api.compare(files, CompareConfig(output=str(tmp_path / "table.md")))
    assert (tmp_path / "table.md").read_text().count("\n") == 12
    with pytest.raises(ConfigError, match=r"the ending \.md, \.tex, \.csv"):
        api.compare(files, CompareConfig(output=str(tmp_path / "table.xlsx")))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="expected the JSON file of an evaluation"):
        api.compare([tmp_path / "other.json"], CompareConfig())


def test_bad_input_ends_in_one_line_and_writes_nothing(table: Path, models: list[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="at least 2 folds and as many patients"):
        api.evaluate("linear", models, table, LinearConfig(**SETTINGS, folds=13))
    region = str(save_checkpoint(tmp_path / "region.pt", "region", 8))
    with pytest.raises(DataError, match="expected models of one level"):
        api.evaluate("linear", [models[0], region], table, LINEAR)
    with pytest.raises(ConfigError, match="resamples of 0 or more"):
        api.evaluate("linear", models, table, LinearConfig(**{**SETTINGS, "resamples": -1}))
    with pytest.raises(DataError, match="could not read it"):
        api.evaluate("linear", models, table, LinearConfig(**SETTINGS, splits=str(tmp_path / "none.csv")))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, Path(region)])


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("labels.json", "replaces no table that is read, found output=.*labels.json, which writes .*labels.csv"),
        ("labels.csv", r"expected output=FILE.json, with .csv and .png beside it, found .*labels.csv"),
        ("sub/../labels", "which writes .*labels.csv"),
    ],
)
def test_a_result_does_not_replace_the_labels(table: Path, models: list[str], output: str, words: str) -> None:
    (table.parent / "sub").mkdir()
    before = table.read_bytes()
    with pytest.raises(ConfigError, match=words):
        api.evaluate("linear", models, table, LinearConfig(**SETTINGS, output=str(table.parent / output)))
    assert table.read_bytes() == before
    folds = table.rename(table.parent / "labels_folds.csv")
    with pytest.raises(ConfigError, match="which writes .*labels_folds.csv"):
        api.evaluate("linear", models, folds, LinearConfig(**SETTINGS, output=str(table.with_suffix(".json"))))
