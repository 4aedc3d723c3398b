"""Whole runs through the API: they resume exactly, refuse what does not fit, and lose nothing."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from forked import run_group
from safetensors.torch import load_file
from tiny_runs import (
    Crash,
    assert_same_bits,
    assert_same_numbers,
    command,
    config,
    crash_after,
    last,
    metrics,
    negative,
)

from dino.api import levels, pretrain
from dino.data.packed import GridFiles
from dino.errors import ConfigError, DataError, TrainingFault
from dino.precision import _say_that_fp32_is_used
from dino.train.loop import Trainer


@pytest.mark.parametrize("level", ["tiles", "grids"])
@pytest.mark.parametrize("crash", [2, 5, 7])
def test_an_interrupted_run_ends_with_the_same_bits(
    level: str, crash: int, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = request.getfixturevalue(level)
    pretrain(config(data, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, crash)
        pretrain(config(data, tmp_path / "cut"))
    summary = pretrain(config(data, tmp_path / "cut"))
    assert summary.state == "finished" and summary.steps == 8
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_a_killed_process_goes_on_with_the_same_bits(tiles: Path, tmp_path: Path) -> None:
    long = {"training.max_steps": 40}
    pretrain(config(tiles, tmp_path / "whole", **long))
    process = subprocess.Popen(command(config(tiles, tmp_path / "killed", **long), tmp_path))
    log = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 8):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    pretrain(config(tiles, tmp_path / "killed", **long))
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_ends_with_75(tiles: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Sent to the workers as well, as schedulers and terminals do."""
    long = {"training.max_steps": 100_000, "logging.save_every_steps": 0, "speed.num_workers": 1}
    process = subprocess.Popen(
        command(config(tiles, tmp_path / "run", **long), tmp_path),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "run the same command again to resume" in errors and "Traceback" not in errors
    assert ("ctrl-C again ends at once" in errors) == (number == signal.SIGINT)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (
        status["state"] == "stopped"
        and last(tmp_path / "run")["step"] == status["step"] == metrics(tmp_path / "run")[-1]["step"]
    )


def test_a_second_interrupt_ends_at_once(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config(tiles, tmp_path / "whole"))
    # A shell lets jobs in its background ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def step(self: Trainer, *arguments: object) -> object:
        if self.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return honest(self, *arguments)  # type: ignore[arg-type]

    honest = Trainer._step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", step)
        pretrain(config(tiles, tmp_path / "run"))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "crashed" and status["step"] == 5 and "after step 3" in status["error"]
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    pretrain(config(tiles, tmp_path / "run"))
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_workers_do_not_change_the_bits(tiles: Path, tmp_path: Path) -> None:
    for workers in (0, 1, 3):
        pretrain(config(tiles, tmp_path / str(workers), **{"speed.num_workers": workers, "training.max_steps": 5}))
    assert_same_bits(tmp_path / "0", tmp_path / "1")
    assert_same_bits(tmp_path / "0", tmp_path / "3")


def test_tiles_kept_in_memory_do_not_change_the_bits(tiles: Path, tmp_path: Path) -> None:
    for gb in (0, 1e-4):  # room for 14 of the 20 tiles
        changes = {"speed.ram_cache": gb, "speed.num_workers": 1, "training.max_steps": 8}
        pretrain(config(tiles, tmp_path / f"run{gb}", **changes))
    assert_same_bits(tmp_path / "run0", tmp_path / "run0.0001")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_grids_do_not_change_the_bits(grids: Path, tmp_path: Path, precision: str) -> None:
    runs = {"files": ("none", 0), "beside": ("auto", 0), "elsewhere": (str(tmp_path / "cache"), 1)}
    for run, (place, workers) in runs.items():
        changes = {"speed.cache_dir": place, "speed.num_workers": workers, "training.max_steps": 5}
        pretrain(config(grids, tmp_path / run, **changes, **{"speed.precision": precision}))
    assert list(grids.glob(".histodino/*.bin")) and list(tmp_path.glob("cache/*/*.bin"))
    assert_same_bits(tmp_path / "files", tmp_path / "beside")
    assert_same_bits(tmp_path / "files", tmp_path / "elsewhere")


def test_grids_in_bf16_do_not_change_the_bits_of_a_bf16_run(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino.precision.cpu_has_bf16", lambda: True)
    pretrain(config(grids, tmp_path / "rounded", **{"speed.precision": "bf16"}))
    monkeypatch.setattr(levels, "GridFiles", lambda *values: GridFiles(*values[:3]))
    pretrain(config(grids, tmp_path / "exact", **{"speed.precision": "bf16"}))
    names = {path.name for path in grids.glob(".histodino/*.bin")}
    assert len(names) == 1  # the second run has packed its own, of twice the size
    assert (grids / ".histodino" / names.pop()).stat().st_size == 12 * 36 * 10 * 4
    assert_same_bits(tmp_path / "rounded", tmp_path / "exact")


def test_a_bf16_run_on_a_cpu_without_it_is_an_fp32_run_that_says_so(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dino.precision.cpu_has_bf16", lambda: False)
    _say_that_fp32_is_used.cache_clear()
    for precision in ("bf16", "fp32"):
        pretrain(config(tiles, tmp_path / precision, **{"speed.precision": precision}))
    assert capsys.readouterr().out.count("this CPU does not compute in bf16: using fp32") == 1
    assert json.loads((tmp_path / "bf16" / "status.json").read_text())["computed_in"] == "fp32"  # the report says so
    one, other = (last(tmp_path / precision)["student"] for precision in ("bf16", "fp32"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_accumulation_gives_the_run_of_the_whole_batch(tiles: Path, tmp_path: Path) -> None:
    double = {"speed.precision": "fp64"}
    pretrain(config(tiles, tmp_path / "whole", **double))
    halves = {**double, "training.batch_size_per_gpu": 2, "training.gradient_accumulation": 2}
    pretrain(config(tiles, tmp_path / "halves", **halves))
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "halves"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)


def test_a_finished_run_says_so(tiles: Path, tmp_path: Path) -> None:
    pretrain(config(tiles, tmp_path / "run"))
    stamp = (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_mtime_ns
    assert pretrain(config(tiles, tmp_path / "run")).state == "finished"
    assert (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_mtime_ns == stamp
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["step"] == 8 and status["verdict"]["word"] in {"learning", "flat", "collapsed"}


def test_another_runs_folder_is_refused_and_kept(tiles: Path, tmp_path: Path) -> None:
    pretrain(config(tiles, tmp_path / "run"))
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"training\.max_steps 8 -> 9.*model\.init="):
        pretrain(config(tiles, tmp_path / "run", **{"training.max_steps": 9}))
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="other files"):
        pretrain(config(tiles, tmp_path / "full"))


def test_changed_data_is_another_run(tiles: Path, tmp_path: Path) -> None:
    pretrain(config(tiles, tmp_path / "run"))
    (tiles / "slide0_0_0.png").unlink()
    with pytest.raises(ConfigError, match="samples 20 -> 19"):
        pretrain(config(tiles, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.batch_size_per_gpu": 21}, "20 samples for a global batch of 21"),
        ({"aug.global_crops_size": 40}, r"aug\.global_crops_size to be a multiple of model\.patch_size=16"),
        ({"model.arch": "resnet18"}, "resnet18"),
        ({"model.out_dim": 0}, "out_dim"),
        ({"speed.precision": "fp8"}, "fp8"),
        ({"speed.device": "tpu"}, "tpu"),
        ({"speed.device": "cuda:99"}, "cuda:99"),
        ({"training.clip_mode": "both"}, "both"),
        ({"data_dir": "nowhere"}, "nowhere"),
        ({"output_dir": ""}, "run folder"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    tiles: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        pretrain(config(tiles, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_bad_images_are_named_replaced_counted_and_bounded(
    tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tiles / "slide1_48_0.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"at most 0 samples.*slide1_48_0\.png"):
        pretrain(config(tiles, tmp_path / "strict", **{"training.max_bad_fraction": 0.0}))
    capsys.readouterr()
    assert json.loads((tmp_path / "strict" / "status.json").read_text())["state"] == "failed"
    pretrain(config(tiles, tmp_path / "run", **{"training.max_bad_fraction": 0.1}))
    assert capsys.readouterr().out.count("slide1_48_0.png") == 1
    assert json.loads((tmp_path / "run" / "status.json").read_text())["bad_files"] == 1
    assert list(last(tmp_path / "run")["state"]["quarantine"]) == ["slide1_48_0.png"]


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dino.objectives import dino as objective

    calls = []
    honest = objective.dino_loss

    def broken(*args: object, **options: object) -> torch.Tensor:
        calls.append(1)
        return honest(*args, **options) * (float("nan") if len(calls) == 6 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(objective, "dino_loss", broken)
    with pytest.raises(TrainingFault, match="step 6"):
        pretrain(config(tiles, tmp_path / "run"))
    saved = last(tmp_path / "run")
    assert saved["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in saved["student"].values())


def test_dry_run_writes_nothing(tiles: Path, tmp_path: Path) -> None:
    summary = pretrain(config(tiles, tmp_path / "run", dry_run=True))
    assert not (tmp_path / "run").exists()
    assert summary.numbers["global_batch"] == 4 and summary.numbers["effective_lr"] == pytest.approx(0.05 * 4 / 256)


def test_a_run_starts_from_an_earlier_one(tiles: Path, tmp_path: Path) -> None:
    pretrain(config(tiles, tmp_path / "old"))
    pretrain(config(tiles, tmp_path / "new", **{"model.init": str(tmp_path / "old"), "training.max_steps": 1}))
    start = torch.load(tmp_path / "new" / "checkpoints" / "start.pt", weights_only=True)["teacher"]
    old = last(tmp_path / "old")["teacher"]
    backbone = [name for name in old if name.startswith("backbone.")]
    assert backbone and all(torch.equal(start[name], old[name]) for name in backbone)


def test_knn_while_training_keeps_the_best_and_stops_early(tiles: Path, tmp_path: Path) -> None:
    rows = ["image_path,label,partition,slide_id"]
    for i, path in enumerate(sorted(tiles.glob("*.png"))):
        other = negative(path, tmp_path / "labelled")
        rows.append(f"{other},{'ab'[i % 2]},{'train' if i < 12 else 'test'},held{i}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    with_evaluation = {
        "evaluate.labels": str(tmp_path / "labels.csv"),
        "evaluate.every_steps": 1,
        "evaluate.k": [3],
        "evaluate.early_stopping_patience": 3,
        "training.max_steps": 60,
    }
    summary = pretrain(config(tiles, tmp_path / "run", **with_evaluation))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [x["evaluation"]["teacher"]["knn_3_accuracy"] for x in lines if "teacher" in x.get("evaluation", {})]
    best = max(range(len(scores)), key=lambda i: scores[i])
    assert summary.state == "early_stopped" and len(scores) == best + 1 + 3
    kept = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    assert kept["step"] == best + 1
    exported = load_file(tmp_path / "run" / "backbone" / "model.safetensors")
    assert torch.equal(exported["cls_token"], kept["teacher"]["backbone.cls_token"])


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_two_processes_train_as_one(level: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Same losses and same weights for the same global batch, drop-path on, in double precision."""
    data, double = request.getfixturevalue(level), {"speed.precision": "fp64"}
    pretrain(config(data, tmp_path / "one", **double))
    shared = config(data, tmp_path / "two", **double, **{"training.batch_size_per_gpu": 2})
    run_group(lambda: pretrain(shared))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")
    centres = [last(tmp_path / run)["objectives"][0]["centre.center"] for run in ("one", "two")]
    assert torch.allclose(*centres, rtol=1e-9)


def test_a_run_on_two_processes_resumes_on_one(tiles: Path, tmp_path: Path) -> None:
    double = {"speed.precision": "fp64", "training.max_steps": 9}
    pretrain(config(tiles, tmp_path / "one", **double))
    shared = config(
        tiles, tmp_path / "moved", **double, **{"training.batch_size_per_gpu": 2, "logging.save_every_steps": 1}
    )
    process = subprocess.Popen(command(shared, tmp_path, processes=2))
    while process.poll() is None and not (tmp_path / "moved" / "checkpoints" / "last.pt").exists():
        time.sleep(0.01)
    process.terminate()
    process.wait(timeout=60)
    pretrain(config(tiles, tmp_path / "moved", **double))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "moved"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-9)
