"""Weights & Biases with its own package: settings, offline, and failures in one line before the first step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import TINY, make_grids, metrics

from dino.config.schema import LoggingConfig
from dino.errors import ConfigError
from dino.train.callbacks import build_trackers

wandb = pytest.importorskip("wandb")


def pretrain(data: Path, run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`dino pretrain` in a process that has no key, no terminal, and a home folder of its own."""
    settings = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-m", "dino", "pretrain", "region", data, run, *settings, "logging.wandb=true", *words],
        env={**environment, "HOME": str(data.parent), "NETRC": str(data.parent / "netrc")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_key_a_run_ends_in_one_line_before_it_trains_and_its_advice_works(tmp_path: Path) -> None:
    data, run = make_grids(tmp_path / "data"), tmp_path / "run"
    refused = pretrain(data, run)
    assert refused.returncode == 2 and not (run / "metrics.jsonl").exists()
    (line,) = [line for line in refused.stderr.splitlines() if "error" in line.lower()]
    assert "No API key configured" in line and "set logging.wandb_mode=offline" in line
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    done = pretrain(data, run, "logging.wandb_mode=offline", "logging.wandb_project=lab")
    assert done.returncode == 0, done.stderr
    assert len(metrics(run)) == 8 and list((run / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("error", [wandb.errors.CommError("context deadline\nexceeded"), OSError("no route to host")])
def test_without_a_network_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(
        ConfigError, match=r"expected W&B to accept the run, found: .*set logging\.wandb_mode=offline"
    ) as raised:
        build_trackers(tmp_path, {}, LoggingConfig(tensorboard=False, wandb=True))
    assert "\n" not in str(raised.value)


def test_project_name_and_group_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []
    run = SimpleNamespace(log=lambda numbers, step: logged.append((numbers, step)))
    monkeypatch.setattr(wandb, "init", lambda **values: calls.append(values) or run)
    log = LoggingConfig(tensorboard=False, wandb=True, wandb_project="lab", wandb_name="first", wandb_group="stains")
    (track,) = build_trackers(tmp_path / "run", {"seed": 0}, log)
    track(7, {"loss": 1.5})
    build_trackers(tmp_path / "run", {}, LoggingConfig(tensorboard=False, wandb=True, wandb_mode="offline"))
    names = ("id", "project", "name", "group", "mode", "resume")
    assert [tuple(call[name] for name in names) for call in calls] == [
        ("run", "lab", "first", "stains", "online", "allow"),
        ("run", None, "run", None, "offline", None),
    ]
    assert logged == [({"loss": 1.5}, 7)]


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected logging.wandb_mode online or offline, found 'disabled'"):
        build_trackers(tmp_path, {}, LoggingConfig(tensorboard=False, wandb=True, wandb_mode="disabled"))
