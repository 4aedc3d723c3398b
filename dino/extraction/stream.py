"""Reads ahead in threads while the device computes, and stacks what was read into batches."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int = 64
) -> Generator[Result, None, None]:
    """``map(read, items)`` in order, with up to ``ahead`` results read in advance by threads.

    Decoders and openslide release Python's lock, so that threads do the work of processes without copying pixels.

    Args:
        read: Reads one item; its exception surfaces where the result would have come.
        items: What to read.
        workers: Threads; 0 reads in the calling thread.
        ahead: Results in memory at most, beside the one handed out.
    """
    if workers < 1:
        yield from map(read, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(read, item) for item in islice(rest, max(ahead, workers)))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def batches(tensors: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Stack consecutive tensors of one shape: at most ``size``, fewer where the shape changes.

    Args:
        tensors: Images ``(3, H, W)`` or grids ``(D, h, w)``.
        size: Tensors in a batch.

    Yields:
        ``(B, ...)`` in the order of ``tensors``.
    """
    pending: list[Tensor] = []
    for tensor in tensors:
        if pending and (len(pending) == size or tensor.shape != pending[0].shape):
            yield torch.stack(pending)
            pending = []
        pending.append(tensor)
    if pending:
        yield torch.stack(pending)
