"""Slides in separate processes."""

import os

from dino.slides.tiling import run_each


def work(item: int) -> tuple[int, int]:
    if item == 2:
        os._exit(9)  # as a decoder may crash on a damaged file
    return item, os.getpid()


def test_a_crashed_process_loses_only_one_slide() -> None:
    results = dict(run_each(work, [1, 2, 3, 4], 2, lambda item: (item, -1)))
    assert set(results) == {1, 2, 3, 4}
    assert results[2] == -1
    assert os.getpid() not in results.values() and -1 not in (results[1], results[3], results[4])


def test_one_worker_runs_in_this_process() -> None:
    assert [pid for _, pid in run_each(work, [1, 3], 1, lambda item: (item, -1))] == [os.getpid()] * 2
