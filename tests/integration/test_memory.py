"""Memory and open files of a run do not grow with its steps."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import exit_codes, fork
from tiny_runs import add_bad_files, config, with_evaluation

from dino.api import pretrain
from dino.config.schema import PatchConfig, RegionConfig
from dino.train.loop import Trainer

LARGEST_GROWTH_MB = 8.0  # of the process that trains and its worker together; the figure is in docs/promises.md


def resident_mb() -> float:
    """Memory of this process and of its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    sizes = [re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in ["self", *children]]
    return sum(int(size[1]) for size in sizes if size) / 1024


def measured(run: Callable[[], object], result: Path, every_steps: int) -> dict[int, tuple[float, int]]:
    """Resident memory in MB and open files by step of a run in a process of its own."""

    def work() -> None:
        found: dict[int, tuple[float, int]] = {}
        honest = Trainer._step

        def step(self: Trainer, *args: object) -> object:
            if self.step % every_steps == 0:
                found[self.step] = (resident_mb(), len(os.listdir("/proc/self/fd")))
            return honest(self, *args)  # type: ignore[arg-type]

        Trainer._step = step  # type: ignore[method-assign]
        run()
        result.write_text(json.dumps(found))

    assert exit_codes([fork(work)], timeout=900) == [0]
    return {int(step): tuple(values) for step, values in json.loads(result.read_text()).items()}


def grown(found: dict[int, tuple[float, int]], after: int) -> tuple[float, int]:
    """How many MB memory and how many open files there were at most more than after so many steps."""
    memory, files = found[after]
    later = [values for step, values in found.items() if step >= after]
    return max(one for one, _ in later) - memory, max(one for _, one in later) - files


def busy(data: Path, run: Path, steps: int, every_steps: int) -> PatchConfig | RegionConfig:
    """A run with a worker, bad files, curves, a judge and checkpoints."""
    add_bad_files(data)
    rest = {"training.max_steps": steps, "training.max_bad_fraction": 0.5, "speed.num_workers": 1}
    rest |= {"logging.tensorboard": True, "logging.every_steps": 10, "logging.save_every_steps": every_steps}
    return config(data, run, **{**with_evaluation(data, every_steps=every_steps, patience=0), **rest})


def test_memory_and_open_files_stay_flat(tiles: Path, tmp_path: Path) -> None:
    settings = busy(tiles, tmp_path / "run", steps=201, every_steps=20)
    memory, files = grown(measured(lambda: pretrain(settings), tmp_path / "found.json", every_steps=40), after=80)
    assert memory < LARGEST_GROWTH_MB and files == 0


@pytest.mark.slow
@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_memory_and_open_files_stay_flat_over_2000_steps(
    level: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    settings = busy(request.getfixturevalue(level), tmp_path / "run", steps=2001, every_steps=100)
    found = measured(lambda: pretrain(settings), tmp_path / "found.json", every_steps=100)
    memory, files = grown(found, after=300)
    print(f"{level}: {memory:.1f} MB and {files} files more than after 300 steps, {found[300]}")  # shown by -s
    assert len(found) == 21 and memory < LARGEST_GROWTH_MB and files == 0
