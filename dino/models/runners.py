"""How a backbone runs its blocks: as written, compiled, or forgetting what lies inside them until it is needed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dino.errors import ConfigError
from dino.models.blocks import run_block

__all__ = ["BlockRunner", "CompiledBlocks", "choose_runner", "run_block", "with_checkpoints"]

BlockRunner = Callable[[Any, Tensor, Tensor | None, int | None], Tensor]  # as run_block
COMPILE = ("auto", "true", "false")
# Graphs of one block that a run needs: student with and without the cls-only end for each size of view, and teacher.
MOST_GRAPHS = 32


class CompiledBlocks:
    """:func:`run_block`, compiled by torch: one graph for all blocks of a network, one for each size of its input.

    Blocks are compiled rather than whole networks because that takes a fraction of the time. The parameters of a block
    and its drop-path multipliers are inputs of the graph. torch keeps what it compiled (``TORCHINDUCTOR_CACHE_DIR``)
    for the next start. Where compiling fails the blocks are run as written; a warning says so once. Judging and
    extraction run as written: their batches come in many sizes, and each would be compiled anew.

    Args:
        warn: Takes the warning.
        backend: torch's compiler; tests take one that needs no C++.
    """

    def __init__(self, warn: Callable[[str], None], backend: str = "inductor") -> None:
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        self.warn, self.failed, self._failures = warn, False, TorchDynamoException
        # DDP's gradients are averaged in buckets of its own; cutting graphs at their borders is for whole networks.
        config.optimize_ddp = False
        config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
        self._compiled = torch.compile(run_block, dynamic=False, backend=backend)

    def __call__(self, block: Any, tokens: Tensor, keep: Tensor | None = None, first: int | None = None) -> Tensor:
        """As :func:`run_block`."""
        if self.failed or torch.is_inference_mode_enabled():
            return run_block(block, tokens, keep, first)
        try:
            return self._compiled(block, tokens, keep, first)
        except self._failures as error:
            self.failed = True
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            self.warn(
                f"the blocks cannot be compiled here ({reason}); training goes on without. Compiling needs triton and "
                "compute capability 7.0 on a GPU, a C++ compiler on a CPU; speed.compile=false does not try"
            )
            return run_block(block, tokens, keep, first)


def with_checkpoints(run: BlockRunner) -> BlockRunner:
    """Keep only the input of each block for the backward pass, which computes the block once more.

    Chen et al. 2016, arXiv 1604.06174. The memory for what lies inside of the blocks falls to that of one block; the
    values are the same.
    """

    def run_and_forget(block: Any, tokens: Tensor, keep: Tensor | None = None, first: int | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return run(block, tokens, keep, first)
        # Nothing inside a block is random: drop-path comes as multipliers.
        return checkpoint(run, block, tokens, keep, first, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    return run_and_forget


def choose_runner(
    compile: str, checkpointing: bool, device: torch.device, warn: Callable[[str], None]
) -> tuple[BlockRunner, bool]:
    """The runner that the settings ask for.

    Args:
        compile: ``auto`` (on a GPU), ``true`` or ``false``.
        checkpointing: Keep only the inputs of blocks.
        device: Where the blocks run.
        warn: Takes a warning when blocks cannot be compiled.

    Returns:
        The runner, and whether it compiles.

    Raises:
        ConfigError: If ``compile`` is none of the three.
    """
    if compile.lower() not in COMPILE:
        raise ConfigError(f"expected speed.compile auto, true or false, found '{compile}'")
    compiles = compile.lower() == "true" or (compile.lower() == "auto" and device.type == "cuda")
    run: BlockRunner = CompiledBlocks(warn) if compiles else run_block
    return (with_checkpoints(run) if checkpointing else run), compiles
