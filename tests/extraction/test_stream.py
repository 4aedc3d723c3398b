import threading

import pytest
import torch

from dino.extraction.stream import batches, read_ahead


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_is_kept(workers):
    assert list(read_ahead(lambda i: i * i, range(50), workers, ahead=4)) == [i * i for i in range(50)]


def test_reading_stays_a_bounded_number_of_items_ahead():
    read = []
    stream = read_ahead(lambda i: read.append(i) or i, range(100), 2, ahead=5)
    for _ in range(10):
        next(stream)
    assert len(read) <= 10 + 5
    stream.close()
    assert len(read) < 20


def test_reading_happens_in_other_threads():
    assert threading.main_thread() not in set(read_ahead(lambda _: threading.current_thread(), range(4), 2))


def test_an_error_surfaces_in_its_place():
    def read(i):
        if i == 3:
            raise ValueError("third")
        return i

    stream = read_ahead(read, range(10), 2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="third"):
        next(stream)


def test_batches_break_where_the_shape_changes():
    shapes = [(1, 2), (1, 2), (1, 2), (1, 3), (1, 2)]
    assert [tuple(b.shape) for b in batches([torch.zeros(s) for s in shapes], 2)] == [
        (2, 1, 2),
        (1, 1, 2),
        (1, 1, 3),
        (1, 1, 2),
    ]
