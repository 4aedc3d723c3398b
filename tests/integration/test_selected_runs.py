"""A run is scored for robustness and by a linear probe while it trains, and its checkpoint may be chosen by them."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_group
from tiny_models import save_checkpoint
from tiny_runs import Crash, assert_same_bits, config, crash_after, last, metrics, with_evaluation

from dino import api
from dino.api import pretrain
from dino.config.schema import KnnConfig
from dino.errors import ConfigError, DataError
from dino.evaluate import robustness

KNN = {"k": [3], "device": "cpu", "precision": "fp32", "num_workers": 1}
NAMES = {"robustness_ri", "robustness_mari", "robustness_croma"}


def with_robustness(data: Path, select: str, **changes: object) -> dict[str, object]:
    """Settings of a run that is scored by the labels of :func:`with_evaluation` and by centres of the same images."""
    settings = with_evaluation(data, patience=0)
    lines = Path(str(settings["evaluate.labels"])).read_text().splitlines()
    rows = [f"{line.split(',')[0]},{'xy'[i // 2 % 2]},{'AB'[i % 2]},val,h{i}" for i, line in enumerate(lines[1:])]
    table = data.parent / "centres.csv"
    table.write_text("\n".join(["image_path,label,centre,partition,slide_id", *rows]))
    return {**settings, "evaluate.robustness": str(table), "evaluate.select": select, **changes}


def evaluations(run: Path) -> dict[int, dict]:
    return {line["step"]: line["evaluation"] for line in metrics(run) if "evaluation" in line}


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_robustness_is_logged_and_changes_nothing_else(
    level: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = request.getfixturevalue(level)
    plain = {**with_robustness(data, "knn"), "evaluate.robustness": None}
    pretrain(config(data, tmp_path / "plain", **plain))
    pretrain(config(data, tmp_path / "scored", **with_robustness(data, "knn")))
    first, second = evaluations(tmp_path / "plain"), evaluations(tmp_path / "scored")
    assert first.keys() == second.keys() and len(first) == 5
    for step, networks in second.items():
        for name, scores in networks.items():
            assert scores.keys() - first[step][name].keys() == NAMES
            assert {key: scores[key] for key in first[step][name]} == first[step][name]
            assert all(0 <= scores[f"robustness_{one}"] <= 1 for one in ("ri", "mari"))
    one, other = (
        torch.load(tmp_path / run / "checkpoints" / "best.pt", weights_only=True) for run in ("plain", "scored")
    )
    assert one["step"] == other["step"] and one["selection"] == other["selection"]
    assert all(torch.equal(one["teacher"][key], other["teacher"][key]) for key in one["teacher"])


def test_the_logged_scores_are_those_of_the_checkpoint(tiles: Path, tmp_path: Path) -> None:
    """Robustness and the linear probe of the exported network, computed from its features alone."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from torchvision.io import read_image

    from dino.evaluate import read_labels
    from dino.evaluate.confounders import design
    from dino.evaluate.robustness import neighbour_measures
    from dino.evaluate.selection import select_rows
    from dino.extraction.embed import embed, normaliser
    from dino.models.weights import load_backbone_file

    settings = with_robustness(tiles, "mean", **{"evaluate.k": [3]})
    pretrain(config(tiles, tmp_path / "run", **settings))
    loaded = load_backbone_file(tmp_path / "run" / "checkpoints" / "last.pt")
    assert loaded.transform is not None
    normalise = normaliser(loaded.transform.mean, loaded.transform.std, 16)

    def features(paths: list[Path]) -> np.ndarray:
        batches = [read_image(str(path))[None] for path in paths]
        return embed(loaded.backbone, batches, normalise, torch.device("cpu"), "fp32").numpy()

    table = read_labels(Path(str(settings["evaluate.robustness"])), (), columns=("centre",))
    found = design("centre", table.labels, table.columns["centre"], [str(i) for i in range(len(table.labels))])
    statistics, _ = neighbour_measures(features(table.paths), found, [3], 5)
    logged = evaluations(tmp_path / "run")[8]["teacher"]
    for name in ("ri", "mari", "croma"):
        assert logged[f"robustness_{name}"] == pytest.approx(statistics[name](np.ones((1, 20)))[0], abs=1e-4)

    labels = read_labels(Path(str(settings["evaluate.labels"])))
    rows = select_rows(labels)
    values, truth = features(labels.paths), np.array(labels.labels)
    scaler = StandardScaler().fit(values[rows.references])
    model = LogisticRegression(C=0.01).fit(scaler.transform(values[rows.references]), truth[rows.references])
    accuracy = (model.predict(scaler.transform(values[rows.queries])) == truth[rows.queries]).mean()
    assert logged["linear_accuracy"] == pytest.approx(accuracy)
    parts = [logged[name] for name in ("knn_3_accuracy", "linear_accuracy", "robustness_ri")]
    assert logged["mean_score"] == pytest.approx(np.mean(parts))


@pytest.mark.parametrize(
    ("select", "tracked"),
    [("knn", "knn_3_accuracy"), ("linear", "linear_accuracy"), ("robustness", "robustness_ri"), ("mean", "mean_score")],
)
def test_the_selected_score_chooses_the_best_checkpoint(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, tracked: str
) -> None:
    pretrain(config(tiles, tmp_path / "run", **with_robustness(tiles, select)))
    found = {step: one["teacher"][tracked] for step, one in evaluations(tmp_path / "run").items() if step}
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    assert best["step"] == min(step for step, score in found.items() if score == max(found.values()))
    assert last(tmp_path / "run")["state"]["callbacks"]["Judge"]["tracked"] == tracked
    (*sets,) = best["selection"]
    assert [one["score"] for one in sets] == [tracked] * (2 if select == "mean" else 1)
    assert [one["count"] for one in sets] == {"robustness": [20], "mean": [12, 20]}.get(select, [12])
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["floor"]["comparison"]["teacher"] == found[8]


