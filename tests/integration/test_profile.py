"""Where the time of a step goes, in whole runs of both levels."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_runs import command, config
from typer.testing import CliRunner

from dino.api import pretrain, rehearsal
from dino.cli.main import app
from dino.config.schema import PatchConfig
from dino.data.loader import DrawnBatches
from dino.errors import ConfigError
from dino.train.profiling import BACKWARD, CROPS, DATA, PARTS, REST, STUDENT, HostClock

WAIT_SECONDS, OTHER_SECONDS = 1.0, 0.01  # of a batch that is slow to come, and between any two looks at the clock


@pytest.fixture
def slow_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by a little whenever it is read, and by much for every batch."""
    now = [0.0]
    honest = DrawnBatches.__getitem__

    def slow(self: DrawnBatches, first: int) -> object:
        now[0] += WAIT_SECONDS
        return honest(self, first)

    def mark(self: HostClock) -> float:
        now[0] += OTHER_SECONDS
        return now[0]

    monkeypatch.setattr(DrawnBatches, "__getitem__", slow)
    monkeypatch.setattr(HostClock, "mark", mark)


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_a_profile_says_where_the_time_goes_and_writes_no_run(
    level: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = request.getfixturevalue(level)
    before = sorted(tmp_path.rglob("*"))
    summary = pretrain(config(data, tmp_path / "run", profile=True, profile_steps=4))
    # Grids are packed as for a run, so that the profile is one of what a run does.
    assert [path for path in sorted(tmp_path.rglob("*")) if ".histodino" not in path.parts] == before
    assert summary.state == "profile" and summary.steps == 4
    spent = summary.numbers["milliseconds"]
    assert list(spent) == list(PARTS) and all(spent[name] > 0 for name in PARTS)
    step = sum(spent.values())
    assert summary.numbers["samples_per_second"] == pytest.approx(4 / step * 1000)
    shown = capsys.readouterr().out
    assert all(name in shown for name in PARTS) and "img/s: the mean of 4 steps of 4 samples on cpu" in shown


@pytest.mark.usefixtures("slow_source")
def test_a_slow_source_shows_as_waiting(tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    summary = pretrain(config(tiles, tmp_path / "run", profile=True, profile_steps=2))
    spent = summary.numbers["milliseconds"]
    assert spent[DATA] == pytest.approx(1000 * (WAIT_SECONDS + OTHER_SECONDS))
    assert all(spent[name] == pytest.approx(1000 * OTHER_SECONDS) for name in PARTS if name not in (DATA, REST))
    shown = " ".join(capsys.readouterr().out.split())
    waited = spent[DATA] / sum(spent.values())
    assert f"the device waited {waited:.0%} of each step for data" in shown and "speed.num_workers" in shown


@pytest.mark.usefixtures("slow_source")
def test_a_run_that_starves_says_so_once(tiles: Path, tmp_path: Path) -> None:
    pretrain(config(tiles, tmp_path / "run", **{"training.max_steps": 4, "training.gradient_accumulation": 2}))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert len(status["warnings"]) == 1 and "for data" in status["warnings"][0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # A step reads the clock five times: before and after each of its two batches, and for the line of the log.
    waits, others = 2 * (WAIT_SECONDS + OTHER_SECONDS), 3 * OTHER_SECONDS
    assert [line["data_wait"] for line in lines] == pytest.approx([waits / (waits + others)] * 4)
    assert status["data_wait"] == pytest.approx(lines[-1]["data_wait"], abs=1e-3)
    assert status["samples_per_second"] == pytest.approx(lines[-1]["samples_per_second"], abs=0.1)


def test_a_short_run_is_measured_as_far_as_it_goes(tiles: Path, tmp_path: Path) -> None:
    one = config(tiles, tmp_path / "run", profile=True, **{"training.max_steps": 1})
    assert pretrain(one).steps == 1
    with pytest.raises(ConfigError, match="profile_steps of at least 1, found 0"):
        pretrain(config(tiles, tmp_path / "run", profile=True, profile_steps=0))


def test_the_command_needs_no_run_folder(tiles: Path, tmp_path: Path) -> None:
    settings = command(config(tiles, Path(), profile=True, profile_steps=1), tmp_path)[5:]
    shown = CliRunner().invoke(app, ["pretrain", "patch", *settings, "output_dir="])
    assert shown.exit_code == 0, shown.output
    assert "waiting for data" in shown.output


@pytest.mark.parametrize(
    ("crops", "words"), [(5.0, "the crops take 50% of a step, the network 40%"), (1.0, "no bottleneck")]
)
def test_crops_that_take_longer_than_the_network_are_named(crops: float, words: str) -> None:
    run = SimpleNamespace(config=PatchConfig(), device=torch.device("cpu"))
    (line,) = rehearsal._advice(cast(Any, run), {CROPS: crops, STUDENT: 3.0, BACKWARD: 1.0, REST: 1.0}, 0.0)
    assert line.startswith(words)


@pytest.mark.slow
def test_two_processes_show_the_waiting_of_the_slower(tiles: Path, tmp_path: Path) -> None:
    shared = config(tiles, tmp_path / "run", profile=True, profile_steps=2, **{"training.batch_size_per_gpu": 2})
    done = subprocess.run(
        command(shared, tmp_path, processes=2), check=True, timeout=240, capture_output=True, text=True
    )
    assert done.stdout.count("waiting for data") == 1  # one process speaks
    assert "the process that waits longest for data waits" in done.stdout
    assert "2 steps of 4 samples" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_a_profile_on_a_gpu(level: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    settings = config(
        request.getfixturevalue(level), tmp_path / "run", profile=True, profile_steps=4, **{"speed.device": "cuda"}
    )
    spent = pretrain(settings).numbers["milliseconds"]
    assert all(spent[name] >= 0 for name in PARTS) and spent[BACKWARD] > 0
