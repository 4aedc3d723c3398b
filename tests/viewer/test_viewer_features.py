"""Colours, clusters and neighbours of the features of a ROOT against float64 formulas and brute force."""

import time

import numpy as np
import pytest

from dino.errors import DataError
from dino.extraction import encoder_features
from dino.extraction.colours import Clusters, ColourBasis
from dino.extraction.encoder_features import EncoderFeatures
from tests.viewer.conftest import HOSTILE, PATIENTS


@pytest.fixture(scope="module")
def encoder(catalogue):
    return EncoderFeatures(catalogue, "random", 4)


def _unit(rows):
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_neighbours_are_those_of_brute_force_over_other_patients(encoder, features):
    for slide_id, tile in (("one", 0), ("two", 17), (HOSTILE, 5)):
        query = _unit(features[slide_id])[tile]
        expected = sorted(
            (-float(row @ query), other, i)
            for other in features
            if PATIENTS[other] != PATIENTS[slide_id]
            for i, row in enumerate(_unit(features[other]))
        )[:9]
        found = encoder.neighbours(slide_id, tile, 9)
        assert [(one.slide_id, one.tile) for one in found] == [(slide, i) for _, slide, i in expected]
        np.testing.assert_allclose([-one.similarity for one in found], [value for value, *_ in expected], atol=1e-6)


@pytest.mark.parametrize("others", [True, False])
def test_neighbours_of_many_tiles_are_the_same(catalogue, encoder, monkeypatch, others):
    """With the bounds that searches through many tiles use, which are made while the first search goes on."""
    monkeypatch.setattr(encoder_features, "BOUNDED_ROWS", 10)
    many = EncoderFeatures(catalogue, "random", 4)
    many.neighbours("one", 0, 5)
    until = time.monotonic() + 60
    while many._bounds() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert many._bounds() is not None
    for slide_id, tile in (("one", 0), ("two", 17), (HOSTILE, 5)):
        found, expected = many.neighbours(slide_id, tile, 9, others), encoder.neighbours(slide_id, tile, 9, others)
        assert [(one.slide_id, one.tile) for one in found] == [(one.slide_id, one.tile) for one in expected]


def test_neighbours_of_all_slides_leave_out_the_tile_itself(encoder, features):
    count = sum(len(rows) for rows in features.values())
    found = encoder.neighbours("one", 3, count + 5, others=False)
    assert len(found) == len({(one.slide_id, one.tile) for one in found}) == count - 1
    assert ("one", 3) not in {(one.slide_id, one.tile) for one in found}


def test_similarity_is_the_cosine(encoder, features):
    query = encoder.vector("one", 2)
    expected = _unit(features["two"]) @ _unit(features["one"])[2]
    np.testing.assert_allclose(encoder.similarity("two", query), expected, atol=1e-6)


def test_equal_features_have_equal_colours_on_all_slides(catalogue, features, encoder):
    """One basis for all slides: a row gets the colour that the published formula of PCA gives over all slides."""
    everything = np.concatenate([_unit(features[slide]) for slide in encoder.slide_ids])
    centred = everything - everything.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    scores = centred @ axes[:3].T
    scores *= np.where((scores**3).sum(0) < 0, -1, 1)
    low, high = np.percentile(scores, [2, 98], axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1) * 255
    found = np.concatenate([encoder.rgb(slide) for slide in encoder.slide_ids])
    assert np.abs(found - expected).max() < 1.01


def test_clusters_find_separate_groups(features):
    rng = np.random.default_rng(1)
    centres = np.eye(5)[[0, 0, 0, 1, 1, 2]]  # groups of 60, 40 and 20 rows
    rows = np.repeat(centres, 20, axis=0) + 0.01 * rng.normal(size=(120, 5))
    unit = _unit(rows).astype(np.float32)
    clusters = Clusters.fit(unit, 3)
    assert clusters.assign(unit).tolist() == [0] * 60 + [1] * 40 + [2] * 20  # the largest first
    np.testing.assert_allclose(clusters.centres, np.eye(5)[:3], atol=0.02)


def test_examples_are_of_their_cluster_and_of_different_slides(encoder):
    for cluster, examples in enumerate(encoder.examples()):
        assert examples
        assert {encoder.cluster(slide)[tile] for slide, tile in examples} == {cluster}
        with_it = {slide for slide in encoder.slide_ids if (encoder.cluster(slide) == cluster).any()}
        assert {slide for slide, _ in examples} == with_it


def test_features_without_variance_are_grey():
    unit = np.tile(np.eye(4, dtype=np.float32)[0], (10, 1))
    assert (ColourBasis.fit(unit).rgb(unit) == 128).all()


def test_tiles_without_features_are_marked(catalogue, painted, features, tmp_path):
    """Features of some of the tiles, in another order."""
    import h5py

    folder = painted / "features_partial"
    folder.mkdir()
    tiles = catalogue.tiles["one"]
    order = np.arange(len(tiles.coords))[::-2]
    with h5py.File(folder / "one.h5", "w") as file:
        file.create_dataset("features", data=features["one"][order], chunks=(2, 8), compression="gzip")
        file["coords"] = tiles.coords[order]
    try:
        partial = EncoderFeatures(catalogue, "partial", 3)
        np.testing.assert_allclose(partial.vector("one", int(order[1])), _unit(features["one"])[order[1]], atol=1e-6)
        absent = np.setdiff1d(np.arange(len(tiles.coords)), order)
        assert (partial.cluster("one")[absent] == -1).all()
        assert (partial.cluster("one")[order] >= 0).all()
        with pytest.raises(DataError, match="expected features of this tile from partial"):
            partial.vector("one", int(absent[0]))
        with pytest.raises(DataError, match="expected features of slide 'two'"):
            partial.rgb("two")
    finally:
        (folder / "one.h5").unlink()
        folder.rmdir()
