"""Memory and open files of a run do not grow with its steps."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import exit_codes, fork
from tiny_runs import add_bad_files, config, judged

from dino.api import pretrain
from dino.train.loop import Trainer

LARGEST_GROWTH_MB = 24.0  # of the process that trains and its worker together; the figure is in docs/promises.md


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


@pytest.mark.slow
@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_memory_and_open_files_stay_flat_over_2000_steps(
    level: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With a worker, bad files, curves, a judge and checkpoints."""
    data = request.getfixturevalue(level)
    add_bad_files(data)
    busy = {"training.max_steps": 2000, "training.max_bad_fraction": 0.5, "speed.num_workers": 1}
    busy |= {"logging.tensorboard": True, "logging.every_steps": 5, "logging.save_every_steps": 50}
    settings = config(data, tmp_path / "run", **{**judged(data, every_steps=50, patience=0), **busy})
    found = measured(lambda: pretrain(settings), tmp_path / "found.json", every_steps=100)
    print({step: (round(memory, 1), files) for step, (memory, files) in found.items()})  # shown by -s
    start, end = [values for step, values in found.items() if step >= 300], found[1900]
    growth = max(memory for memory, _ in start) - start[0][0]
    assert growth < LARGEST_GROWTH_MB and end[1] == start[0][1]
