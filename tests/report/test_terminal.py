import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from dino.config.schema import LEVEL_CONFIGS, EvaluateConfig, ModelConfig, PatchConfig, RegionConfig
from dino.report.terminal import next_commands, run_panel
from dino.train.run_folder import RunReader

VERDICT = {"word": "learning", "text": "Learning. The features beat those of the untrained network clearly."}
STATUS = {"state": "finished", "step": 1200, "total_steps": 1200, "bad_files": 0, "warnings": [], "verdict": VERDICT}


def line(step: int, loss: float) -> dict:
    return {"step": step, "epoch": step / 800, "loss": loss, "loss_relative": loss / 8, "seconds": 1800.0} | {
        "samples_per_second": 50.0
    }


def evaluation(step: int, score: float) -> dict:
    return {"step": step, "evaluation": {"teacher": {"knn_20_accuracy": score}, "student": {"knn_20_accuracy": 0.1}}}


LINES = [
    {"step": 0, "evaluation": {"random_initialization": {"knn_20_accuracy": 0.5}}},
    line(600, 8.0),
    *[evaluation(600, 0.75), line(1200, 6.0), evaluation(1200, 0.75)],
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in LINES))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def shown(run: Path, config: PatchConfig | RegionConfig, encoding: str = "utf-8", **status: object) -> str:
    (run / "status.json").write_text(json.dumps({**STATUS, **status}))
    level = next(name for name, schema in LEVEL_CONFIGS.items() if isinstance(config, schema))
    (run / "identity.json").write_text(json.dumps({"level": level}))
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=80, highlight=False).print(run_panel(RunReader(run), config))
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_panel_fits_80_columns_and_24_rows(run: Path) -> None:
    (run / "checkpoints" / "best.pt").touch()
    text = shown(run, PatchConfig(evaluate=EvaluateConfig(k=[20])))
    rows = text.splitlines()
    assert len(rows) <= 24 and {len(row) for row in rows} == {80}
    plain = "".join(row.strip("│ ") for row in rows)  # long paths are broken, not cut
    for fact in (
        "pretrain patch: finished",
        "1,200 of 1,200, 1.5 passes",
        "1:00:00, 50.0 img/s",
        "8.000 -> 6.000 (1.000 -> 0.750 of ln K)",
        "best 0.750 at step 600, last 0.750, random initialization 0.500",
        "Learning. The features beat",
        f"{run}/checkpoints/best.pt".replace(" ", ""),
    ):
        assert fact.replace(" ", "") in plain.replace(" ", ""), fact
    assert text.count("none") == 2


def test_warnings_are_shown_without_interpreting_markup(run: Path) -> None:
    warnings = ["[red]first[/red] \x1b[31m", "second", "third", "fourth"]
    text = shown(
        run, RegionConfig(evaluate=EvaluateConfig(k=[5])), state="early_stopped", bad_files=3, warnings=warnings
    )
    assert r"[red]first[/red] \x1b[31m" in text and "second" in text and "third" not in text
    assert "and 2 more in status.json" in text and "3, listed in quarantine.csv" in text
    assert "pretrain region: stopped early" in text and "5-NN" not in text


@pytest.mark.parametrize("key", ["random_initialization", "untrained"])
def test_self_retrieval_is_shown_without_labels(run: Path, key: str) -> None:
    floor = {"own_place_teacher": 0.9, f"own_place_{key}": 0.25, "comparison": {}}
    (run / "metrics.jsonl").write_text(json.dumps(line(1200, 6.0)) + "\n")
    text = shown(run, PatchConfig(), floor=floor)
    assert "90.0% of the samples, random" in text and "initialization 25.0%" in text and "last.pt" in text


def test_a_frozen_teacher_is_shown_beside_the_run_with_both_scores(run: Path) -> None:
    first = {
        "step": 0,
        "evaluation": {name: {"knn_20_accuracy": 0.5} for name in ("random_initialization", "frozen_teacher")},
    }
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (first, *LINES[1:])))
    floor = {"own_place_teacher": 0.25, "own_place_random_initialization": 0.125, "own_place_frozen_teacher": 0.5}
    text = shown(run, PatchConfig(evaluate=EvaluateConfig(k=[20])), floor=floor)
    words = " ".join("".join(row.strip("│") for row in text.splitlines()).split())
    assert "last 0.750, random initialization 0.500, frozen teacher 0.500" in words
    assert "25.0% of the samples, random initialization 12.5%, frozen teacher 50.0%" in words


def test_initial_weights_and_random_ones_are_shown_and_the_former_may_be_the_best(run: Path) -> None:
    start = {"initial_weights": {"knn_20_accuracy": 0.875}, "random_initialization": {"knn_20_accuracy": 0.5}}
    log = [{"step": 0, "evaluation": start}, *LINES[1:]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in log))
    config = PatchConfig(evaluate=EvaluateConfig(k=[20]), model=ModelConfig(init="timm:vit_tiny"))
    text = shown(run, config)
    plain = " ".join(row.strip("│ ") for row in text.splitlines())
    assert "best 0.875 at step 0, last 0.750, initial weights 0.875, random initialization 0.500" in " ".join(
        plain.split()
    )
    old = [
        {"step": 0, "evaluation": {"untrained": {"knn_20_accuracy": 0.875}}},
        *LINES[1:],
    ]  # as version 0.1.0 wrote it
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in old))
    assert "initial weights" in " ".join(shown(run, config).split())


def test_losses_of_any_names_are_shown(run: Path) -> None:
    first = {k: v for k, v in line(600, 8.0).items() if k != "loss_relative"} | {"loss/dino": 7.0, "loss/masked": 1.0}
    last = {**first, "step": 1200, "loss": 5.0, "loss/dino": 4.5, "loss/masked": 0.5}
    (run / "metrics.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(last) + "\n")
    text = shown(run, PatchConfig())
    assert "8.000 -> 5.000" in text and "7.000 -> 4.500" in text and "1.000 -> 0.500" in text and "ln K" not in text


def test_commands_are_quoted_for_the_shell(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    root = Path("my slides")
    root.mkdir()
    (root / "regions.csv").touch()
    folder = Path("it's a run")
    (folder / "checkpoints").mkdir(parents=True)
    commands = next_commands(folder, PatchConfig(data_dir=str(root)))
    assert [shlex.split(command) for command in commands] == [
        ["dino", "extract", "it's a run", "my slides"],
        ["dino", "evaluate", "knn", "it's a run", "labels.csv"],
    ]


def test_a_terminal_of_ascii_only_gets_ascii(run: Path) -> None:
    assert "steps" in shown(run, PatchConfig(), encoding="ascii")
