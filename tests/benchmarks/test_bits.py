"""The comparison of commits finds what differs."""

import torch

from benchmarks.bits import difference, digest, leaves


def test_equal_values_do_not_differ() -> None:
    assert difference(torch.tensor([1.0, torch.nan]).nan_to_num(), torch.tensor([1.0, 0.0])) == ""
    assert difference(0.5, 0.5) == ""


def test_the_last_bit_counts() -> None:
    one = torch.tensor([1.0, 2.0])
    assert "differs by up to" in difference(one, torch.nextafter(one, torch.tensor(9.0)))
    assert difference(one, one.double())
    assert difference(one, torch.ones(3))
    assert difference(0.1 + 0.2, 0.3)


def test_leaves_are_named_by_their_path() -> None:
    nested = {"state": {0: {"exp_avg": 1}}, "groups": [{"lr": 2}, 3]}
    assert dict(leaves(nested)) == {"state/0/exp_avg": 1, "groups/0/lr": 2, "groups/1": 3}


def test_the_digest_depends_on_names_and_values() -> None:
    values = {"a": torch.ones(2), "b": 1.5}
    assert digest(values) == digest(dict(reversed(values.items())))
    assert digest(values) != digest({**values, "b": 1.25}) != digest({"a": torch.ones(2), "c": 1.25})
