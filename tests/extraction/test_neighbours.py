"""Neighbours by bounds are those of a search through everything, in double precision."""

import numpy as np
import pytest

from dino.extraction.encoder_features import SlideFeatures
from dino.extraction.neighbours import Bounds

DIM = 48


def _parts(rows, sizes):
    ends = np.cumsum(sizes)
    return [SlideFeatures(rows[end - size : end], np.arange(size)) for end, size in zip(ends, sizes, strict=True)]


def _rows(kind, rng):
    rows = rng.normal(size=(6_000, DIM))
    if kind == "few directions":
        rows = (rows * 0.7 ** np.arange(DIM)) @ np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    if kind == "groups":
        rows = rng.normal(size=(20, DIM))[rng.integers(0, 20, 6_000)] + 0.05 * rows
    if kind == "copies":
        rows = np.repeat((rows * 0.7 ** np.arange(DIM))[:3_000], 2, axis=0)
    rows[17] = 0
    return rows.astype(np.float16 if kind == "groups" else np.float32)


@pytest.mark.parametrize("kind", ["few directions", "groups", "copies"])
def test_they_are_those_of_brute_force(kind):
    rng = np.random.default_rng(0)
    rows = _rows(kind, rng)
    parts = _parts(rows, [1_000, 0, 4_000, 1_000])
    bounds = Bounds(parts, np.concatenate([part.unit() for part in parts]), directions=16)
    unit = rows.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
    excluded = np.zeros(len(rows), bool)
    excluded[500:2_500] = True
    answers = 0
    for query in (3, 999, 3_500, 5_999):
        found = bounds.nearest(unit[query].astype(np.float32), 12, excluded)
        answers += found is not None
        if found is None:
            continue
        similar = np.where(excluded, -np.inf, unit @ unit[query])
        expected = np.sort(similar)[::-1][:12]
        np.testing.assert_allclose(found[1], expected, atol=1e-6)
        np.testing.assert_allclose(similar[found[0]], expected, atol=1e-6)  # and these rows have them
        assert len(set(found[0].tolist())) == 12
    assert answers >= 3, "bounds should help here"


def test_bounds_that_exclude_nothing_say_so():
    """Noise in all directions: no tile is similar, and all bounds are alike."""
    rows = _rows("noise", np.random.default_rng(0))
    parts = _parts(rows, [6_000])
    bounds = Bounds(parts, parts[0].unit(), directions=4)
    assert bounds.nearest(parts[0].unit(np.array([0]))[0], 5, np.zeros(6_000, bool)) is None


def test_fewer_rows_than_neighbours():
    rows = _rows("few directions", np.random.default_rng(0))[:10]
    parts = _parts(rows, [10])
    bounds = Bounds(parts, parts[0].unit(), directions=4)
    excluded = np.zeros(10, bool)
    excluded[[0, 9]] = True
    found = bounds.nearest(parts[0].unit(np.array([0]))[0], 16, excluded)
    assert found is not None and sorted(found[0].tolist()) == list(range(1, 9))
