"""Two hosts, as network namespaces of this one with host names of their own, joined by a cable that can be cut."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from tiny_runs import assert_same_numbers, command, config, last

from dino.api import pretrain
from dino.config.schema import PatchConfig, RegionConfig

pytestmark = pytest.mark.slow
PATIENCE = 300  # seconds; a limit for hangs on a busy machine, not a measurement
MARK = "DINO_TEST_HOST"  # variable that says on which host a process runs
CABLE = "cable"  # the network device's name on both hosts
ADDRESSES = ("10.77.0.1", "10.77.0.2")  # seen inside the namespaces only


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """One of the hosts; what it runs is ended with it."""

    def __init__(self, number: int) -> None:
        self.number, self.name, self.address = number, f"dino-{os.getpid()}-{number}", ADDRESSES[number]
        self.started: list[subprocess.Popen] = []

    def start(self, words: Sequence[str], output: Path, *, network: bool = True) -> subprocess.Popen:
        """Run a command here, with everything that it prints in one file."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *words]
        within = ["ip", "netns", "exec", self.name] if network else []
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": CABLE if network else "lo", MARK: self.name}
        with output.open("a") as file:
            process = subprocess.Popen([*within, *named], stdout=file, stderr=file, env=environment)
        self.started.append(process)
        return process

    def lose(self) -> None:
        """Let everything that runs here vanish, as when the power fails."""
        for process in self._processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for process in self.started:
            process.wait()

    def _processes(self) -> list[int]:
        """What was started here and by what was started here: torchrun's workers lead sessions of their own."""
        mark, found = f"{MARK}={self.name}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("two hosts need `ip` (Debian's iproute2) and `unshare`")
    pair = [Host(0), Host(1)]
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            ip("link", "add", CABLE, "netns", pair[0].name, "type", "veth", "peer", CABLE, "netns", pair[1].name)
            for host in pair:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
                ip("-n", host.name, "link", "set", CABLE, "up")
                ip("-n", host.name, "link", "set", "lo", "up")
            subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"namespaces are not allowed here: {error.stderr.decode().strip()}")
        yield pair
    finally:
        for host in pair:
            host.lose()
            subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True)


def start_on_both(hosts: list[Host], settings: PatchConfig | RegionConfig, folder: Path) -> list[subprocess.Popen]:
    """One process on each host, which meet at the first one."""
    processes = []
    for host in hosts:
        torchrun = [
            *("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=job7", f"--rdzv-endpoint={ADDRESSES[0]}:29500"),
            *(f"--rdzv-conf=is_host={host.number == 0}", f"--local-addr={host.address}", "--monitor-interval=0.1"),
        ]
        processes.append(host.start(command(settings, folder, 1, torchrun), folder / f"{host.number}.txt"))
    return processes


def wait_for_steps(run: Path, count: int, processes: list[subprocess.Popen], output: Path) -> None:
    log, until = run / "metrics.jsonl", time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count("\n") < count:
        alive = all(process.poll() is None for process in processes)
        assert alive and time.monotonic() < until, output.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_two_hosts_train_as_one(level: str, hosts: list[Host], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data, double = request.getfixturevalue(level), {"speed.precision": "fp64"}
    pretrain(config(data, tmp_path / "one", **double))
    shared = config(data, tmp_path / "two", **double, **{"training.batch_size_per_gpu": 2})
    for process in start_on_both(hosts, shared, tmp_path):
        assert process.wait(PATIENCE) == 0, (tmp_path / "0.txt").read_text() + (tmp_path / "1.txt").read_text()
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


def test_a_host_that_is_cut_off_ends_the_run_with_a_clear_line_on_both(
    hosts: list[Host], tiles: Path, tmp_path: Path
) -> None:
    settings = config(
        tiles,
        tmp_path / "run",
        **{"training.batch_size_per_gpu": 2, "training.max_steps": 100_000, "speed.timeout_minutes": 0.5},
    )
    processes = start_on_both(hosts, settings, tmp_path)
    wait_for_steps(tmp_path / "run", 5, processes, tmp_path / "0.txt")
    ip("-n", hosts[1].name, "link", "set", CABLE, "down")
    assert processes[0].wait(PATIENCE) == 1
    step, until = last(tmp_path / "run")["step"], time.monotonic() + PATIENCE
    for host in hosts:  # the worker of the host that was cut off says so too; its torchrun goes on asking for the other
        while "error" not in (said := (tmp_path / f"{host.number}.txt").read_text()):
            assert time.monotonic() < until, said
            time.sleep(0.1)
        assert "expected 2 running processes, found that one has ended or does not respond" in said
        assert f"run the same command again: it goes on after step {step}" in said
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "crashed" and f"after step {step}" in status["error"]


def test_the_same_job_goes_on_at_once_where_another_host_was_lost(
    hosts: list[Host], tiles: Path, tmp_path: Path
) -> None:
    """The lost host leaves its lock behind; only the job's id tells that nobody there is alive."""
    settings = config(tiles, tmp_path / "run", **{"training.max_steps": 400})
    torchrun = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=job7", "--local-addr=127.0.0.1"]
    words = command(settings, tmp_path, 1, torchrun)
    process = hosts[0].start(words, tmp_path / "0.txt", network=False)
    wait_for_steps(tmp_path / "run", 5, [process], tmp_path / "0.txt")
    hosts[0].lose()
    lock = json.loads((tmp_path / "run" / "lock.json").read_text())
    assert (lock["host"], lock["launch"]) == (hosts[0].name, "job7")
    assert hosts[1].start(words, tmp_path / "1.txt", network=False).wait(PATIENCE) == 0
    said = (tmp_path / "1.txt").read_text()
    assert "resuming after step" in said and "waiting" not in said
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
