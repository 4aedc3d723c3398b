import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from dino import randomness
from dino.data.datasets import BadSample, Dataset, Sample, SlideRanges
from dino.data.loader import IN_MESSAGE, DrawnBatches, DropPath, Layout, load_batches, stack_padded
from dino.data.samplers import PermutationSampler
from dino.errors import DataError


class Numbers(Dataset):
    """A dataset whose sample i is an image filled with i; the samples of ``bad`` cannot be used."""

    fingerprint = "numbers"
    ranges = SlideRanges.of(())

    def __init__(self, count: int, bad: frozenset[int] = frozenset()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Sample:
        if number in self.bad:
            raise BadSample(str(number), f"number {number} is bad")
        shape = (2 + number % 3, 4)
        return Sample(torch.full((3, *shape), number, dtype=torch.uint8), str(number), shape)


def drawn(dataset: Numbers, drop_path: DropPath | None, size: int, seed: int) -> DrawnBatches:
    return DrawnBatches(dataset, PermutationSampler(len(dataset), seed), draw_sides, drop_path, size, seed)


def draw_sides(shape: tuple[int, int], tissue: np.ndarray | None, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"box": np.array([[0, 0, *shape], [0, 0, 1, 1]]), "sigma": rng.random(2)}


def test_a_batch_is_a_function_of_its_draws() -> None:
    batches = drawn(Numbers(10), DropPath(0.5, 3, 2), 4, seed=7)
    first, again = batches[8], batches[8]
    assert first.draws.tolist() == [8, 9, 10, 11]
    assert first.names == [str(randomness.permuted(7, d, 10)) for d in range(8, 12)]
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.keep, again.keep)
    assert first.parameters["box"].shape == (4, 2, 4) and first.keep.shape == (4, 2, 3, 2)
    alone = drawn(Numbers(10), DropPath(0.5, 3, 2), 1, seed=7)[9]
    assert torch.equal(alone.parameters["sigma"][0], first.parameters["sigma"][1])
    assert torch.equal(alone.keep[0], first.keep[1])


def test_pickled_batches_are_equal_and_contain_small_tensors_as_arrays() -> None:
    batch = drawn(Numbers(10), DropPath(0.5, 3, 2), 4, seed=7)[0]
    batch.inputs = torch.zeros(IN_MESSAGE + 1, dtype=torch.uint8)
    state = batch.__getstate__()
    assert isinstance(state["inputs"], torch.Tensor)  # through shared memory
    assert not any(isinstance(value, torch.Tensor) for value in (state["keep"], *state["parameters"].values()))
    for sent in (pickle.loads(ForkingPickler.dumps(batch)), pickle.loads(pickle.dumps(batch)), copy.copy(batch)):
        assert (sent.names, sent.slide_ids, sent.bad) == (batch.names, batch.slide_ids, batch.bad)
        assert torch.equal(sent.inputs, batch.inputs) and torch.equal(sent.keep, batch.keep)
        assert sent.parameters.keys() == batch.parameters.keys()
        assert all(torch.equal(sent.parameters[name], value) for name, value in batch.parameters.items())
        assert all(sent.parameters[name].dtype == value.dtype for name, value in batch.parameters.items())


def test_small_batches_in_bf16_are_sent() -> None:
    """Cells of grids for a bf16 run; NumPy has no such type."""
    batch = drawn(Numbers(8), None, 2, seed=0)[0]
    batch.inputs = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    for sent in (pickle.loads(ForkingPickler.dumps(batch)), pickle.loads(pickle.dumps(batch)), copy.copy(batch)):
        assert sent.inputs.dtype == torch.bfloat16 and torch.equal(sent.inputs, batch.inputs)


def test_unequal_samples_are_padded_at_the_end() -> None:
    stacked = stack_padded([torch.ones(1, 2, 3), torch.ones(1, 3, 1)])
    assert stacked.tolist() == [[[[1, 1, 1], [1, 1, 1], [0, 0, 0]]], [[[1, 0, 0], [1, 0, 0], [1, 0, 0]]]]


def test_bad_samples_are_replaced_and_reported() -> None:
    batch = drawn(Numbers(10, frozenset({3})), None, 10, seed=0)[0]
    assert [name for name, _ in batch.bad] == ["3"] and "3" not in batch.names and len(batch.names) == 10
    with pytest.raises(DataError, match="in a row"):
        drawn(Numbers(2, frozenset({0, 1})), None, 1, seed=0)[0]


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (2, 3), (4, 1)])
def test_processes_share_each_step_without_repetition(processes: int, accumulation: int) -> None:
    layouts = [Layout(12 // processes // accumulation, accumulation, processes, p) for p in range(processes)]
    for step in range(3):
        draws = [
            d
            for one in layouts
            for first in one.first_draws(step, step + 1)
            for d in range(first, first + one.batch_size)
        ]
        assert sorted(draws) == list(range(step * 12, step * 12 + 12))


def test_resuming_is_an_offset() -> None:
    batches = drawn(Numbers(10), None, 2, seed=1)
    layout = Layout(2, accumulation=2)
    whole = [b.names for b in load_batches(batches, layout, (0, 4), workers=0, prefetch=2, pin=False)]
    rest = [b.names for b in load_batches(batches, layout, (3, 4), workers=2, prefetch=2, pin=False)]
    assert len(whole) == 8 and rest == whole[6:]


def test_drop_path_rates_rise_linearly_and_keep_the_mean() -> None:
    drop_path = DropPath(0.4, 5, views=4)
    masks = np.stack([drop_path.draw(randomness.generator(0, d, "drop_path")) for d in range(2000)])  # (n, V, depth, 2)
    assert masks.shape == (2000, 4, 5, 2)
    rates = (masks == 0).mean((0, 1, 3))
    assert np.allclose(rates, np.linspace(0, 0.4, 5), atol=0.015)  # five standard errors of 16,000 draws
    assert np.allclose(masks.mean((0, 1, 3)), 1, atol=0.03)
