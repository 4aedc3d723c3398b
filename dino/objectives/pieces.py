"""Process a batch in pieces that fit into the CPU's cache, on several threads."""

import math
from collections.abc import Callable

import torch

from dino.environment import run_threaded

CACHED_VALUES = 2**18  # values of one tensor per piece: a few such tensors fit into a core's L2 cache
CHUNKS_PER_THREAD = 4  # so that other threads take over the chunks of one that was delayed


def piece_size(batch: int, values: int, device: torch.device) -> int:
    """Number of samples in a piece.

    Args:
        batch: Samples of the batch.
        values: Values of one tensor per sample.
        device: Except on a CPU the whole batch is one piece.
    """
    return max(1, min(batch, CACHED_VALUES // values)) if device.type == "cpu" else batch


def in_pieces(work: Callable[[int, int], None], batch: int, piece: int, device: torch.device) -> None:
    """Call ``work(first, last)`` on chunks of the batch: on a CPU on torch's number of threads, else once.

    Every thread processes whole samples, each operation on that thread alone: if torch splits every operation over the
    threads, they synchronise after each.

    Args:
        work: Processes samples ``first ... last - 1`` and no others.
        batch: Samples of the batch.
        piece: Chunks are multiples of this.
        device: Where the samples are.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    chunk = math.ceil(batch / (piece * threads * CHUNKS_PER_THREAD)) * piece if threads > 1 else batch
    firsts = range(0, batch, max(chunk, 1))
    if len(firsts) < 2:
        work(0, batch)
        return

    run_threaded(lambda first: work(first, min(first + chunk, batch)), firsts)
