"""Submission to SLURM: the options of sbatch, the environment of a task, and requeueing."""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from tiny_runs import assert_same_numbers, config, make_tiles
from typer.testing import CliRunner

from dino import api
from dino.api.launching import Task, distributed_environment, launch_slurm
from dino.cli.main import app
from dino.config.schema import SlurmConfig
from dino.errors import ConfigError, DataError, Stopped

submitit = pytest.importorskip("submitit", reason="needs the extra [slurm]")
from submitit.core.submission import process_job  # noqa: E402

TIMEOUT = 300  # seconds; a limit for hangs on a busy machine, not a measurement


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replacements of SLURM's programs: sbatch records its script, scontrol its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "srun", "exit 0")
    program(folder, "sbatch", f'cp "$1" {folder}/script; echo "Submitted batch job 4711"')
    program(folder, "scontrol", f'echo "$@" >> {folder}/requests')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the tenth of 16 tasks on two machines, as srun sets it."""
    for name, value in {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gpu[03-04]",
        "SLURM_TASKS_PER_NODE": "8(x2)",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored for the tests that follow
        monkeypatch.delenv(name)


def test_the_environment_of_a_task_follows_slurms_variables(task: None) -> None:
    assert distributed_environment(submitit.JobEnvironment()) == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "24711",
    }


def test_the_job_has_one_task_per_gpu_and_a_signal_before_the_time_limit(cluster: Path, tmp_path: Path) -> None:
    settings = SlurmConfig(nodes=2, gpus_per_node=8, timeout_hours=12, partition="gpu", setup=["module load cuda"])
    submission = launch_slurm(print, settings, tmp_path / "jobs")
    script = (cluster / "script").read_text().splitlines()
    assert submission.job == "4711"
    for flag in (
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=8",
        "time=720",
        "partition=gpu",
        "signal=USR2@300",
        "requeue",
        "open-mode=append",
    ):
        assert f"#SBATCH --{flag}" in script
    assert script.index("module load cuda") < next(i for i, line in enumerate(script) if line.startswith("srun "))


@pytest.mark.parametrize(
    ("number", "code", "requests"), [(signal.SIGUSR2, 255, "requeue 4711\n"), (signal.SIGTERM, 75, ""), (None, 75, "")]
)
def test_only_the_signal_of_the_time_limit_requeues_the_job(
    number: int | None,
    code: int,
    requests: str,
    cluster: Path,
    task: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that gets SIGTERM was cancelled, or SLURM itself requeues it."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", launch_slurm(partial(stop, number), SlurmConfig(), tmp_path / "jobs").job)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2)}
    try:
        with pytest.raises(SystemExit) as end:
            process_job(tmp_path / "jobs")
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert end.value.code in (code, code - 256)
    assert ((cluster / "requests").read_text() if (cluster / "requests").exists() else "") == requests


def stop(number: int | None) -> None:
    raise Stopped("saved", number)


def test_a_wrong_input_ends_a_task_with_one_line(task: None, capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise DataError("expected images,\nfound none")

    with pytest.raises(SystemExit) as end:
        Task(fail)()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error in process 9: expected images, found none\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": "cloud"}, "slurm.cluster slurm or local, found 'cloud'"),
        ({"nodes": 0}, "slurm.nodes of at least 1, found 0"),
        ({"timeout_hours": 0.05}, "longer than slurm.warn_seconds"),
        ({}, "expected slurm to accept the job, found"),
    ],
)
def test_invalid_submissions_are_rejected(
    changes: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM here
    with pytest.raises(ConfigError, match=message):
        launch_slurm(print, SlurmConfig(**changes), tmp_path / "jobs")


def test_without_the_extra_the_error_names_its_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'histodino\[slurm\]'"):
        launch_slurm(print, SlurmConfig(), tmp_path)


def test_the_command_separates_the_settings_of_the_job_from_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(
        api, "launch_slurm", lambda *args, **options: made.append((args, options)) or launch_slurm(*args, **options)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text("slurm:\n  partition: gpu\n  account: lab\n")
    words = ["pretrain", "patch", "data", "runs/patch", "slurm.nodes=2", "seed=3", "slurm.account=us", "dry_run=true"]
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["launch", "slurm", *words, "--slurm", "site.yaml"])
    assert shown.exit_code == 0, shown.output
    assert "dry run: nothing was submitted" in shown.output
    assert "dry_run=" not in shown.output  # the command that would be submitted
    assert "dino pretrain patch data runs/patch seed=3" in " ".join(shown.output.split())
    (work, settings, folder), options = made[0]
    assert (settings.nodes, settings.partition, settings.account) == (2, "gpu", "us")
    assert work.func is api.pretrain and (work.args[0].seed, work.args[0].model.out_dim) == (3, 65536)
    assert folder == tmp_path / "runs" / "patch_slurm" and options == {"dry_run": True}
    assert not (tmp_path / "runs").exists()

    assert CliRunner().invoke(app, ["launch", "slurm", "extract", "runs/patch", "data", "dry_run=true"]).exit_code == 0
    (work, _, folder), _ = made[1]
    assert (
        work.func is api.extract and work.args[:2] == ("runs/patch", Path("data")) and folder == tmp_path / "data_slurm"
    )
    without_run = CliRunner().invoke(app, ["launch", "slurm", "pretrain", "patch", "data_dir=data", "dry_run=true"])
    assert without_run.exit_code == 2 and "expected ROOT and RUN, found no RUN" in without_run.output
    wrong = CliRunner().invoke(app, ["launch", "slurm", "export", "a", "b"])
    assert (
        wrong.exit_code == 2
        and "expected tile, pretrain patch, pretrain region or extract, found export" in wrong.output
    )


@pytest.mark.slow
def test_a_requeued_job_of_two_tasks_ends_as_an_uninterrupted_run(tmp_path: Path) -> None:
    """With submitit's local executor, which restarts its tasks where SLURM would requeue the job."""
    data, long = make_tiles(tmp_path / "tiles"), {"training.max_steps": 200, "speed.precision": "fp64"}
    api.pretrain(config(data, tmp_path / "one", **long))
    run, log = tmp_path / "two", tmp_path / "two" / "metrics.jsonl"
    shared = config(data, run, **long, **{"training.batch_size_per_gpu": 2})
    settings = SlurmConfig(cluster="local", gpus_per_node=2, timeout_hours=1)
    submission = launch_slurm(partial(api.pretrain, shared), settings, tmp_path / "jobs")
    until = time.monotonic() + TIMEOUT
    while not log.exists() or log.read_text().count("\n") < 5:
        assert time.monotonic() < until
        time.sleep(0.02)
    controller = int(submission.job)
    for child in Path(f"/proc/{controller}/task/{controller}/children").read_text().split():
        os.kill(int(child), signal.SIGUSR2)
    while json.loads((run / "status.json").read_text())["state"] != "finished":
        assert time.monotonic() < until, (tmp_path / "jobs" / f"{controller}_0_log.err").read_text()
        time.sleep(0.1)
    output = (tmp_path / "jobs" / f"{controller}_0_log.out").read_text()
    assert "run the same command again to resume" in output and "resuming after step" in output
    assert_same_numbers(tmp_path / "one", run)
