"""Tiles of tar and parquet shards, beside the same tiles as files."""

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import PACKERS, as_tars, contents, pack_parquet, pack_tar
from tiny_runs import make_tiles

from dino.data import FolderTiles, TileDataset, list_names
from dino.data.datasets import BadSample, ChangedData
from dino.data.shard_index import ShardIndex, Shards, damage_of, read_index
from dino.data.shards import ParquetTiles, ShardTiles, TarTiles, open_parquet, open_tars, shard_kind
from dino.errors import ConfigError, DataError

KINDS = ["tar", "parquet"]


def open_folder(folder: Path, kind: str, cache: str = "auto", *, may_write: bool = True) -> ShardTiles:
    if kind == "tar":
        return TarTiles(*open_tars(folder, cache, of_slides=False, may_write=may_write))
    pytest.importorskip("pyarrow")
    return ParquetTiles(*open_parquet(folder, cache, may_write=may_write))


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    return make_tiles(tmp_path / "tiles")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def shards(tiles: Path, tmp_path: Path, kind: str) -> Path:
    return PACKERS[kind](tiles, tmp_path / kind)


def test_shards_hold_the_names_slides_and_pixels_of_the_folder(tiles: Path, shards: Path, kind: str) -> None:
    names = list_names(tiles)
    found, files = TileDataset(open_folder(shards, kind)), TileDataset(FolderTiles(tiles, names))
    assert shard_kind(shards) == kind and shard_kind(tiles) is None
    assert found.fingerprint == files.fingerprint and len(found) == len(names)
    assert found.ranges.slide_ids == files.ranges.slide_ids and (found.ranges.starts == files.ranges.starts).all()
    for index in np.random.default_rng(0).permutation(len(names)).tolist():
        one, other = found[index], files[index]
        assert one.name == other.name == names[index] and one.slide_id == other.slide_id
        assert torch.equal(one.pixels, other.pixels)


