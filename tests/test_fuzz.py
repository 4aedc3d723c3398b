"""Damaged files of every kind that is read: always a typed error or a result, never a traceback and never a hang.

A thousand cases: 170 of each of six kinds. Damage is what disks, transfers and editors do (bytes flipped, cut out,
doubled, cut off) and, for text, what people do (cells and values of the wrong kind).
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.config.load import load_config, to_yaml
from dino.config.schema import PatchConfig, RegionConfig
from dino.data.grids import read_grid
from dino.data.images import decode
from dino.errors import DinoError
from dino.evaluate.labels import read_labels
from dino.models.weights import read_checkpoint
from dino.slides.tables import read_regions, read_status, read_tiles
from dino.train.checkpoint import CheckpointFolder
from dino.train.failure import read_failure

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


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One to four pieces of damage, wherever they fall."""
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
        for kind, place, length, noise in pieces:
            at = int(place * len(content))
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


def survives(read: Callable[[], object]) -> None:
    try:
        read()
    except DinoError as error:
        assert str(error).strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "tile.png").write_bytes(b"x")
    return folder


@fuzz
@given(damage=damages(), region=st.booleans())
def test_config_files(place: Path, damage: Callable[[bytes], bytes], region: bool) -> None:
    schema = RegionConfig if region else PatchConfig
    (place / "config.yaml").write_bytes(damage(to_yaml(schema()).encode()))
    survives(lambda: load_config(schema, file=place / "config.yaml"))


@fuzz
@given(
    key=st.sampled_from(
        ["seed", "model", "model.arch", "aug.blur_global", "evaluate.k", "optim.lr", "model.nothing", "a..b", "a.", "_"]
    ),
    value=st.one_of(st.sampled_from(POISON), st.text(max_size=20)),
)
def test_settings_on_the_command_line(key: str, value: str) -> None:
    survives(lambda: load_config(PatchConfig, overrides=[f"{key}={value}"]))


@fuzz
@given(damage=damages(), region=st.booleans())
def test_checkpoints_and_records_of_failures(place: Path, damage: Callable[[bytes], bytes], region: bool) -> None:
    folder = place / "checkpoints"
    folder.mkdir(exist_ok=True)
    whole = saved({"format": "histodino/1", "step": 3, "student": {"w": torch.ones(3, 4)}, "config": {"seed": 0}})
    (folder / "last.pt").write_bytes(damage(whole))
    survives(lambda: read_checkpoint(folder / "last.pt", mmap=region))
    survives(CheckpointFolder(folder).load)
    (folder / "failure.json").write_bytes(damage(json.dumps({"step": 3, "processes": [{"loss": 1.0}]}).encode()))
    record = {
        "draws": torch.arange(2),
        "names": ["a", "b"],
        "slide_ids": [None, None],
        "parameters": {"box": torch.ones(2, 1, 4)},
    }
    (folder / "rank_0.pt").write_bytes(damage(saved(record)) if region else saved(record))
    survives(lambda: read_failure(folder))


@fuzz
@given(damage=damages(), legacy=st.booleans())
def test_grids(place: Path, damage: Callable[[bytes], bytes], legacy: bool) -> None:
    buffer = io.BytesIO()
    torch.save(torch.arange(48.0).reshape(16, 3), buffer, _use_new_zipfile_serialization=not legacy)
    (place / "grid.pt").write_bytes(damage(buffer.getvalue()))
    survives(lambda: read_grid(place / "grid.pt"))


@fuzz
@given(damage=damages(), kind=st.sampled_from(["PNG", "JPEG", "TIFF", "BMP", "WEBP"]))
def test_images(place: Path, damage: Callable[[bytes], bytes], kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, kind)
    (place / "image.jpg").write_bytes(damage(buffer.getvalue()))
    survives(lambda: decode(place / "image.jpg"))


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


@fuzz
@given(damage=damages(), table=st.sampled_from(["labels", "regions", "tiles", "status"]))
def test_tables(place: Path, damage: Callable[[bytes], bytes], table: str) -> None:
    names = {"labels": "labels.csv", "regions": "regions.csv", "tiles": "tiles.csv", "status": "slides_status.csv"}
    whole = {"labels": LABELS, "regions": REGIONS, "tiles": TILES, "status": STATUS}[table]
    (place / names[table]).write_bytes(damage(whole.encode()))
    readers = {"regions": read_regions, "tiles": read_tiles, "status": read_status}
    survives(lambda: readers[table](place) if table in readers else read_labels(place / "labels.csv"))
