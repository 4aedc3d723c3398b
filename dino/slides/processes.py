"""Runs one function over many slides, each process working on one slide at a time."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def run_each(work: Callable[[A], R], items: Sequence[A], workers: int, on_death: Callable[[A], R]) -> Iterator[R]:
    """Results of ``work`` for every item, as they come.

    Each worker process is driven by a thread of its own: when a damaged file takes the process down with it, the
    thread knows which item that was, starts another process, and the rest go on.

    Args:
        work: Picklable function. Processes are spawned, since neither openslide nor OpenCV survives a fork.
        items: What it is called with.
        workers: How many processes; with one (or one item), ``work`` runs in this process.
        on_death: Result for an item whose process died.

    Yields:
        One result per item, in order of completion.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return
    own = threading.local()
    pools: list[ProcessPoolExecutor] = []

    def in_own_process(item: A) -> R:
        if getattr(own, "pool", None) is None:
            context = multiprocessing.get_context("spawn")
            own.pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
            pools.append(own.pool)
        try:
            return own.pool.submit(work, item).result()
        except BrokenProcessPool:
            own.pool = None
            return on_death(item)

    with ThreadPoolExecutor(min(workers, len(items))) as threads:
        futures = [threads.submit(in_own_process, item) for item in items]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            for pool in pools:
                pool.shutdown(wait=False)


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone: killed, it could not say so.

    A worker that outlived it would go on writing where the command, run again, writes too.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
