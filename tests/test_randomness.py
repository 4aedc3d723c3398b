import numpy as np
import pytest

from dino import randomness


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_every_pass_is_a_permutation(count: int) -> None:
    for epoch in range(3):
        taken = [randomness.permuted(5, epoch * count + i, count) for i in range(count)]
        assert sorted(taken) == list(range(count))


def test_passes_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [randomness.permuted(seed, epoch * 500 + i, 500) for i in range(500)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        agreement = np.mean(np.array(orders[first]) == np.array(orders[second]))
        assert agreement < 0.02  # the expected agreement is 1/500


def test_positions_are_uniform() -> None:
    """Over many passes, the first item is uniformly distributed (chi-square with 63 degrees of freedom)."""
    count, passes = 64, 640
    first = np.bincount([randomness.permuted(3, p * count, count) for p in range(passes)], minlength=count)
    chi_square = ((first - passes / count) ** 2 / (passes / count)).sum()
    assert 30 < chi_square < 110  # the 0.0001 and 0.9998 quantiles


def test_generators_are_functions_of_their_arguments() -> None:
    def numbers(*key: object) -> np.ndarray:
        return randomness.generator(*key).random(4)  # type: ignore[arg-type]

    assert np.array_equal(numbers(1, 2, "crops"), numbers(1, 2, "crops"))
    others = [numbers(1, 3, "crops"), numbers(2, 2, "crops"), numbers(1, 2, "drop_path")]
    assert not any(np.array_equal(numbers(1, 2, "crops"), other) for other in others)


def test_a_stream_gives_the_numbers_of_a_new_generator() -> None:
    stream = randomness.Stream(1, "crops")
    for draw in (5, 0, 5, 2**40, 2**64 - 1):
        fresh = np.random.Generator(
            np.random.Philox(key=np.array([randomness._mix(1, "crops"), draw], dtype=np.uint64))
        )
        moved = stream.at(draw)
        assert moved.integers(2**31, dtype=np.uint32) == fresh.integers(2**31, dtype=np.uint32)  # half of a number
        assert np.array_equal(moved.random(7), fresh.random(7))
