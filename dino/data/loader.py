"""Batches by draw number: workers decode samples and draw crop parameters, which the device applies later."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dino import randomness
from dino.data.datasets import BadSample, Dataset, Sample
from dino.data.samplers import Sampler
from dino.errors import DataError
from dino.signals import ignore_signals_in_worker

ATTEMPTS = 20  # samples that are tried for one draw
IN_MESSAGE = 2**16  # bytes of the largest tensor that is sent in the message of a worker itself

Draw = Callable[[tuple[int, int], np.ndarray | None, np.random.Generator], Mapping[str, np.ndarray]]
DrawMask = Callable[[Mapping[str, np.ndarray], np.ndarray | None, np.random.Generator], np.ndarray]


@dataclass
class Batch:
    """Samples of consecutive draws, with everything random about them.

    Attributes:
        inputs: ``(B, 3, H, W)`` uint8 tiles, padded at the right and bottom, ``(B, P, 3, H, W)`` pictures of P
            spacings, ``(B, h * w, D)`` cells of feature grids, or ``(B,)`` int64 rows of grids that the crops hold.
        draws: ``(B,)`` int64 draw numbers.
        parameters: Crop parameters by name, each ``(B, V, ...)``.
        keep: ``(B, V, depth, 2)`` float32 multipliers of the residual branches (drop-path), or None.
        mask: ``(B, G, N)`` bool, masked tokens of the global views, or None.
        names: Name of each sample.
        slide_ids: Slide of each sample, where known.
        bad: ``(name, reason)`` of samples that could not be used and were replaced.
        indices: Index of each sample in the dataset.
    """

    inputs: Tensor
    draws: Tensor
    parameters: dict[str, Tensor]
    keep: Tensor | None
    names: list[str]
    slide_ids: list[str | None]
    bad: list[tuple[str, str]] = field(default_factory=list)
    mask: Tensor | None = None
    indices: list[int] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors as arrays, which are sent in a worker's message; each tensor would take shared memory."""
        return {name: _to_arrays(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: _to_tensors(value) for name, value in state.items()})

    def pin_memory(self) -> "Batch":
        """The same batch with its inputs in page-locked memory, for asynchronous copies."""
        keep = self.keep.pin_memory() if self.keep is not None else None
        return replace(self, inputs=self.inputs.pin_memory(), keep=keep)


def _to_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_arrays(one) for name, one in value.items()}
    if not isinstance(value, Tensor) or value.nbytes > IN_MESSAGE or value.dtype == torch.bfloat16:  # NumPy has none
        return value
    return value.numpy()


def _to_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_tensors(one) for name, one in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@dataclass(frozen=True)
class DropPath:
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382), drawn outside the model.

    Attributes:
        rate: Rate of the last block; it rises linearly from 0 at the first.
        depth: Number of blocks.
        views: Number of student views.
    """

    rate: float
    depth: int
    views: int

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """``(V, depth, 2)`` multipliers: 0 for a skipped branch, else 1 / (1 - rate of its block)."""
        rates = np.linspace(0.0, self.rate, self.depth)[:, None]
        kept = rng.random((self.views, self.depth, 2)) >= rates
        return (kept / (1 - rates)).astype(np.float32)


class DrawnBatches(TorchDataset):
    """Batches by their first draw number.

    Args:
        dataset: The samples.
        sampler: Which of them a draw takes.
        draw: Draws one sample's crop parameters from its shape, tissue and generator.
        drop_path: Draws the skipped branches; None for no stochastic depth.
        batch_size: Samples of a batch.
        seed: Seed of crops, stochastic depth and masks.
        masks: Draws the masked tokens from a sample's crop parameters and tissue; None for no masks.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        draw: Draw,
        drop_path: DropPath | None,
        batch_size: int,
        seed: int,
        masks: DrawMask | None = None,
    ) -> None:
        self.dataset, self.sampler, self.draw, self.drop_path = dataset, sampler, draw, drop_path
        self.masks, self.batch_size, self.seed = masks, batch_size, seed
        purposes = ("crops", "drop_path", "masks")
        self._crops, self._drop_path, self._masks = (randomness.Stream(seed, purpose) for purpose in purposes)

    def __getitem__(self, first_draw: int) -> Batch:
        """The batch of draws ``first_draw ... first_draw + batch_size - 1``.

        Raises:
            DataError: If a sample and all its replacements are bad.
        """
        draws = range(first_draw, first_draw + self.batch_size)
        bad: list[tuple[str, str]] = []
        indices, samples = self._samples(draws, bad)
        drawn = [self._parameters(draw, sample) for draw, sample in zip(draws, samples, strict=True)]
        return Batch(
            inputs=stack_padded([sample.pixels for sample in samples]),
            draws=torch.tensor(list(draws)),
            parameters={key: _stacked([one[key] for one in drawn]) for key in drawn[0]},
            keep=self._keep(draws),
            mask=self._mask(draws, drawn, samples),
            names=[sample.name for sample in samples],
            slide_ids=[sample.slide_id for sample in samples],
            bad=bad,
            indices=indices,
        )

    def _samples(self, draws: Sequence[int], bad: list[tuple[str, str]]) -> tuple[list[int], list[Sample]]:
        """Indices and samples of some draws, read in the order of the indices: those of one slide after one another."""
        indices = {draw: self.sampler(draw) for draw in draws}
        samples: dict[int, Sample] = {}
        replaced: dict[int, list[tuple[str, str]]] = {draw: [] for draw in draws}
        for draw in sorted(draws, key=indices.__getitem__):
            indices[draw], samples[draw] = self._sample(draw, indices[draw], replaced[draw])
        bad += [one for found in replaced.values() for one in found]
        return [indices[draw] for draw in draws], [samples[draw] for draw in draws]

    def _sample(self, draw: int, index: int, bad: list[tuple[str, str]]) -> tuple[int, Sample]:
        for attempt in range(ATTEMPTS):
            index = self.sampler(draw, attempt) if attempt else index
            try:
                return index, self.dataset.drawn(index, draw)
            except BadSample as error:
                bad.append((error.name, str(error)))
        raise DataError(
            f"expected usable samples, found {ATTEMPTS} in a row that are not; the last one: {bad[-1][1]}; check that "
            "the folder of the data is still there, then run the same command again"
        )

    def _parameters(self, draw: int, sample: Sample) -> Mapping[str, np.ndarray]:
        return self.draw(sample.shape, sample.tissue, self._crops.at(draw))

    def _keep(self, draws: Sequence[int]) -> Tensor | None:
        if self.drop_path is None:
            return None
        masks = [self.drop_path.draw(self._drop_path.at(draw)) for draw in draws]
        return torch.from_numpy(np.stack(masks))  # (B, V, depth, 2)

    def _mask(
        self, draws: Sequence[int], drawn: Sequence[Mapping[str, np.ndarray]], samples: Sequence[Sample]
    ) -> Tensor | None:
        if self.masks is None:
            return None
        triples = zip(draws, drawn, samples, strict=True)
        masks = [self.masks(parameters, sample.tissue, self._masks.at(draw)) for draw, parameters, sample in triples]
        return torch.from_numpy(np.stack(masks))  # (B, G, N)


