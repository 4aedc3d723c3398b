"""Under torchrun, which starts killed workers again, turns every exit code into 1, and may die before its workers."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import assert_same_numbers, command, config, last, metrics

from dino.api import pretrain

PATIENCE = 240  # seconds; a limit for hangs on a busy machine, not a measurement
TORCHRUN = ("--standalone", "--max-restarts=1", "--monitor-interval=0.1")
ENDLESS = {"training.batch_size_per_gpu": 2, "training.max_steps": 100_000, "logging.save_every_steps": 0}


class Job:
    """A run on two processes under torchrun."""

    def __init__(self, settings, folder: Path) -> None:
        self.run, self.output = Path(settings.output_dir), folder / "output.txt"
        with self.output.open("w") as file:
            self.agent = subprocess.Popen(command(settings, folder, 2, TORCHRUN), stdout=file, stderr=file)
        self.workers: dict[int, int] = {}  # process number by rank

    def wait_for_steps(self, count: int) -> None:
        log, until = self.run / "metrics.jsonl", time.monotonic() + PATIENCE
        while not log.exists() or log.read_text().count("\n") < count:
            assert self.agent.poll() is None and time.monotonic() < until, self.output.read_text()
            time.sleep(0.01)
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        self.workers = {rank_of(int(child)): int(child) for child in children}

    def status(self) -> dict:
        return json.loads((self.run / "status.json").read_text())


def rank_of(process: int) -> int:
    environment = Path(f"/proc/{process}/environ").read_text().split("\0")
    return next(int(line.removeprefix("RANK=")) for line in environment if line.startswith("RANK="))


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Jobs that are ended whatever happens."""
    started: list[Job] = []
    yield started
    for job in started:
        for process in [job.agent.pid, *job.workers.values()]:
            if is_alive(process):
                os.kill(process, signal.SIGKILL)
        job.agent.wait()


@pytest.mark.parametrize(("level", "victim"), [("tiles", 1), pytest.param("grids", 0, marks=pytest.mark.slow)])
def test_a_killed_worker_is_started_again_and_the_result_is_the_uninterrupted_one(
    level: str, victim: int, request: pytest.FixtureRequest, tmp_path: Path, jobs: list[Job]
) -> None:
    """Drop-path on, in double precision; the main process writes the files, so its death is another case."""
    data, double = request.getfixturevalue(level), {"speed.precision": "fp64", "training.max_steps": 40}
    pretrain(config(data, tmp_path / "one", **double))
    jobs.append(Job(config(data, tmp_path / "two", **double, **{"training.batch_size_per_gpu": 2}), tmp_path))
    jobs[0].wait_for_steps(8)
    os.kill(jobs[0].workers[victim], signal.SIGKILL)
    assert jobs[0].agent.wait(PATIENCE) == 0
    said = jobs[0].output.read_text()
    assert "resuming after step" in said
    assert "found that one has ended" in said and "it goes on after step" in said and "Traceback" not in said
    assert jobs[0].status()["state"] == "finished"
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "receiver",
    ["worker", pytest.param("agent", marks=pytest.mark.slow), pytest.param("orphans", marks=pytest.mark.slow)],
)
def test_a_signal_stops_all_processes_once_and_the_status_tells(
    receiver: str, tiles: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    """SIGUSR1 to one worker; SIGTERM to torchrun, which hands it on; SIGUSR1 to torchrun, which dies of it."""
    jobs.append(Job(config(tiles, tmp_path / "run", **ENDLESS), tmp_path))
    job = jobs[0]
    job.wait_for_steps(3)
    receivers = {
        "worker": (job.workers[1], signal.SIGUSR1),
        "agent": (job.agent.pid, signal.SIGTERM),
        "orphans": (job.agent.pid, signal.SIGUSR1),
    }
    os.kill(*receivers[receiver])
    assert job.agent.wait(PATIENCE) != 0
    until = time.monotonic() + PATIENCE
    while any(is_alive(worker) for worker in job.workers.values()):
        assert time.monotonic() < until, "the workers are still there"
        time.sleep(0.05)
    status, said = job.status(), job.output.read_text()
    assert status["state"] == "stopped" and status["run_id"]
    assert last(job.run)["step"] == status["step"] == metrics(job.run)[-1]["step"]
    assert "resuming" not in said and "dino/__main__.py" not in said  # no traceback of a worker
    if receiver == "worker":  # torchrun started them again: they ended at once, and nothing went on
        assert "was stopped after step" in said
