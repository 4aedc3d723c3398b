"""Work on a batch in pieces that stay in the processor's cache, shared out over threads."""

import math
from collections.abc import Callable

import torch

from dino.environment import run_threaded

CACHED_VALUES = 2**18  # values of one tensor at a time: a few such tensors fit into a core's second-level cache
SHARES_PER_THREAD = 4  # so that a thread that was held up leaves work to the others


def piece_size(batch: int, values: int, device: torch.device) -> int:
    """How many samples to work on at a time.

    Args:
        batch: Samples of the batch.
        values: Values of one tensor for one sample.
        device: On anything but a CPU the whole batch is one piece.
    """
    return max(1, min(batch, CACHED_VALUES // values)) if device.type == "cpu" else batch


def in_pieces(work: Callable[[int, int], None], batch: int, piece: int, device: torch.device) -> None:
    """Call ``work(first, last)`` on shares of the batch: on a CPU by torch's number of threads, else all at once.

    Every thread takes whole samples and runs each operation by itself: splitting the operations themselves makes the
    threads wait for each other after every one of them.

    Args:
        work: What to do with samples ``first ... last - 1``; must touch those alone.
        batch: Samples of the batch.
        piece: Shares are multiples of this.
        device: Where the samples are.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    share = math.ceil(batch / (piece * threads * SHARES_PER_THREAD)) * piece if threads > 1 else batch
    firsts = range(0, batch, max(share, 1))
    if len(firsts) < 2:
        work(0, batch)
        return

    run_threaded(lambda first: work(first, min(first + share, batch)), firsts)
