"""A batch as workers send it and the training loop takes it."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IN_MESSAGE = 2**16  # bytes of a tensor that goes into the message itself


@dataclass
class Batch:
    """Samples of consecutive draws with everything random about them.

    Attributes:
        inputs: ``(B, 3, H, W)`` uint8 tiles, padded at the right and bottom, ``(B, h * w, D)`` cells of feature grids,
            or ``(B,)`` int64 rows of grids that the crops hold.
        draws: ``(B,)`` int64 draw numbers.
        parameters: Crop parameters by name, each ``(B, V, ...)``.
        keep: ``(B, V, depth, 2)`` float32 multipliers of the residual branches (drop-path), or None.
        names: Name of each sample.
        slide_ids: Slide of each sample, where known.
        bad: ``(name, reason)`` of samples that could not be used and were replaced.
    """

    inputs: Tensor
    draws: Tensor
    parameters: dict[str, Tensor]
    keep: Tensor | None
    names: list[str]
    slide_ids: list[str | None]
    bad: list[tuple[str, str]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors as arrays, which travel in a worker's message; a tensor takes shared memory of its own."""
        return {name: _packed(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: _unpacked(value) for name, value in state.items()})

    def pin_memory(self) -> "Batch":
        """The same batch with its inputs in page-locked memory, for asynchronous copies."""
        keep = self.keep.pin_memory() if self.keep is not None else None
        return replace(self, inputs=self.inputs.pin_memory(), keep=keep)


def _packed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _packed(one) for name, one in value.items()}
    return value.numpy() if isinstance(value, Tensor) and value.nbytes <= IN_MESSAGE else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unpacked(one) for name, one in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
