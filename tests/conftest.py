"""What every test may use: one thread, and the real tissue where it is at hand."""

import os
from pathlib import Path

import pytest

# Two test processes on two cores: more threads only get in each other's way. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that is launched from within a distributed job must not take itself for one of its processes.
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def real_tissue() -> Path:
    """Folder of real slides and tiles (see CONTRIBUTING); skips where there is none."""
    folder = os.environ.get("DINO_TEST_DATA")
    if not folder:
        pytest.skip("DINO_TEST_DATA is not set")
    return Path(folder)
