"""What speed must not cost: the network still learns from real tissue as much as it did."""

import os
import statistics
from pathlib import Path

import pytest

from benchmarks.crc5 import WANTED_GAIN, run_seed

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)


@pytest.mark.skipif("DINO_TEST_DATA" not in os.environ, reason="needs DINO_TEST_DATA")
def test_three_seeds_on_real_tissue_gain_over_the_untrained_network(tmp_path: Path) -> None:
    data = Path(os.environ["DINO_TEST_DATA"], "crc5")
    results = [run_seed(seed, data, tmp_path, []) for seed in SEEDS]
    gains = [result["model"] - result["random_initialization"] for result in results]
    assert statistics.mean(gains) >= WANTED_GAIN, gains
    assert min(gains) > 0, gains
