"""`tile` on several processes: the same files as one, also after one was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from painted_slide import noise, write_slide
from typer.testing import CliRunner

from dino import api
from dino.api.tiling import tile
from dino.cli.main import app
from dino.config.schema import TileConfig
from dino.errors import DataError

SETTINGS = {"tile_size_px": 64, "region_size_px": 128, "num_workers": 1, "previews": False}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PATIENCE = 240  # seconds; a limit for hangs on a busy machine, not a measurement


def command(inputs: Path, root: Path) -> list[str]:
    return [*TORCHRUN, "-m", "dino", "tile", str(inputs), str(root), *(f"{k}={v}" for k, v in SETTINGS.items())]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five slides of several sizes, one of which is damaged."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(4):
        write_slide(folder / f"s{number}.tiff", [noise(256 + 128 * number, 256, number)])
    (folder / "broken.tiff").write_bytes(b"no slide")
    return folder


@pytest.fixture(scope="module")
def alone(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT of one process."""
    root = tmp_path_factory.mktemp("alone")
    assert tile([slides], root, TileConfig(**SETTINGS)).exit_code == 2  # the damaged one
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Everything but what names the run."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "progress.json" and path.suffix != ".npz"
    }


def test_two_processes_write_what_one_does(slides: Path, alone: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    result = subprocess.run(command(slides, root), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 1 and "exitcode  : 2" in result.stderr, result.stderr  # torchrun turns any code into 1
    assert contents(root) == contents(alone)
    assert json.loads((root / "coordinates/progress.json").read_text()) == {"slides": 5, "processes": 2}
    said = " ".join(result.stdout.split())
    assert said.count("5 slides (4 ok, 1 failed; 0 done before)") == 1 and said.count("broken failed:") == 1
    shown = CliRunner().invoke(app, ["status", str(root)])
    assert shown.output.split(" tiled ")[0] == "5 of 5 slides" and "(1 failed, 4 ok)" in shown.output
    assert shown.output.rstrip().endswith("tiles; 2 processes")


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_killed_process_loses_no_finished_slide(slides: Path, alone: Path, tmp_path: Path, rank: str) -> None:
    """The other process is ended by torchrun; the same command on one process tiles the remaining slides."""
    root, wait = tmp_path / "root", tmp_path / "wait.py"
    # Each process stops before its second slide, so that it is killed between two.
    wait.write_text(
        f"""
import os, sys, time
from pathlib import Path
from dino.cli.main import main
from dino.slides import tiling
tile_slide, done = tiling.tile_slide, []
def waiting(record, root, config):
    if done:
        Path({str(tmp_path)!r}, "waiting" + os.environ["RANK"]).write_text(str(os.getpid()))
        time.sleep(1000)
    done.append(record)
    return tile_slide(record, root, config)
tiling.tile_slide = waiting
main()
"""
    )
    words = command(slides, root)
    start = words.index("-m", words.index("--standalone"))
    job = subprocess.Popen([*words[:start], str(wait), *words[start + 2 :]], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + PATIENCE
        while not all((tmp_path / f"waiting{r}").exists() and (tmp_path / f"waiting{r}").read_text() for r in "01"):
            assert job.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        assert api.tiling_status(root).startswith("2 of 5 slides tiled (")
        os.kill(int((tmp_path / f"waiting{rank}").read_text()), signal.SIGKILL)
        assert job.wait(PATIENCE) == 1
    finally:
        job.kill()
    summary = tile([slides], root, TileConfig(**SETTINGS))
    assert 1 <= summary.reused <= 2 and contents(root) == contents(alone)
    assert not (root / ".partial").exists() and not (root / "tiling.lock.json").exists()


def test_the_status_of_other_folders(tmp_path: Path, alone: Path) -> None:
    with pytest.raises(DataError, match=r"expected .*tiling\.json"):
        api.tiling_status(tmp_path)
    (tmp_path / "tiling.json").write_text("{}")
    assert api.tiling_status(tmp_path) == "0 of 0 slides tiled (none yet), 0 tiles"
    assert api.tiling_status(alone).startswith("5 of 5 slides tiled (1 failed, 4 ok), ")


def test_a_slurm_job_of_tiling(slides: Path, tmp_path: Path) -> None:
    """One task per node without GPUs."""
    pytest.importorskip("submitit", reason="needs the extra [slurm]")
    words = ["tile", str(slides), str(tmp_path / "root"), "slurm.nodes=3", "slurm.gpus_per_node=0", "dry_run=true"]
    shown = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["launch", "slurm", *words])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert f"tile {slides} {tmp_path / 'root'}" in text
    assert "nodes 3" in text and "tasks_per_node 1" in text and str(tmp_path / "root_slurm") in text