def _stacked(arrays: Sequence[np.ndarray]) -> Tensor:
    """``np.stack`` of arrays of one shape, without its checks of each of them, which take longer than the copy."""
    return torch.from_numpy(np.concatenate(arrays).reshape(len(arrays), *arrays[0].shape))


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack ``(..., H_i, W_i)`` tensors to ``(B, ..., max H, max W)``, zeros at the right and bottom."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors))
    height = max(tensor.shape[-2] for tensor in tensors)
    width = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2])) for t in tensors])


@dataclass(frozen=True)
class Layout:
    """How the draws of a step are distributed over processes and micro-batches.

    Attributes:
        batch_size: Samples per process and micro-batch.
        accumulation: Micro-batches per step.
        processes: Number of processes.
        process: Rank of this one.
    """

    batch_size: int
    accumulation: int = 1
    processes: int = 1
    process: int = 0

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step."""
        return self.batch_size * self.accumulation * self.processes

    def first_draws(self, first_step: int, last_step: int) -> Iterator[int]:
        """First draw number of each of this process's micro-batches, step after step."""
        for step in range(first_step, last_step):
            for micro in range(self.accumulation):
                yield step * self.global_batch + (micro * self.processes + self.process) * self.batch_size


class _FirstDraws:
    """Sized, lazy iterable over :meth:`Layout.first_draws`, which lists no run's batches in memory."""

    def __init__(self, layout: Layout, first_step: int, last_step: int) -> None:
        self._layout, self._steps = layout, (first_step, last_step)

    def __iter__(self) -> Iterator[int]:
        return self._layout.first_draws(*self._steps)

    def __len__(self) -> int:
        return (self._steps[1] - self._steps[0]) * self._layout.accumulation


def load_batches(
    batches: DrawnBatches, layout: Layout, steps: tuple[int, int], *, workers: int, prefetch: int, pin: bool
) -> DataLoader:
    """Iterate over the micro-batches of this process for steps ``steps[0] ... steps[1] - 1``, in order.

    Args:
        batches: The batches by first draw number.
        layout: Which draws this process takes.
        steps: First step, and the step after the last one.
        workers: Worker processes; 0 loads in this process. The batches are the same for any number.
        prefetch: Batches that each worker prepares ahead.
        pin: Copy the batches into page-locked memory.
    """
    return _Loader(
        _ErrorsAsItems(batches),
        batch_size=None,
        sampler=_FirstDraws(layout, *steps),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        worker_init_fn=ignore_signals_in_worker,
    )


class _ErrorsAsItems(TorchDataset):
    """Returns a user's error instead of raising it, because torch puts a worker's traceback into the message."""

    def __init__(self, batches: DrawnBatches) -> None:
        self.batches = batches

    def __getitem__(self, first_draw: int) -> Batch | DataError:
        try:
            return self.batches[first_draw]
        except DataError as error:
            return error


class _Loader(DataLoader):
    """DataLoader that raises the errors of :class:`_ErrorsAsItems`.

    It does not print torch's warning about more workers than cores, which the user has chosen.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches in order.

        Raises:
            DataError: If a sample and all its replacements are bad.
        """
        for item in super().__iter__():
            if isinstance(item, DataError):
                raise item
            yield item

    def check_worker_number_rationality(self) -> None:
        """Print no warning."""