def test_nested_names_are_sorted_as_files_are(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "tiles"
    for name in ("a-1/a-1_0_0.png", "a/a_0_0.png", "a/a_10_0.png", "b.png", "a/deep/x.png", "µ/組_0_0.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(source / name)
    found = open_folder(PACKERS[kind](source, tmp_path / kind), kind)
    assert list(found.names) == list_names(source)


def test_the_index_is_made_once_and_again_after_any_change(
    shards: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_folder(shards, kind)
    assert (shards / ".histodino" / f"{kind}.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr("dino.data.shard_index.build_index", lambda *_: pytest.fail("indexed again"))
        again = open_folder(shards, kind)
    assert again.names.fingerprint == first.names.fingerprint and isinstance(again._index.places, np.memmap)

    for path in shards.glob(".histodino/*.places.npy"):
        path.write_bytes(path.read_bytes()[:-8])  # a damaged index is made again
    assert open_folder(shards, kind).names.fingerprint == first.names.fingerprint
    changed = sorted(shards.glob(f"*.{kind}"))[0]
    changed.unlink()
    fewer = open_folder(shards, kind)
    assert 0 < len(fewer.names) < len(first.names) and len(list(shards.glob(".histodino/*.npy"))) == 6


def test_an_index_that_may_not_be_written_is_in_memory(shards: Path, kind: str, tmp_path: Path) -> None:
    dry = open_folder(shards, kind, may_write=False)
    assert not (shards / ".histodino").exists()
    elsewhere = open_folder(shards, kind, str(tmp_path / "cache"))
    assert not (shards / ".histodino").exists() and list((tmp_path / "cache").glob(f"*/{kind}.json"))
    none = open_folder(shards, kind, "none")
    assert dry.names.fingerprint == elsewhere.names.fingerprint == none.names.fingerprint
    (shards / ".histodino").write_text("a file is in the way: the user's cache is used")
    assert open_folder(shards, kind).names.fingerprint == dry.names.fingerprint
    assert list(Path(os.environ["XDG_CACHE_HOME"]).glob(f"histodino/{shards.name}-*/{kind}.json"))


def test_held_out_slides_are_left_out(shards: Path, tiles: Path, kind: str) -> None:
    found = open_folder(shards, kind)
    kept = found._index.without({"slide1", "slide3"})
    names = [name for name in list_names(tiles) if not name.startswith(("slide1_", "slide3_"))]
    assert list(kept.names) == names and kept.ranges.known == {"slide0", "slide2"}
    reader = type(found)(found._shards, kept)
    for index, name in enumerate(names):
        assert torch.equal(reader.read(index), FolderTiles(tiles, [name]).read(0))
    assert list(kept.without({"slide0", "slide2"}).names) == [] and found._index.without(set()) is found._index


def _sums(tiles: ShardTiles, queue: multiprocessing.Queue) -> None:
    queue.put([int(tiles.read(index).sum()) for index in range(len(tiles.names))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_reads_the_same(shards: Path, kind: str, method: str) -> None:
    found = open_folder(shards, kind)
    expected = [int(found.read(index).sum()) for index in range(len(found.names))]  # opens files before the fork
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_sums, args=(found, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [expected, expected]
    for worker in workers:
        worker.join(60)


def test_a_pickled_reader_holds_no_index(shards: Path, kind: str) -> None:
    found = open_folder(shards, kind)
    found.read(0)
    assert len(pickle.dumps(found)) < 2000
    assert len(pickle.dumps(open_folder(shards, kind, "none"))) > 1000
    copy = pickle.loads(pickle.dumps(open_folder(shards, kind, "none")))
    assert torch.equal(copy.read(3), found.read(3)) and list(copy.names) == list(found.names)


def test_few_files_are_open(tiles: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino.data.shards.OPEN_SHARDS", 3)
    monkeypatch.setattr("dino.data.shards.GROUP_BYTES", 1)
    found = open_folder(PACKERS[kind](tiles, tmp_path / kind, 10), kind)
    found.read(0)
    before = len(os.listdir("/proc/self/fd"))
    for index in range(2 * len(found.names)):
        found.read(index % len(found.names))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# ------------------------------------------------------------------------------------------------ what changes


def test_a_shard_that_changed_is_noticed_and_one_that_vanished_is_bad(shards: Path, kind: str) -> None:
    dataset = TileDataset(open_folder(shards, kind))
    first = sorted(shards.glob(f"*.{kind}"))[0]
    fresh = TileDataset(open_folder(shards, kind))
    os.utime(first)
    for one in (dataset, fresh):
        with pytest.raises(ChangedData, match=r"has changed; run the same command again"):
            [one[index] for index in range(len(one))]
    vanished = TileDataset(open_folder(shards, kind))
    first.unlink()
    outcomes = [_outcome(vanished, index) for index in range(len(vanished))]
    assert outcomes.count("cannot read") == 7 and outcomes.count("") == 13


def _outcome(dataset: TileDataset, index: int) -> str:
    try:
        dataset[index]
    except BadSample as error:
        return " ".join(str(error).split()[:2])
    return ""


def test_tars_that_are_damaged(tiles: Path, tmp_path: Path) -> None:
    whole = contents(tiles)
    good = pack_tar(tmp_path / "good" / "a.tar", whole).read_bytes()
    count = len(whole)
    members = open_folder(tmp_path / "good", "tar")
    places = np.sort(members._index.places["first"])
    for name, content, left, bad in (
        ("cut in a file", good[: int(places[12]) + 100], 13, 1),
        ("cut in a header", good[: int(places[12]) - 100], 12, 0),
        ("overwritten header", good[: int(places[12]) - 512] + b"x" * 512 + good[int(places[12]) :], 12, 0),
        ("overwritten file", good[: int(places[12])] + b"\0" * 200 + good[int(places[12]) + 200 :], count, 1),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.tar").write_bytes(content)
        dataset = TileDataset(found := open_folder(folder, "tar"))
        assert len(dataset) == left, name
        assert sum(_outcome(dataset, index) != "" for index in range(left)) == bad, name
        warned = damage_of(found._index)
        assert bool(warned) == (name != "overwritten file") and all("a.tar: it is" in line for line in warned)
        assert damage_of(open_folder(folder, "tar")._index) == warned  # also when the index is read again


def test_an_overwritten_row_group_is_bad_and_others_are_not(tiles: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = PACKERS["parquet"](tiles, tmp_path / "parquet", 1) / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    content[200:900] = b"\xff" * 700
    path.write_bytes(content)
    dataset = TileDataset(open_folder(path.parent, "parquet"))
    outcomes = [_outcome(dataset, index) for index in range(len(dataset))]
    assert 1 <= sum(outcome != "" for outcome in outcomes) <= 4  # a row group has four rows


def test_members_that_are_no_images_are_bad(tmp_path: Path, kind: str) -> None:
    files = [("a_0_0.jpg", b"no image"), ("a_1_0.jpg", b""), ("a_2_0.jpg", b"\xff\xd8torn")]
    if kind == "tar":
        pack_tar(tmp_path / "x.tar", files)
    else:
        pack_parquet(tmp_path / "x.parquet", {"path": [n for n, _ in files], "jpeg": [c for _, c in files]})
    dataset = TileDataset(open_folder(tmp_path, kind))
    assert [_outcome(dataset, index) for index in range(3)] == ["cannot decode"] * 3


# ------------------------------------------------------------------------------------------------ names


def test_of_the_files_of_a_key_the_image_is_taken(tmp_path: Path) -> None:
    png = _png(tmp_path)
    members = [
        ("./k0.png", png), ("k0.json", b"{}"), ("k0.mask.png", png), ("dir/k1.jpg", png), ("dir/k1.cls", b"0"),
        ("TCGA-1.uuid_0_0.png", png), ("TCGA-1.uuid_8_0.png", png),
    ]  # fmt: skip
    found = open_folder(pack_tar(tmp_path / "w" / "x.tar", members).parent, "tar")
    assert list(found.names) == ["TCGA-1.uuid_0_0.png", "TCGA-1.uuid_8_0.png", "dir/k1.jpg", "k0.png"]
    assert found.ranges.slide_ids == ["TCGA-1.uuid", None]


def _png(folder: Path) -> bytes:
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    return (folder / "one.png").read_bytes()


def test_equal_names_in_two_shards_are_told_apart(tmp_path: Path) -> None:
    png = _png(tmp_path)
    for shard in ("train-0", "train-1"):
        pack_tar(tmp_path / "w" / f"{shard}.tar", [("000000.png", png), ("000001.png", png)])
    found = open_folder(tmp_path / "w", "tar")
    assert list(found.names) == [f"train-{i}/00000{j}.png" for i in (0, 1) for j in (0, 1)]


def test_parquet_of_slides_and_places(tiles: Path, tmp_path: Path) -> None:
    images = [content for _, content in contents(tiles)[:2]]
    columns = {"slide_id": ["s 1", "s 1"], "x": [256, 0], "y": [0, 512], "jpeg": images}
    found = open_folder(pack_parquet(tmp_path / "p" / "a.parquet", columns).parent, "parquet")
    assert list(found.names) == ["s 1/s 1_0_512.jpg", "s 1/s 1_256_0.jpg"]


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_shards_end_in_one_line(tiles: Path, tmp_path: Path) -> None:
    png = _png(tmp_path)
    cases: dict[str, tuple[dict[str, bytes], str]] = {
        "gz": ({"a.tar.gz": b"\x1f\x8b"}, "not compressed"),
        "renamed": ({"a.tar": b"\x1f\x8b" + bytes(2000)}, "uncompressed tar file at .*a.tar"),
        "junk": ({"a.tar": b"junk" * 1000}, "uncompressed tar file at .*a.tar"),
        "no images": ({"a.tar": pack_tar(tmp_path / "t.tar", [("a.txt", b"x")]).read_bytes()}, "found none"),
        "two": ({"a.tar": pack_tar(tmp_path / "t.tar", [("a.png", png), ("a.jpg", png)]).read_bytes()}, "several of a"),
        "twice": ({"a.tar": pack_tar(tmp_path / "t.tar", [("a.png", png)] * 2).read_bytes()}, "several of a"),
    }
    for name, (files, message) in cases.items():
        for file, content in files.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
        assert shard_kind(tmp_path / name) == "tar"
        with pytest.raises(DataError, match=message) as raised:
            open_folder(tmp_path / name, "tar")
        assert "\n" not in str(raised.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected tar files"):
        open_folder(tmp_path / "empty", "tar")


def test_bad_parquet_ends_in_one_line(tmp_path: Path) -> None:
    png = _png(tmp_path)
    for name, columns, message in (
        (
            "no image",
            {"path": ["a.png"], "label": [1]},
            r"column jpeg or image .*found path \(string\), label \(int64\)",
        ),
        ("text", {"path": ["a.png"], "jpeg": ["x"]}, r"found path \(string\), jpeg \(string\)"),
        ("no name", {"slide_id": ["a"], "x": [0], "jpeg": [png]}, "column path, or slide_id,x,y"),
        ("null name", {"path": [None, "b"], "jpeg": [png, png]}, "found an empty one"),
        ("twice", {"path": ["b", "b"], "jpeg": [png, png]}, "found a/b twice"),
    ):
        pack_parquet(tmp_path / name / "a.parquet", columns)
        with pytest.raises(DataError, match=message):
            open_folder(tmp_path / name, "parquet")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "a.parquet").write_bytes(b"PAR1 junk")
    with pytest.raises(DataError, match=r"cannot read .*a.parquet"):
        open_folder(tmp_path / "junk", "parquet")
    as_tars(tmp_path / "null name", tmp_path / "junk", 1)
    with pytest.raises(ConfigError, match="source=tar or source=parquet"):
        shard_kind(tmp_path / "junk")


def test_large_row_groups_are_refused(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("dino.data.shards.LARGEST_GROUP", 1000)
    dataset = TileDataset(open_folder(PACKERS["parquet"](tiles, tmp_path / "p", 1, 20), "parquet"))
    with pytest.raises(BadSample, match="64 rows in each"):
        dataset[0]


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'histodino\[parquet\]'"):
        open_parquet(tmp_path, "auto", may_write=True)


def test_an_index_of_other_shards_is_not_read(tiles: Path, tmp_path: Path) -> None:
    as_tars(tiles, tmp_path / "one")
    open_folder(tmp_path / "one", "tar")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "two").glob("*.tar"))
    assert isinstance(read_index(tmp_path / "two" / ".histodino", Shards("tar", tmp_path / "two", names)), ShardIndex)
    os.utime(tmp_path / "two" / names[0], (1, 1))
    assert read_index(tmp_path / "two" / ".histodino", Shards("tar", tmp_path / "two", names)) is None


def test_names_of_nanopath_give_the_slides_of_their_folders(tmp_path: Path) -> None:
    image = contents(make_tiles(tmp_path / "tiles"))[0][1]

    def names(folder: str, paths: list[str]) -> list[tuple[str, str | None]]:
        pack_parquet(tmp_path / folder / "a.parquet", {"path": paths, "jpeg": [image] * len(paths)})
        stored = open_folder(tmp_path / folder, "parquet", "none")
        slides = TileDataset(stored, {})
        return [(stored.names[i], slides[i].slide_id) for i in range(len(stored.names))]

    found = names("nanopath", ["TCGA-1/512_1024_0.jpeg", "TCGA-1/512_1024_1.jpeg", "x/7/0_256_0.jpeg"])
    assert found == [
        ("TCGA-1/0/TCGA-1_512_1024.jpeg", "TCGA-1"),
        ("TCGA-1/1/TCGA-1_512_1024.jpeg", "TCGA-1"),
        ("x/7/0/7_0_256.jpeg", "7"),
    ]
    own = ["7/7_512_0.jpg", "7/7_512_1024.jpg"]  # as `dino tile` names a slide 7
    assert names("own", own) == [(name, "7") for name in own]
    assert names("other", ["train/7_512_0.jpg", "train/7_512_1024.jpg"])[0][1] == "7"  # 1024 is no level
