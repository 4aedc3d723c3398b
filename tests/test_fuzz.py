"""Damaged files of every kind: reading them gives a typed error or a result, never another exception or a hang.

1,700 cases: 170 of each of ten kinds. Damage is what disks, transfers and editors do (bytes flipped, cut out,
doubled, cut off) and, for tables and records, what people do (cells and values of the wrong kind).
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import save_checkpoint

from dino.api import info
from dino.config.load import load_config, to_yaml
from dino.config.schema import PatchConfig, RegionConfig
from dino.data.bags import open_bag
from dino.data.grids import read_grid
from dino.data.images import decode
from dino.errors import DinoError
from dino.evaluate.labels import read_labels
from dino.evaluate.slides import read_cases, split
from dino.extraction.record import check_folder
from dino.extraction.regions import plan_cells
from dino.extraction.tile_files import Layout, is_written
from dino.lock import RunLock
from dino.models.checkpoint import read_checkpoint
from dino.slides.parts import load_part
from dino.slides.slide_list import read_slide_list
from dino.slides.tables import read_regions, read_status, read_tiles
from dino.slides.tiling import check_same_settings
from dino.train.checkpoint import CheckpointFolder
from dino.train.failure import read_failure
from dino.train.run_folder import RunFolder

CASES = 170
fuzz = settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
POISON = [
    "",
    "nan",
    "-1",
    "1e999",
    "null",
    "[]",
    "{}",
    "${oc.env:HOME}",
    "${x",
    "&a *a",
    "!!python/object:os.system x",
    "é\x00",
    "=1+1",
    '"',
    "\n",
    "9" * 400,
]

PATHS = ["../x", "/etc/passwd", "a/../../x", "..", ".", "/", "~/x", "a\\..\\b", "a\0b", "a\nb", "-", "1.5", "0", "-3"]


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One to four random changes of the content."""
    pieces = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "cut", "double", "end", "insert"]),
                st.floats(0, 1, exclude_max=True),
                st.integers(1, 40),
                st.one_of(st.binary(max_size=12), st.sampled_from([word.encode() for word in POISON])),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def damage(content: bytes) -> bytes:
        for kind, position, length, noise in pieces:
            at = int(position * len(content))
            if kind == "flip" and content:
                content = content[:at] + bytes([content[at] ^ (1 << length % 8)]) + content[at + 1 :]
            elif kind == "cut":
                content = content[:at] + content[at + length :]
            elif kind == "double":
                content = content[: at + length] + content[at:]
            elif kind == "end":
                content = content[:at]
            else:
                content = content[:at] + noise + content[at:]
        return content

    return damage


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def expect_typed_error_or_result(read: Callable[[], object]) -> None:
    try:
        read()
    except DinoError as error:
        assert str(error).strip()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "tile.png").write_bytes(b"x")
    return folder


@fuzz
@given(damage=damages(), region=st.booleans())
def test_config_files(root: Path, damage: Callable[[bytes], bytes], region: bool) -> None:
    schema = RegionConfig if region else PatchConfig
    (root / "config.yaml").write_bytes(damage(to_yaml(schema()).encode()))
    expect_typed_error_or_result(lambda: load_config(schema, file=root / "config.yaml"))


@fuzz
@given(
    key=st.sampled_from(
        ["seed", "model", "model.arch", "aug.blur_global", "evaluate.k", "optim.lr", "model.nothing", "a..b", "a.", "_"]
    ),
    value=st.one_of(st.sampled_from(POISON), st.text(max_size=20)),
)
def test_settings_on_the_command_line(key: str, value: str) -> None:
    expect_typed_error_or_result(lambda: load_config(PatchConfig, overrides=[f"{key}={value}"]))


@fuzz
@given(damage=damages(), region=st.booleans())
def test_checkpoints_and_records_of_failures(root: Path, damage: Callable[[bytes], bytes], region: bool) -> None:
    folder = root / "checkpoints"
    folder.mkdir(exist_ok=True)
    whole = saved({"format": "histodino/1", "step": 3, "student": {"w": torch.ones(3, 4)}, "config": {"seed": 0}})
    (folder / "last.pt").write_bytes(damage(whole))
    expect_typed_error_or_result(lambda: read_checkpoint(folder / "last.pt", mmap=region))
    expect_typed_error_or_result(CheckpointFolder(folder).load)
    (folder / "failure.json").write_bytes(damage(json.dumps({"step": 3, "processes": [{"loss": 1.0}]}).encode()))
    record = {
        "draws": torch.arange(2),
        "names": ["a", "b"],
        "slide_ids": [None, None],
        "parameters": {"box": torch.ones(2, 1, 4)},
    }
    (folder / "rank_0.pt").write_bytes(damage(saved(record)) if region else saved(record))
    expect_typed_error_or_result(lambda: read_failure(folder))


