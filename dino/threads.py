"""Independent pieces of work on the CPU, one thread each."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def run_threaded(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Call ``work`` on every item, on as many threads as torch uses, each operation within a single one.

    Splitting every small operation over threads, as torch does by itself, makes them wait for each other some hundred
    times per tile, which costs more than it saves once the machine has anything else to do. The values no longer
    depend on the number of threads either.

    Args:
        work: What to do; must not touch what it does for another item.
        items: What to do it on.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        for item in items:
            work(item)
        return
    # The number of threads is a thread's own setting, but also the default of those that start later: put that back.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(torch.no_grad()(work), items):
                pass
    finally:
        torch.set_num_threads(threads)
