"""What chooses a checkpoint does not score it; a run is compared with what it started from, and cannot end worse."""

import csv
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import KILLED, Point, die_at, exit_codes, fork
from tiny_models import save_checkpoint
from tiny_runs import assert_same_bits, config, last, metrics, with_evaluation
from typer.testing import CliRunner

from dino import api
from dino.api import judging, measuring, pretrain
from dino.cli.main import app
from dino.config.schema import ExportConfig, KnnConfig, PatchConfig, RegionConfig
from dino.errors import DataError
from dino.models.weights import load_backbone_file
from dino.report.terminal import next_commands
from dino.train.loop import Trainer

KNN = {"k": [3], "device": "cpu", "precision": "fp32", "num_workers": 1}
DECLINING = {0: 1.0, 2: 1.0, 4: 0.0, 6: 0.0, 8: 0.0}


def rewrite(labels: Path, name: str, partition: dict[str, str]) -> Path:
    """A copy of a table under another name, with other partitions."""
    with labels.open() as file:
        rows = list(csv.DictReader(file))
    copy = labels.with_name(name)
    lines = [f"{row['image_path']},{row['label']},{partition[row['partition']]},{row['slide_id']}" for row in rows]
    copy.write_text("\n".join(["image_path,label,partition,slide_id", *lines]))
    return copy


def three_parts(labels: Path) -> Path:
    """A copy with every fourth train row as val."""
    lines = labels.read_text().splitlines()
    trains = [i for i, line in enumerate(lines) if ",train," in line]
    for i in trains[1::4] + trains[2::4]:
        lines[i] = lines[i].replace(",train,", ",val,")
    copy = labels.with_name("parts.csv")
    copy.write_text("\n".join(lines))
    return copy


@pytest.fixture
def start(tmp_path: Path, tiles: Path) -> Path:
    """The initial weights of a run that is to be continued."""
    pretrain(config(tiles, tmp_path / "before", **{"training.max_steps": 1}))
    return tmp_path / "before"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, float]]:
    """Scores by the step, which the test fills in."""
    trainers: list[Trainer] = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: (trainers.append(self), fit(self)))
    scores: dict[int, float] = {}
    score = lambda *_: {"knn_3_accuracy": scores.get(trainers[-1].step, 0.5)}  # noqa: E731
    monkeypatch.setattr(measuring, "table_scores", score)
    yield scores


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_the_suggested_command_scores_rows_that_did_not_choose_the_checkpoint(
    level: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = request.getfixturevalue(level)
    settings = config(data, tmp_path / "run", **with_evaluation(data))
    pretrain(settings)
    (command,) = [line for line in next_commands(tmp_path / "run", settings) if "evaluate" in line]
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "k=[3]", "device=cpu", "precision=fp32"])
    assert result.exit_code == 0, result.output
    assert "optimistic" not in result.output and "rows by content" in result.output

    swapped = rewrite(Path(settings.evaluate.labels), "renamed.csv", {"train": "test", "test": "train"})
    with pytest.raises(DataError, match="expected test rows that did not choose the checkpoint"):
        api.evaluate_knn(str(tmp_path / "run"), swapped, KnnConfig(**KNN))
    arguments = ["evaluate", "knn", str(tmp_path / "run"), str(swapped), "k=[3]", "device=cpu", "allow_leakage=true"]
    assert "test rows that chose the checkpoint" in CliRunner().invoke(app, arguments).output
    written = json.loads((tmp_path / "run" / "knn_renamed.json").read_text())["about"]["selection"]
    assert written["allowed"] and written["seen_rows"] == swapped.read_text().count(",test,")

    export = tmp_path / "elsewhere"
    api.export(str(tmp_path / "run"), export, ExportConfig())
    with pytest.raises(DataError, match="did not choose the checkpoint"):
        api.evaluate_knn(str(export), swapped, KnnConfig(**KNN))


def test_the_labels_of_test_rows_do_not_enter_a_run(tiles: Path, tmp_path: Path) -> None:
    labels = with_evaluation(tiles)
    pretrain(config(tiles, tmp_path / "first", **labels))
    table = Path(str(labels["evaluate.labels"]))
    lines = [
        line.replace(",a,test", ",z,test").replace(",b,test", ",a,test") for line in table.read_text().splitlines()
    ]
    table.write_text("\n".join(lines))
    pretrain(config(tiles, tmp_path / "second", **labels))
    assert_same_bits(tmp_path / "first", tmp_path / "second")
    table.write_text("\n".join(line for line in lines if ",test," not in line))
    without = config(tiles, tmp_path / "third", **labels)
    pretrain(without)
    assert metrics(tmp_path / "first") == metrics(tmp_path / "third")
    assert not next_commands(tmp_path / "third", without)