JUNK = st.one_of(
    st.sampled_from([None, "", "x", -1, 0, 10**30, float("nan"), 1.5, True, [], {}, [[]], [1, 2, 3], "vit_tiny"]),
    st.sampled_from([torch.zeros(0), torch.full((2, 3), float("nan")), torch.zeros(1, dtype=torch.int64)]),
)


def paths_in(content: object, path: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to every value in nested dictionaries."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*path, key)
        yield from paths_in(value, (*path, key))


def replaced(content: dict, path: tuple, value: object, drop: bool) -> dict:
    """A copy with one value replaced or removed."""
    if len(path) == 1:
        rest = {k: v for k, v in content.items() if k != path[0]}
        return rest if drop else {**content, path[0]: value}
    return {**content, path[0]: replaced(content[path[0]], path[1:], value, drop)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The content of an undamaged checkpoint of this package."""
    path = save_checkpoint(tmp_path_factory.mktemp("undamaged") / "last.pt")
    extra = {"geometry": {"spacing_um": 0.5, "tile_size_px": 256}, "training_slides": {"slide_ids": ["a"]}}
    return {**torch.load(path, weights_only=True), **extra, "config": {"seed": 0}}


@fuzz
@given(data=st.data(), value=JUNK, drop=st.booleans())
def test_checkpoints_with_a_value_of_another_kind(
    root: Path, checkpoint: dict, data: st.DataObject, value: object, drop: bool
) -> None:
    """Files with valid checksums."""
    path = data.draw(st.sampled_from(sorted(paths_in(checkpoint), key=str)))
    torch.save(replaced(checkpoint, path, value, drop), root / "odd.pt")
    expect_typed_error_or_result(lambda: info(str(root / "odd.pt")))


@fuzz
@given(damage=damages(), legacy=st.booleans())
def test_grids(root: Path, damage: Callable[[bytes], bytes], legacy: bool) -> None:
    buffer = io.BytesIO()
    torch.save(torch.arange(48.0).reshape(16, 3), buffer, _use_new_zipfile_serialization=not legacy)
    (root / "grid.pt").write_bytes(damage(buffer.getvalue()))
    expect_typed_error_or_result(lambda: read_grid(root / "grid.pt"))


def features_of_tiles() -> dict[str, bytes]:
    """Features of 16 tiles as files of each kind."""
    values, contents = np.arange(48, dtype=np.float32).reshape(16, 3), {}
    for suffix in (".h5", ".npz", ".pt"):
        buffer = io.BytesIO()
        if suffix == ".h5":
            with h5py.File(buffer, "w") as file:
                file.create_dataset("features", data=values).attrs["name"] = "s"
                file.create_dataset("coords", data=np.zeros((16, 2), np.int64)).attrs["patch_size"] = 256
        elif suffix == ".npz":
            np.savez_compressed(buffer, features=values)
        else:
            torch.save(torch.from_numpy(values), buffer)
        contents[suffix] = buffer.getvalue()
    return contents


BAGS = features_of_tiles()


@fuzz
@given(damage=damages(), suffix=st.sampled_from(sorted(BAGS)))
def test_bags(root: Path, damage: Callable[[bytes], bytes], suffix: str) -> None:
    path = root / f"bag{suffix}"
    path.write_bytes(damage(BAGS[suffix]))
    expect_typed_error_or_result(lambda: open_bag(path).read())
    is_written(path, np.zeros((16, 2), np.int64), Layout(3))


@fuzz
@given(damage=damages(), kind=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP", "WEBP"]))
def test_images(root: Path, damage: Callable[[bytes], bytes], kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, kind)
    (root / "image.jpg").write_bytes(damage(buffer.getvalue()))
    expect_typed_error_or_result(lambda: decode(root / "image.jpg"))


LABELS = "image_path,label,partition,slide_id,patient_id\n" + "".join(
    f"tile.png,{'ab'[i % 2]},{('train', 'test')[i // 4]},s{i},p{i}\n" for i in range(8)
)
REGIONS = "slide_id,x,y,step_lv0,grid_h,grid_w,spacing_um,path,tissue\n" + "".join(
    f"s,{i},0,256,2,2,0.5,region_4096_pretraining/s_{i}_0.pt,0.1 0.2 0.3 1.000\n" for i in range(4)
)
TILES = "slide_id,x,y,step_lv0,spacing_requested_um,spacing_um,tissue\ns,0,0,256,0.5,0.5,0.9\n"
STATUS = (
    "slide_id,status,reason,tiles,regions,image_path,mask_path,patient_id,partition,spacing_um,spacing_source,width,"
    "height,centre,scanner,stain\ns,ok,,3,1,s.svs,,p,,0.5,metadata,900,800,,,\n"
)


SLIDES = "sample_id,image_path,mask_path,spacing_at_level_0,partition\na,tile.png,,0.5,\nb,tile.png,tile.png,,test\n"
SURVIVAL = "slide_id,patient_id,time,event,partition\n" + "".join(
    f"s{i},p{i},{i}.5,{i % 2},{('train', 'test')[i // 4]}\n" for i in range(8)
)
NAMES = {
    "labels": "labels.csv",
    "survival": "labels.csv",
    "regions": "regions.csv",
    "tiles": "tiles.csv",
    "status": "slides_status.csv",
}
TABLES = {
    "labels": LABELS,
    "survival": SURVIVAL,
    "regions": REGIONS,
    "tiles": TILES,
    "status": STATUS,
    "slides": SLIDES,
}


def read_table(root: Path, table: str) -> None:
    """Read a table as the commands do, and plan the reading."""
    if table == "labels":
        read_labels(root / "labels.csv")
    elif table == "survival":
        cases = read_cases(root / "labels.csv")
        split(cases, cases.outcome(), 2, 0)
    elif table == "slides":
        read_slide_list([root / "slides.csv"])
    elif table == "tiles":
        assert all(".." not in tile.path.parts and not tile.path.is_absolute() for tile in read_tiles(root))
    elif table == "status":
        read_status(root)
    else:
        records = read_regions(root)
        assert all(".." not in record.path.parts and not record.path.is_absolute() for record in records)
        plan_cells(records)


@fuzz
@given(damage=damages(), table=st.sampled_from(sorted(TABLES)))
def test_tables(root: Path, damage: Callable[[bytes], bytes], table: str) -> None:
    (root / NAMES.get(table, "slides.csv")).write_bytes(damage(TABLES[table].encode()))
    expect_typed_error_or_result(lambda: read_table(root, table))


@fuzz
@given(table=st.sampled_from(["regions", "tiles"]), column=st.integers(0, 8), value=st.sampled_from([*POISON, *PATHS]))
def test_cells_of_tables(root: Path, table: str, column: int, value: str) -> None:
    """A table with one wrong cell."""
    header, first, *rest = TABLES[table].splitlines()
    cells = first.split(",")
    cells[column % len(cells)] = '"' + value.replace('"', '""') + '"'
    (root / NAMES[table]).write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
    expect_typed_error_or_result(lambda: read_table(root, table))


def take_lock(root: Path) -> None:
    with RunLock(root, beat_seconds=0.0, stale_seconds=0.0).held():
        pass


TILING = {"settings": {"storage": "jpeg", "spacing_um": 0.5}, "geometry": {"spacing_um": 0.5, "region_cells": 16}}
EXTRACT = {"level": "patch", "fingerprint": "a", "geometry": {"tile_size_px": 256}, "pixels": {"a": "slides"}}
PART = {"status": dict(zip(*(line.split(",") for line in STATUS.splitlines()), strict=True)), "made_from": {}}
RUN = {"state": "running", "step": 3, "run_id": None, "warnings": ["a"], "time": "2026-01-01T00:00:00"}
LOCK = {"host": "elsewhere", "boot": "", "pid": 1, "started": "1", "launch": None, "token": "a"}
RECORDS: dict[str, tuple[dict, Callable[[Path], object]]] = {
    "tiling.json": (TILING, lambda root: check_same_settings(root, {"storage": "tar"})),
    "extract.json": (EXTRACT, lambda root: check_folder(root / "extract.json", EXTRACT, root / "grids", ".pt")),
    "coordinates/parts/s.json": (PART, lambda root: load_part(root, "s")),
    "status.json": (RUN, lambda root: RunFolder(root).update_status(step=4)),
    "identity.json": ({"seed": 0, "model.arch": "a"}, lambda root: RunFolder(root).check({"seed": 0})),
    "metrics.jsonl": ({"step": 3, "loss": 1.0}, lambda root: RunFolder(root).last_metrics()),
    "lock.json": (LOCK, take_lock),
}


@fuzz
@given(damage=damages(), name=st.sampled_from(sorted(RECORDS)), data=st.data(), value=JUNK, odd=st.booleans())
def test_records(
    tmp_path_factory: pytest.TempPathFactory,
    damage: Callable[[bytes], bytes],
    name: str,
    data: st.DataObject,
    value: object,
    odd: bool,
) -> None:
    root = tmp_path_factory.mktemp("records")
    content, read = RECORDS[name]
    (root / "grids").mkdir()
    (root / "grids" / "a.pt").write_bytes(b"x")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    if odd:
        path = data.draw(st.sampled_from(sorted(paths_in(content), key=str)))
        text = json.dumps(replaced(content, path, value, False), default=str).encode()
    else:
        text = damage(json.dumps(content).encode())
    (root / name).write_bytes(text)
    expect_typed_error_or_result(lambda: read(root))
