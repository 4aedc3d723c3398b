"""Setup of all tests: one thread, no distributed environment, and the folder of real tissue."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread per test process, so that parallel test processes do not compete. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests that are run inside a distributed job must not join its process group.
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests cache features in a temporary folder, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_runs() -> Iterator[None]:
    """Runs wait neither for the disk (no test cuts the power) nor to measure what other tests use of the CPU.

    Their verdict is based on two pairs of views of each of 20 samples, instead of twelve.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr("dino.train.profiling.busy_cores", lambda: 0.0)
        patch.setattr("dino.api.judging.VERDICT_QUERIES", 40)
        yield


@pytest.fixture(scope="session")
def real_tissue() -> Path:
    """Folder of real slides and tiles (see CONTRIBUTING); skips the test if it is not set."""
    folder = os.environ.get("DINO_TEST_DATA")
    if not folder:
        pytest.skip("DINO_TEST_DATA is not set")
    return Path(folder)
