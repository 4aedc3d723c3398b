"""Runs that are resumed from their folder, and extended: the schedule of a segment, its record, kills at any moment."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    Crash,
    assert_same_bits,
    config,
    crash_after,
    last,
    make_grids,
    make_tiles,
    metrics,
    with_evaluation,
)
from typer.testing import CliRunner

from dino.api import info, pretrain, resume
from dino.api import pretraining as pretraining_module
from dino.cli.main import app
from dino.config.schema import ExtendConfig
from dino.errors import ConfigError
from dino.report import methods
from dino.report.gather import load_run
from dino.train.run_folder import RunFolder, RunReader

EXTEND = ExtendConfig(
    steps=5, lr=0.4, warmup_epochs=0.4
)  # 20 tiles or 12 grids in batches of 4: a warm-up of 2 or 1 steps


@pytest.fixture(params=["patch", "region"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make = make_tiles if request.param == "patch" else make_grids
    return make(tmp_path / "data")


def trained(data: Path, name: str, **changes: object) -> Path:
    run = data.parent / name
    assert pretrain(config(data, run, **changes)).state in ("finished", "early_stopped")
    return run


def identity(run: Path) -> dict:
    return json.loads((run / "identity.json").read_text())


def test_a_segment_has_the_stated_schedule_and_is_recorded(data: Path) -> None:
    run = trained(data, "run", **{"training.warmup_epochs": 0.7})
    before, lines = identity(run), metrics(run)
    assert resume(run, extend=EXTEND).steps == 13
    warmup = 2 if data.joinpath("slide0_0_0.png").exists() else 1
    segment = {
        "start": 8,
        "end": 13,
        "lr": 0.4 * 4 / 256,
        "min_lr": 1e-6,
        "warmup_steps": warmup,
        "momentum_teacher": 0.996,
    }
    assert identity(run) == {**before, "segments": [segment]}
    assert metrics(run)[: len(lines)] == lines  # the first segment is as it was
    assert metrics(run)[len(lines)] == {"step": 8, "segment": segment}
    for step, line in enumerate(metrics(run)[len(lines) + 1 :]):
        assert line["step"] == 9 + step
        if step < warmup:
            rate = segment["lr"] * step / max(1, warmup - 1)
        else:
            done = (step - warmup) / (5 - warmup)
            rate = 1e-6 + (segment["lr"] - 1e-6) * (1 + math.cos(math.pi * done)) / 2
        assert line["lr"] == pytest.approx(rate, rel=1e-12)
        assert line["momentum"] == pytest.approx(1 - 0.004 * (1 + math.cos(math.pi * step / 5)) / 2, rel=1e-12)
        assert line["weight_decay"] == 0.4
    assert last(run)["segments"] == [segment] and last(run)["total_steps"] == 13 == last(run)["step"]
    said = info(str(run / "backbone"))
    assert said["segments"] == [segment] and said["total_steps"] == 13
    status = RunReader(run).status()
    assert (status["state"], status["step"], status["total_steps"], status["segments"]) == ("finished", 13, 13, 1)


def test_a_segment_starts_from_all_state(data: Path) -> None:
    """The first step of a segment is that of a run whose schedules were the segment's at this step."""
    run = trained(data, "run")
    saved = last(run)
    resume(run, extend=ExtendConfig(steps=1, lr=0.4, warmup_epochs=0, momentum_teacher=0.5))
    found = last(run)
    assert found["optimizer"]["state"][0]["step"] == saved["optimizer"]["state"][0]["step"] + 1
    for name, tensor in saved["teacher"].items():
        if name != "backbone.pos_embed" and tensor.is_floating_point():
            expected = 0.5 * tensor + 0.5 * found["student"][name]
            torch.testing.assert_close(found["teacher"][name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "moment", ["before the record", "after the record", "at a step", "after a checkpoint", "at the end"]
)
def test_killed_at_any_moment_the_same_command_extends_once_and_to_the_same_bits(
    data: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = with_evaluation(data)
    expected = trained(data, "expected", **changes)
    end = last(expected)["step"]
    resume(expected, extend=EXTEND)
    run = trained(data, "run", **changes)
    with monkeypatch.context() as patched:
        if moment.endswith("the record"):
            claim = RunFolder.claim

            def crash(self: RunFolder, *arguments: object) -> None:
                if moment.startswith("after"):
                    claim(self, *arguments)  # type: ignore[arg-type]
                raise Crash

            patched.setattr(RunFolder, "claim", crash)
        elif moment == "at the end":
            patched.setattr(pretraining_module, "final_verdict", lambda *_: (_ for _ in ()).throw(Crash))
        else:
            crash_after(patched, end + (1 if moment == "at a step" else 3))
        with pytest.raises(Crash):
            resume(run, extend=EXTEND)
    assert not moment.startswith("after") or not RunReader(run).is_over()
    resume(run, extend=EXTEND)
    assert_same_bits(run, expected)
    assert resume(run, extend=EXTEND).steps == last(expected)["step"]  # finished: nothing is added
    assert_same_bits(run, expected)
    assert [line["step"] for line in metrics(run) if "segment" in line] == [end]


def test_several_extensions_are_counted_from_the_end_of_the_first_schedule(data: Path) -> None:
    run, command = trained(data, "run"), config(data, data.parent / "run")
    with pytest.raises(ConfigError, match="unfinished; first run `dino resume"):
        pretrain(config(data, data.parent / "new"), EXTEND)
    for steps, total in [(2, 10), (2, 10), (6, 14), (6, 14)]:
        assert resume(run, extend=ExtendConfig(steps=steps)).steps == total
        assert pretrain(command).steps == total  # the command that started the run says that it is finished
    assert [(s["start"], s["end"]) for s in identity(run)["segments"]] == [(8, 10), (10, 14)]
    with pytest.raises(ConfigError, match="by more than the 6 steps .* found 3; .* end of the first schedule, step 8"):
        resume(run, extend=ExtendConfig(steps=3))
    with pytest.raises(ConfigError, match="expected the extension that .* has .* found another one"):
        resume(run, extend=ExtendConfig(steps=6, lr=0.3))
    assert len(identity(run)["segments"]) == 2


def test_an_unfinished_segment_is_resumed_by_any_command_and_finished_before_another(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(data, "run")
    with monkeypatch.context() as patched:
        crash_after(patched, 10)
        with pytest.raises(Crash):
            resume(run, extend=EXTEND)
    with pytest.raises(ConfigError, match=r"to have finished \(steps 8 to 13.*first run `dino resume"):
        resume(run, extend=ExtendConfig(steps=9))
    assert pretrain(config(data, run)).steps == 13


def test_a_run_that_stopped_early_can_be_extended(data: Path) -> None:
    changes = {**with_evaluation(data, every_steps=1, patience=2), "optim.lr": 0.0001}
    run = trained(data, "run", **{**changes, "training.max_steps": 40})
    stopped = last(run)["step"]
    assert RunReader(run).state() == "early_stopped" and stopped < 40
    resume(run, extend=ExtendConfig(steps=2, lr=0.0001))
    assert last(run)["step"] in (stopped + 1, stopped + 2) and identity(run)["segments"][0]["start"] == stopped


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        (ExtendConfig(), "extend.epochs or extend.steps, found both or neither"),
        (ExtendConfig(epochs=1, steps=2), "extend.epochs or extend.steps, found both or neither"),
        (ExtendConfig(steps=0), "at least one step"),
        (ExtendConfig(steps=3, lr=0), "extend.lr above 0"),
        (ExtendConfig(steps=3, warmup_epochs=5), "extend.warmup_epochs to be shorter"),
    ],
)
def test_invalid_extensions_are_refused_and_nothing_is_written(
    tmp_path: Path, extend: ExtendConfig, message: str
) -> None:
    run = trained(make_grids(tmp_path / "data"), "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=message):
        resume(run, extend=extend)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_commands(tmp_path: Path) -> None:
    data = make_grids(tmp_path / "data")
    run = trained(data, "run")
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["resume", str(run)])
    assert shown.exit_code == 0 and "this run is finished; nothing to do" in shown.stdout
    assert f"`dino resume {run} training.nepochs=+10` extends it" in shown.stdout
    words = ["training.nepochs=+1", "extend.lr=0.2", "logging.every_steps=2"]
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["resume", str(run), *words, "dry_run=true"])
    assert shown.exit_code == 0 and "steps 8 to 11: learning rate 0.0031" in shown.stdout
    assert "segments" not in identity(run)
    done = subprocess.run(
        [sys.executable, "-m", "dino", "resume", run, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert last(run)["step"] == 11 and [line["step"] for line in metrics(run) if "loss" in line][-2:] == [10, 11]
    shown = CliRunner().invoke(app, ["pretrain", "region", str(data), str(run), "training.nepochs=+1"])
    assert shown.exit_code == 2 and f"`dino resume {run} training.nepochs=+1` extends a finished run" in shown.stderr
    shown = CliRunner().invoke(app, ["resume", str(tmp_path)])
    assert shown.exit_code == 2 and "expected a run at" in shown.stderr


def test_a_run_is_resumed_without_settings_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_grids(tmp_path / "data")
    expected = trained(tmp_path / "data", "expected")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        crash_after(patched, 5)
        with pytest.raises(Crash):
            pretrain(config(Path("data"), Path("run")))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    done = subprocess.run(
        [sys.executable, "-m", "dino", "resume", "moved"],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "elsewhere" / "moved", expected)


def test_the_methods_paragraph_tells_of_a_segment(tmp_path: Path) -> None:
    run = trained(make_grids(tmp_path / "data"), "run")
    resume(run, extend=EXTEND)
    text = methods.methods(methods.Facts(None, None, load_run(run).method()))
    assert (
        "continued from step 8 to 13, with all state kept, on a new schedule: a peak learning rate of 0.00625" in text
    )


def test_a_warm_up_longer_than_the_run_is_a_warning(tmp_path: Path) -> None:
    run = trained(make_grids(tmp_path / "data"), "run", **{"training.warmup_epochs": 3})
    (warning,) = [text for text in RunReader(run).status()["warnings"] if "warmup" in text]
    assert warning.startswith("training.warmup_epochs=3 is not shorter than the run of 2.67 epochs (8 steps): ")
    run = trained(tmp_path / "data", "shorter", **{"training.warmup_epochs": 2})
    assert not any("warmup" in text for text in RunReader(run).status()["warnings"])
