"""Out of memory on a GPU: which settings make room."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dino.config.schema import PretrainConfig
from dino.errors import OutOfMemory


@contextmanager
def memory_explained(config: PretrainConfig) -> Iterator[None]:
    """Turn a GPU's lack of memory in the block into one line that says which settings to change.

    Raises:
        OutOfMemory: If the memory did not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise OutOfMemory(
            f"expected training.batch_size_per_gpu={config.training.batch_size_per_gpu} to fit into the memory of the "
            f"GPU, found that it does not ({reason}); {ways_out(config)}"
        ) from error


def ways_out(config: PretrainConfig) -> str:
    """The settings that need less memory, as words to type; those that leave the run the same come first."""
    training, ways = config.training, []
    size = training.batch_size_per_gpu
    if size > 1:
        # Halves; an odd batch falls to its next smaller share, so that the global batch stays.
        shares = next(n for n in range(2, size + 1) if size % n == 0)
        ways.append(
            f"training.batch_size_per_gpu={size // shares} "
            f"training.gradient_accumulation={training.gradient_accumulation * shares} (the same global batch)"
        )
    if not config.speed.checkpointing:
        ways.append("speed.checkpointing=true (slower steps)")
    if not ways:
        return "only a smaller model needs less: model.arch, model.out_dim, or fewer aug.local_crops_number; a new run"
    return f"set {' or '.join(ways)}, and run the same command again: it goes on from its last checkpoint"
