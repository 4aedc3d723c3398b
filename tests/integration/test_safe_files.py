"""Files that were made to do harm: refused in one line, with no code run, nothing written elsewhere, little memory."""

import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from painted_slide import noise, write_slide
from tiny_models import mean_colour, save_checkpoint
from tiny_runs import TINY_PATCH

from dino.api import extracting
from dino.api.extracting import extract
from dino.api.tiling import tile
from dino.config.schema import ExtractConfig, TileConfig
from dino.data.grids import read_grid
from dino.errors import CheckpointError, DataError
from dino.models.checkpoint import read_checkpoint
from dino.slides.tables import read_regions

CONFIG = ExtractConfig(device="cpu", precision="fp32", num_workers=1)
LARGE = 10**11  # bytes that a bomb claims
SPARE_MB = 64  # what reading one may take


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["DINO_TEST_MARK"],)


def saved(content: object, **settings: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **settings)
    return buffer.getvalue()


def rezipped(content: bytes, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file with its records changed, and their checksums right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def claiming(pickled: bytes) -> bytes:
    """A pickle in which the storage of 12 numbers, and its tensor of 3 x 4, have become enormous."""
    number = b"\x8a\x05" + (LARGE // 4).to_bytes(5, "little")
    assert pickled.count(b"K\x0c") == 1
    return pickled.replace(b"K\x0c", number).replace(b"K\x03K\x04\x86", number + b"K\x04\x86")


def old_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages", "../../escaped"):
            content = pickle.dumps(Evil())
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def compiled() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def nothing_but_zeros(name: str, content: bytes) -> bytes:
    return bytes(300_000_000) if "/data/" in name else content


def laughs() -> object:
    content: object = torch.zeros(1)
    for _ in range(60):
        content = [content, content]
    return {"teacher": {"a": content}}


WHOLE = {"teacher": {"w": torch.zeros(3, 4)}}
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickle": (lambda: pickle.dumps(Evil(), 2), "run code|damaged"),
    "zip": (lambda: saved({"teacher": Evil()}), "run code"),
    "before zip files": (lambda: saved({"teacher": Evil()}, _use_new_zipfile_serialization=False), "run code"),
    "old tar": (old_tar, "tar format"),
    "TorchScript": (compiled, "TorchScript"),
    "zip bomb": (lambda: rezipped(saved(WHOLE), nothing_but_zeros, zipfile.ZIP_DEFLATED), "unpack to"),
    "claim in a zip": (
        lambda: rezipped(saved(WHOLE), lambda name, content: claiming(content) if "data.pkl" in name else content),
        "damaged",
    ),
    "claim before zip files": (lambda: claiming(saved(WHOLE, _use_new_zipfile_serialization=False)), "damaged"),
    "spread out": (lambda: saved({"teacher": {"w": torch.zeros(1).expand(10**7, 10**5)}}), "to be stored completely"),
    "pickle that claims": (lambda: b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"abc.", "damaged"),
    "lists in lists": (lambda: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".", "damaged"),
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What :class:`Evil` makes."""
    monkeypatch.setenv("DINO_TEST_MARK", str(tmp_path / "mark"))
    return tmp_path / "mark"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_and_run_nothing(tmp_path: Path, mark: Path, name: str) -> None:
    make, words = BOMBS[name]
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "bomb.pt").write_bytes(make())
    for mmap in (False, True):
        with pytest.raises(CheckpointError, match=words) as caught:
            read_checkpoint(folder / "bomb.pt", mmap=mmap)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError) as refused:
        read_grid(folder / "bomb.pt")
    assert "\n" not in str(refused.value)
    assert not mark.exists() and not list(tmp_path.rglob("escaped"))


def test_a_bomb_within_bytes_stays_bytes(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "bomb.pt").write_bytes(saved({"teacher": saved({"teacher": Evil()})}))
    assert isinstance(read_checkpoint(tmp_path / "bomb.pt")["teacher"], bytes)
    assert not mark.exists()


def test_a_grid_that_is_spread_out(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(10**10, 384), tmp_path / "grid.pt")
    with pytest.raises(DataError, match="found fewer"):
        read_grid(tmp_path / "grid.pt")


def test_lists_named_twice_are_looked_at_once(tmp_path: Path) -> None:
    torch.save(laughs(), tmp_path / "laughs.pt")  # 2 ** 60 tensors, were each name followed
    assert set(read_checkpoint(tmp_path / "laughs.pt")) == {"teacher"}


@pytest.mark.filterwarnings("ignore")
def test_bombs_take_little_memory(tmp_path: Path, mark: Path) -> None:
    for name, (make, _) in BOMBS.items():
        (tmp_path / f"{name}.pt").write_bytes(make())
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from dino.models.checkpoint import read_checkpoint; from dino.data.grids import read_grid\n"
        "from dino.errors import DinoError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.pt')):\n"
        "    before = peak()\n"
        "    for read in (read_checkpoint, lambda p: read_checkpoint(p, mmap=True), read_grid):\n"
        "        try: read(path)\n"
        "        except DinoError: pass\n"
        "        else: print('READ', path)\n"
        "    print(peak() - before, path.stem)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == len(BOMBS) and all(int(megabytes) < SPARE_MB for megabytes, _ in lines), done.stdout


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiled root of one slide with one region, whose extraction takes the mean colour."""
    write_slide(tmp_path / "in" / "slides" / "s.tiff", [noise(300, 300)])
    root = tmp_path / "in" / "root"
    tile([tmp_path / "in" / "slides"], root, TileConfig(tile_size_px=64, region_size_px=256, num_workers=1))
    monkeypatch.setattr(extracting, "load_backbone_file", lambda *args, **kwargs: mean_colour())
    return root


@pytest.mark.parametrize(
    ("column", "value"),
    [("path", "../escaped.pt"), ("path", "{tmp}/escaped.pt"), ("path", "a/../../escaped.pt"), ("path", "."),
     ("slide_id", "../escaped"), ("slide_id", ".."), ("slide_id", "a/b"), ("slide_id", "")],
)  # fmt: skip
def test_a_table_of_regions_does_not_lead_out_of_its_root(root: Path, tmp_path: Path, column: str, value: str) -> None:
    header, line = (root / "regions.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), line.split(","), strict=True)) | {column: value.format(tmp=tmp_path)}
    (root / "regions.csv").write_text(f"{header}\n{','.join(cells.values())}\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="line 2") as caught:
        extract("RUN", root, CONFIG)
    assert "\n" not in str(caught.value)
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] == []


def test_a_link_in_the_place_of_features_is_not_written_through(root: Path, tmp_path: Path) -> None:
    (region,) = read_regions(root)
    (tmp_path / "mine.txt").write_text("mine")
    extract("RUN", root, CONFIG)
    (root / region.path).unlink()
    (root / region.path).symlink_to(tmp_path / "mine.txt")
    assert extract("RUN", root, CONFIG).written == 1
    assert (tmp_path / "mine.txt").read_text() == "mine" and not (root / region.path).is_symlink()


def test_tars_hold_plain_names_whatever_the_slide_is_called(tmp_path: Path) -> None:
    name = "-rf ; $(x) <&> é=1"
    write_slide(tmp_path / "s.tiff", [noise(150, 150)])
    (tmp_path / "slides.csv").write_text(f"sample_id,image_path\n{name},s.tiff\n")
    config = TileConfig(tile_size_px=64, region_size_px=64, storage="tar", num_workers=1, previews=False)
    assert tile([tmp_path / "slides.csv"], tmp_path / "root", config).exit_code == 0
    with tarfile.open(tmp_path / "root" / "patch_256_pretraining" / "tars" / f"{name}.tiles.tar") as tar:
        assert tar.getnames() and all(re.fullmatch(r"\d{6}\.jpg", member) for member in tar.getnames())
        assert all(member.isreg() for member in tar.getmembers())


NO_NETWORK = """
import socket, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"):
        if not (event == "socket.connect" and arguments[0].family == socket.AF_UNIX):
            sys.stderr.write(f"NETWORK {event} {arguments}\\n")
            raise ConnectionError(event)
sys.addaudithook(watch)
import dino, dino.api
from dino.cli.main import app
for line in sys.stdin.read().splitlines():
    try:
        app(line.split("\\t"), prog_name="dino")
    except SystemExit as end:
        assert not end.code, (line, end.code)
"""


def test_nothing_goes_to_the_network(tmp_path: Path) -> None:
    """Every command of the chain, in a process in which each attempt is reported and refused."""
    write_slide(tmp_path / "slides" / "s.tiff", [noise(517, 391)])
    region = save_checkpoint(tmp_path / "region.pt", "region", 32)
    root, run = tmp_path / "root", tmp_path / "run"
    images = [f"{root}/patch_256_pretraining/imgs/s/s_{64 * x}_0.jpg" for x in range(4)]
    rows = [f"{image},{'ab'[i % 2]},{('train', 'test')[i // 2]}" for i, image in enumerate(images)]
    (tmp_path / "labels.csv").write_text("\n".join(["image_path,label,partition", *rows]) + "\n")
    tiny = [
        f"{key}={value}" for key, value in {**TINY_PATCH, "training.max_steps": 2, "logging.tensorboard": True}.items()
    ]
    commands = [
        ["tile", tmp_path / "slides", root, "tile_size_px=64", "region_size_px=256", "num_workers=1"],
        ["pretrain", "patch", root, run, *tiny],
        ["extract", run, root, "device=cpu", "num_workers=1"],
        ["extract", region, root, "device=cpu", "num_workers=1"],
        ["evaluate", "knn", run, tmp_path / "labels.csv", "device=cpu", "k=[1]", "allow_leakage=true"],
        ["export", run, tmp_path / "export", "tile_size_px=64"],
        ["info", tmp_path / "export"],
    ]
    text = "\n".join("\t".join(map(str, words)) for words in commands)
    command = [sys.executable, "-c", NO_NETWORK]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "export" / "model.safetensors").exists()
