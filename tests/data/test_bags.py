"""Bags read from files written as the documentation and code of CLAM, TRIDENT and slide2vec write theirs."""

import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dino.data.bags import find_bags, open_bag
from dino.errors import DataError

FEATURES = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
COORDS = np.stack([np.arange(300) % 20, np.arange(300) // 20], 1) * 512


def write_h5(path: Path, features: np.ndarray = FEATURES, coords: np.ndarray | None = COORDS) -> Path:
    """As TRIDENT's ``save_h5``: chunks of one row, attributes on the datasets."""
    with h5py.File(path, "w") as file:
        chunks = (1, *features.shape[1:]) if features.size else True
        dataset = file.create_dataset("features", data=features, maxshape=(None, *features.shape[1:]), chunks=chunks)
        dataset.attrs.update({"name": "s", "encoder": "uni_v1"})
        if coords is not None:
            file.create_dataset("coords", data=coords).attrs.update({"patch_size": 256, "patch_size_level0": 512})
    return path


def test_trident_files(tmp_path: Path) -> None:
    bag = open_bag(write_h5(tmp_path / "s.h5"))
    assert (len(bag), bag.dim, bag.features.shape) == (300, 8, (300, 8))
    np.testing.assert_array_equal(bag.read(), FEATURES)
    np.testing.assert_array_equal(bag.coords, COORDS)
    assert bag.coords.dtype == np.int64
    assert bag.attributes == {"name": "s", "encoder": "uni_v1", "patch_size": 256, "patch_size_level0": 512}


ROWS = [
    slice(10, 20),
    slice(None, None, 7),
    np.array([299, 3, 3, 150, -1]),
    np.arange(300) % 2 == 0,
    np.array([], dtype=np.int64),
]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("kind", ["h5", "stacked", "pt", "npz"])
def test_rows_are_those_of_numpy(tmp_path: Path, kind: str, rows: slice | np.ndarray) -> None:
    path = tmp_path / f"s.{'h5' if kind == 'stacked' else kind}"
    if kind == "pt":
        torch.save(torch.from_numpy(FEATURES), path)
    elif kind == "npz":
        np.savez_compressed(path, features=FEATURES)
    else:
        write_h5(path, FEATURES[None] if kind == "stacked" else FEATURES, None)
    bag = pickle.loads(pickle.dumps(open_bag(path)))
    np.testing.assert_array_equal(bag.features[rows], FEATURES[rows])
    np.testing.assert_array_equal(bag.read(rows), FEATURES[rows])


def test_one_vector_per_slide(tmp_path: Path) -> None:
    """TRIDENT's slide features are (D,) or (1, D) beside the coordinates of all tiles; those of slide2vec are (D,)."""
    torch.save(torch.from_numpy(FEATURES[0]), tmp_path / "c.pt")
    paths = [write_h5(tmp_path / "a.h5", FEATURES[0]), write_h5(tmp_path / "b.h5", FEATURES[:1]), tmp_path / "c.pt"]
    for path in paths:
        bag = open_bag(path)
        assert bag.features.shape == (1, 8) and bag.coords is None
        np.testing.assert_array_equal(bag.read(), FEATURES[:1])


def test_a_slide_without_tissue_is_an_empty_bag(tmp_path: Path) -> None:
    assert len(open_bag(write_h5(tmp_path / "a.h5", FEATURES[:0], COORDS[:0]))) == 0
    assert len(open_bag(write_h5(tmp_path / "b.h5", np.empty(0, np.float32), COORDS[:0]))) == 0


@pytest.mark.parametrize("annotation", ["", "tumour"])
@pytest.mark.parametrize("moved", [False, True])
def test_slide2vec_files(tmp_path: Path, annotation: str, moved: bool) -> None:
    """Its ``docs/output-layout.rst``: ``tile_embeddings/<slide>.pt`` and the coordinates in ``tiles/``."""
    run = tmp_path / "run"
    for name in ("tile_embeddings", "tiles"):
        (run / name / annotation).mkdir(parents=True)
    path = run / "tile_embeddings" / annotation / "s.1.pt"
    coordinates = run / "tiles" / annotation / "s.1.coordinates.npz"
    torch.save(torch.from_numpy(FEATURES).half(), path)
    np.savez(coordinates, x=COORDS[:, 0], y=COORDS[:, 1], tile_index=np.arange(300, dtype=np.int32))
    meta = {"encoder_name": "virchow2", "tile_size_lv0": 448, "coordinates_npz_path": str(coordinates)}
    path.with_name("s.1.meta.json").write_text(json.dumps(meta))
    if moved:
        run.rename(tmp_path / "moved")
        path = tmp_path / "moved" / path.relative_to(run)
    bag = open_bag(path)
    assert bag.features[:5].dtype == np.float16 and bag.read().dtype == np.float32
    np.testing.assert_array_equal(bag.read(), FEATURES.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(bag.coords, COORDS)
    assert bag.attributes["encoder_name"] == "virchow2"


def test_regions_of_slide2vec_are_one_bag(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(FEATURES).reshape(3, 100, 8).bfloat16(), tmp_path / "s.pt")
    bag = open_bag(tmp_path / "s.pt")
    assert bag.coords is None
    np.testing.assert_allclose(bag.read(), FEATURES, rtol=0.01)


def test_folders(tmp_path: Path) -> None:
    """CLAM writes each slide as ``h5_files/<slide>.h5`` and ``pt_files/<slide>.pt``."""
    for name, suffix in (("pt_files", ".pt"), ("h5_files", ".h5")):
        (tmp_path / "clam" / name).mkdir(parents=True)
        (tmp_path / "clam" / name / f"a.b{suffix}").touch()
    assert find_bags(tmp_path / "clam") == {"a.b": tmp_path / "clam" / "h5_files" / "a.b.h5"}
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("a.pt", "a.h5", ".b.h5.7.tmp", "extract.json", ".c.h5"):
        (flat / name).touch()
    assert find_bags(flat) == {"a": flat / "a.h5"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found none"):
        find_bags(tmp_path / "empty")


def test_bad_files(tmp_path: Path) -> None:
    nan = FEATURES.copy()
    nan[7, 3] = np.nan
    with pytest.raises(DataError, match="finite"):
        open_bag(write_h5(tmp_path / "nan.h5", nan)).read()
    with pytest.raises(DataError, match="coordinates of 300 rows"):
        open_bag(write_h5(tmp_path / "fewer.h5", coords=COORDS[:9]))
    with pytest.raises(DataError, match="float features"):
        open_bag(write_h5(tmp_path / "int.h5", COORDS))
    (tmp_path / "torn.h5").write_bytes((tmp_path / "nan.h5").read_bytes()[:2000])
    with pytest.raises(DataError, match="cannot read"):
        open_bag(tmp_path / "torn.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = FEATURES
    with pytest.raises(DataError, match="'features'.*found images"):
        open_bag(tmp_path / "other.h5")
    np.savez(tmp_path / "other.npz", images=FEATURES)
    with pytest.raises(DataError, match="'features'"):
        open_bag(tmp_path / "other.npz")
    (tmp_path / "torn.npz").write_bytes(b"torn")
    with pytest.raises(DataError, match="'features'"):
        open_bag(tmp_path / "torn.npz")
    torch.save({"features": torch.zeros(3, 4)}, tmp_path / "dict.pt")
    with pytest.raises(DataError, match="float tensor"):
        open_bag(tmp_path / "dict.pt")
    for name in ("gone.h5", "slide.svs"):
        with pytest.raises(DataError, match="expected features of a slide"):
            open_bag(tmp_path / name)