def test_val_rows_choose_and_train_rows_may_not_be_scored_either(tiles: Path, tmp_path: Path) -> None:
    labels = with_evaluation(tiles)
    table = three_parts(Path(str(labels["evaluate.labels"])))
    pretrain(config(tiles, tmp_path / "run", **{**labels, "evaluate.labels": str(table)}))
    (record,) = last(tmp_path / "run")["selection"]
    assert record["count"] == table.read_text().count(",train,") + table.read_text().count(",val,")
    api.evaluate_knn(str(tmp_path / "run"), table, KnnConfig(**KNN))
    for name, partition in (
        ("val.csv", {"val": "test", "test": "val"}),
        ("train.csv", {"train": "test", "val": "val"}),
    ):
        other = rewrite(table, name, {"train": "train", "val": "val", "test": "train", **partition})
        with pytest.raises(DataError, match="did not choose the checkpoint"):
            api.evaluate_knn(str(tmp_path / "run"), other, KnnConfig(**KNN))


def test_rows_that_chose_the_initial_weights_are_remembered(tiles: Path, tmp_path: Path) -> None:
    labels = with_evaluation(tiles)
    pretrain(config(tiles, tmp_path / "first", **labels))
    second = config(tiles, tmp_path / "second", **{"model.init": str(tmp_path / "first"), "training.max_steps": 2})
    pretrain(second)
    swapped = rewrite(Path(str(labels["evaluate.labels"])), "renamed.csv", {"train": "test", "test": "train"})
    with pytest.raises(DataError, match="did not choose the checkpoint"):
        api.evaluate_knn(str(tmp_path / "second"), swapped, KnnConfig(**KNN))


