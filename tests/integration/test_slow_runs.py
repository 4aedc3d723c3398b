"""The promises that take minutes: many kills, and several processes."""

import random
import subprocess
import time
from pathlib import Path

import pytest
from forked import exit_codes, fork_group, kill_at_random
from tiny_runs import add_bad_files, assert_same_bits, command, config, metrics, with_evaluation

from dino.api import pretrain
from dino.config.schema import PatchConfig, RegionConfig

pytestmark = pytest.mark.slow
KILLS = 20


def start(settings: PatchConfig | RegionConfig, folder: Path, processes: int = 0) -> subprocess.Popen:
    return subprocess.Popen(command(settings, folder, processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def long_run(data: Path, output: Path, **changes: object) -> PatchConfig | RegionConfig:
    """Hundreds of steps with a judge, files that cannot be used, and an end that comes early."""
    rest = {"training.max_steps": 600, "logging.save_every_steps": 7, "training.max_bad_fraction": 0.5}
    return config(data, output, **{**with_evaluation(data, every_steps=25, patience=12), **rest, **changes})


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(
    level: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Ten kills of one run a level, each some steps (or none) and a random fraction of a second after its start."""
    data = request.getfixturevalue(level)
    add_bad_files(data)
    state = pretrain(long_run(data, tmp_path / "whole")).state
    settings, log = long_run(data, tmp_path / "killed"), tmp_path / "killed" / "metrics.jsonl"
    moments = random.Random(level)
    kills = 0
    while kills < KILLS // 2:
        process = start(settings, tmp_path)
        before, wait = log.stat().st_mtime_ns if log.exists() else 0, moments.random()
        while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
            time.sleep(0.002)  # until the log is cut back or written
        time.sleep(wait * 0.3)
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    assert kills == KILLS // 2, "the run must be longer than its kills"
    assert pretrain(settings).state == state
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_killed_at_any_moment_two_processes_end_with_the_same_bits(
    level: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Four kills of both processes of a run."""
    data = request.getfixturevalue(level)
    add_bad_files(data)
    share = {"training.batch_size_per_gpu": 2, "training.max_steps": 150}
    whole, cut = (long_run(data, tmp_path / name, **share) for name in ("whole", "killed"))
    assert exit_codes(fork_group(lambda: pretrain(whole), 2)) == [0, 0]
    moments = random.Random(level)
    for _ in range(4):
        assert kill_at_random(fork_group(lambda: pretrain(cut), 2), tmp_path / "killed" / "metrics.jsonl", moments)
    assert exit_codes(fork_group(lambda: pretrain(cut), 2)) == [0, 0]
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("level", ["tiles", "grids"])
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_as_one(
    level: str, processes: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data, double = request.getfixturevalue(level), {"speed.precision": "fp64", "training.max_steps": 20}
    pretrain(config(data, tmp_path / "one", **double))
    share = {"training.batch_size_per_gpu": 4 // processes}
    assert start(config(data, tmp_path / "many", **double, **share), tmp_path, processes).wait(timeout=600) == 0
    for one, many in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        assert all(one[key] == pytest.approx(many[key], rel=1e-8) for key in one)