def test_rows_that_chose_the_checkpoint_for_robustness_do_not_score_it(tiles: Path, tmp_path: Path) -> None:
    settings = with_robustness(tiles, "robustness")
    pretrain(config(tiles, tmp_path / "run", **settings))
    with pytest.raises(DataError, match=r"8 of 8 that did"):
        api.evaluate_knn(str(tmp_path / "run"), str(settings["evaluate.labels"]), KnnConfig(**KNN))  # type: ignore[arg-type]


def test_a_run_without_labels_may_be_scored_for_robustness_alone(tiles: Path, tmp_path: Path) -> None:
    settings = {**with_robustness(tiles, "mean"), "evaluate.labels": None}
    pretrain(config(tiles, tmp_path / "run", **settings))
    assert set(evaluations(tmp_path / "run")[8]["teacher"]) == NAMES
    assert last(tmp_path / "run")["state"]["callbacks"]["Judge"]["tracked"] == "robustness_ri"


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_a_crash_changes_no_bit_of_a_run_that_is_selected_by_the_mean(
    level: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = request.getfixturevalue(level)
    settings = with_robustness(data, "mean")
    pretrain(config(data, tmp_path / "whole", **settings))
    for steps in (3, 7):
        with monkeypatch.context() as patch, pytest.raises(Crash):
            crash_after(patch, steps)
            pretrain(config(data, tmp_path / "cut", **settings))
    pretrain(config(data, tmp_path / "cut", **settings))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_processes_with_different_shares_select_as_one(tiles: Path, tmp_path: Path) -> None:
    """21 images on two processes: none waits for the other, and both have the scores of one process."""
    settings = with_robustness(tiles, "mean", **{"speed.precision": "fp64"})
    table = Path(str(settings["evaluate.robustness"]))
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))  # 19 rows
    runs = {}
    for name, processes in (("one", 1), ("two", 2)):
        run = config(tiles, tmp_path / name, **settings, **{"training.batch_size_per_gpu": 4 // processes})
        run_group(partial(pretrain, run), processes)
        runs[name] = evaluations(tmp_path / name)
    assert runs["one"].keys() == runs["two"].keys()
    for step, networks in runs["one"].items():
        for network, scores in networks.items():
            assert scores == pytest.approx(runs["two"][step][network], abs=1e-6)
    best = [torch.load(tmp_path / name / "checkpoints" / "best.pt", weights_only=True)["step"] for name in runs]
    assert best[0] == best[1]


def test_features_that_say_nothing_are_neutral(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapsed network does not end the run."""
    nothing = lambda *_: ({name: lambda weights: np.array([np.nan]) for name in robustness.NEUTRAL}, {})  # noqa: E731
    monkeypatch.setattr(robustness, "neighbour_measures", nothing)
    pretrain(config(tiles, tmp_path / "run", **with_robustness(tiles, "robustness")))
    assert evaluations(tmp_path / "run")[8]["teacher"]["robustness_ri"] == 0.5


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"evaluate.select": "recall"},
            ConfigError,
            r"evaluate.select as knn, linear, robustness, mean, found 'recall'",
        ),
        ({"evaluate.robustness": None}, ConfigError, r"evaluate.robustness=FILE for evaluate.select=robustness"),
        (
            {"evaluate.labels": None, "evaluate.select": "linear"},
            ConfigError,
            r"evaluate.labels=FILE .*select=robustness",
        ),
        ({"evaluate.robustness_by": "center"}, DataError, r"expected a column center, .*did you mean 'centre'\?"),
        ({"evaluate.robustness_by": "partition"}, DataError, r"at least two values of partition.*only 'val'"),
    ],
)
def test_settings_that_do_not_fit_end_before_the_first_step(
    tiles: Path, tmp_path: Path, changes: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pretrain(config(tiles, tmp_path / "run", **{**with_robustness(tiles, "robustness"), **changes}))
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


def test_test_rows_score_no_run(tiles: Path, tmp_path: Path) -> None:
    settings = with_robustness(tiles, "robustness")
    table = Path(str(settings["evaluate.robustness"]))
    table.write_text(table.read_text().replace(",val,", ",test,"))
    with pytest.raises(DataError, match="partition val or train, found only test rows"):
        pretrain(config(tiles, tmp_path / "run", **settings))


def test_the_selection_goes_on_from_initial_weights(tiles: Path, tmp_path: Path) -> None:
    """The initial weights are the first best checkpoint, by the selected score, and pass on what chose them."""
    settings = with_robustness(tiles, "robustness")
    start = save_checkpoint(tmp_path / "start.pt")
    pretrain(
        config(
            tiles,
            tmp_path / "run",
            **{**settings, "model.init": str(start), "model.arch": "vit:dim=16,depth=1,heads=2"},
        )
    )
    found = evaluations(tmp_path / "run")
    assert set(found[0]) == {"initial_weights", "random_initialization"}
    assert all(scores.keys() >= NAMES for scores in found[0].values())