def test_models_without_a_record_are_scored_and_said_to_be_unknown(
    tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = Path(str(with_evaluation(tiles)["evaluate.labels"]))
    result = api.evaluate_knn(str(save_checkpoint(tmp_path / "old.pt")), table, KnnConfig(**KNN))
    assert result["about"]["selection"]["compared"].startswith("unknown")
    assert "unknown: the model has no record" in capsys.readouterr().out
    pretrain(config(tiles, tmp_path / "run", **{"training.max_steps": 1}))
    result = api.evaluate_knn(str(tmp_path / "run"), table, KnnConfig(**KNN))
    assert result["about"]["selection"]["compared"] == "no rows chose it"


def test_a_continued_run_is_compared_with_initial_weights_and_with_random_ones(
    tiles: Path, tmp_path: Path, start: Path
) -> None:
    labels = with_evaluation(tiles)
    run = tmp_path / "run"
    pretrain(config(tiles, run, **{**labels, "model.init": str(start)}))
    result = api.evaluate_knn(str(run), Path(str(labels["evaluate.labels"])), KnnConfig(**KNN))
    columns = ["model", "initial_weights", "random_initialization", "pixels_8x8"]
    assert [name for name in result if name in columns] == columns
    table = Path(str(labels["evaluate.labels"]))
    alone = api.evaluate_knn(str(start / "checkpoints" / "last.pt"), table, KnnConfig(**KNN))
    assert result["initial_weights"] == alone["model"]
    assert result["random_initialization"] == alone["random_initialization"]
    assert list(metrics(run)[0]["evaluation"]) == ["initial_weights", "random_initialization"]
    status = json.loads((run / "status.json").read_text())
    assert {"initial_weights", "random_initialization"} <= status["floor"]["comparison"].keys()
    assert "untrained" not in json.dumps(status)
    text = status["verdict"]["text"]
    assert "those of the initial weights" in text and "initial weights 0." in text
    assert "random initialization 0." in text and "interval" in text


def test_a_run_that_declines_stops_early_and_keeps_the_initial_weights(
    tiles: Path, tmp_path: Path, start: Path, scripted: dict[int, float]
) -> None:
    scripted.update(DECLINING)
    labels = {**with_evaluation(tiles, patience=0), "training.max_steps": 20}
    run = tmp_path / "run"
    assert pretrain(config(tiles, run, **{**labels, "model.init": str(start)})).state == "early_stopped"
    status = json.loads((run / "status.json").read_text())
    assert status["step"] == 8 and any("below that of the initial weights" in text for text in status["warnings"])
    assert status["verdict"]["word"] in {"declined", "collapsed"}
    assert "is the initial weights" in status["verdict"]["reason"]
    best, initial = (torch.load(run / "checkpoints" / name, weights_only=True) for name in ("best.pt", "start.pt"))
    assert best["step"] == 0 and all(torch.equal(best["teacher"][n], t) for n, t in initial["teacher"].items())
    exported, given = load_backbone_file(run / "backbone").backbone, load_backbone_file(start).backbone
    pixels = torch.rand(1, 3, 256, 256)  # the size that the export's position table is for
    torch.testing.assert_close(exported(pixels, cls_only=True).cls, given(pixels, cls_only=True).cls)

    never = {**labels, "model.init": str(start), "evaluate.decline_patience": 0}
    assert pretrain(config(tiles, tmp_path / "never", **never)).state == "finished"
    assert pretrain(config(tiles, tmp_path / "new", **labels)).state == "finished"  # from random weights


def test_without_labels_the_start_is_scored_and_a_later_checkpoint_is_kept_unless_it_is_worse(
    tiles: Path, tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    pretrain(config(tiles, run, **{"model.init": str(start), "evaluate.every_steps": 4, "optim.lr": 1e-6}))
    first = metrics(run)[0]
    assert first["step"] == 0 and list(first["evaluation"]) == ["initial_weights", "random_initialization"]
    floor = json.loads((run / "status.json").read_text())["floor"]
    names = {"self_retrieval_accuracy": "own_place_initial_weights"}
    assert all(first["evaluation"]["initial_weights"][name] == floor[key] for name, key in names.items())
    # Self-retrieval saturates, and the weights hardly moved: as good as the start, and trained for longer.
    assert torch.load(run / "checkpoints" / "best.pt", weights_only=True)["step"] == 8

    accuracies = iter([1.0, 0.5, 0.0, 0.0, 0.0, 0.0])  # of the two baselines, and of teacher and student, twice
    rest = {"effective_rank": 9.0, "mean_cosine": 0.5}
    scores = lambda _: {"self_retrieval_accuracy": next(accuracies, 0.5), **rest}  # noqa: E731
    monkeypatch.setattr(judging, "label_free_scores", scores)
    worse = config(tiles, tmp_path / "worse", **{"model.init": str(start), "evaluate.every_steps": 4})
    assert pretrain(worse).state == "finished"
    assert torch.load(tmp_path / "worse" / "checkpoints" / "best.pt", weights_only=True)["step"] == 0


MOMENTS = [
    Point(0, "torn", "start.pt"),
    Point(0, "open", "metrics.jsonl"),  # before the line on the initial weights
    Point(0, "torn", "last.pt"),  # the initial weights are the first best ones
    Point(0, "os.link", "best.pt"),
    Point(0, "os.rename", "best.pt"),
    Point(1, "open", "metrics.jsonl"),
    Point(2, "os.link", "best.pt"),
    Point(6, "open", "metrics.jsonl"),
    Point(8, "open", "last.pt"),  # the run is to stop, and does not know it any more
    Point(8, "open", "model.safetensors"),
]


@pytest.mark.parametrize("labelled", [True, False])
def test_killed_at_chosen_moments_a_continued_run_ends_with_the_same_bits(
    tiles: Path, tmp_path: Path, start: Path, scripted: dict[int, float], labelled: bool
) -> None:
    scripted.update({**DECLINING, 2: 1.0})
    changes = {"model.init": str(start), "training.max_steps": 20 if labelled else 8, "evaluate.every_steps": 2}
    changes |= with_evaluation(tiles, patience=0) if labelled else {}

    def settings(output: Path) -> PatchConfig | RegionConfig:
        return config(tiles, output, **changes)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    state = pretrain(settings(whole)).state
    assert state == ("early_stopped" if labelled else "finished")

    def work(point: Point) -> None:
        die_at(point)
        pretrain(settings(cut))

    for point in MOMENTS:
        if point == Point(2, "os.link", "best.pt") and labelled:
            continue  # no better than the start
        assert exit_codes([fork(lambda point=point: work(point))]) == [KILLED], point
    assert pretrain(settings(cut)).state == state
    assert_same_bits(whole, cut)
    ends = [json.loads((run / "status.json").read_text()) for run in (whole, cut)]
    for key in ("state", "step", "verdict", "floor"):
        assert ends[0][key] == ends[1][key]
    for end in ends:  # there may be warnings about the speed of the machine too
        assert labelled == any("below that of the initial weights" in text for text in end["warnings"])
