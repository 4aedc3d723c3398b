"""Disks that are full, read-only or vanish under tiling, extraction, export and scores: one line, nothing half done."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from kill_points import everything, visible
from painted_slide import noise, write_slide
from small_disks import fill
from tiny_models import save_checkpoint
from typer.testing import CliRunner

from dino.cli.main import app
from dino.extraction import regions, tile_files
from dino.extraction import slides as slide_files
from dino.slides import storage

TILING = ["tile_size_px=64", "region_size_px=256", "num_workers=1", "previews=false"]
EXTRACTION = ["device=cpu", "precision=fp32", "num_workers=1"]
KNN = ["k=[1]", "device=cpu", "precision=fp32", "num_workers=1"]


def dino(*words: object) -> str:
    """Run a command that ends well."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    """Run a command that ends with 2 and one line of error; that line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: expected to write to ") and ", found: " in line and "disk" in line, line
    return line


def before_call(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int, action: Callable) -> None:
    """Do ``action`` just before the ``number``-th call of a function."""
    honest, calls = getattr(owner, name), []

    def call(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == number:
            action()
        return honest(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    for seed, name in enumerate(("one", "two")):
        write_slide(tmp_path / "slides" / f"{name}.tiff", [noise(517, 391, seed)])
    return tmp_path / "slides"


@pytest.fixture
def labels(slides: Path, tmp_path: Path) -> Path:
    """A table of four tiles."""
    dino("tile", slides, tmp_path / "tiled", *TILING)
    images = sorted((tmp_path / "tiled").rglob("*.jpg"))[:4]
    rows = [f"{image},{'ab'[i % 2]},{('train', 'test')[i // 2]}" for i, image in enumerate(images)]
    (tmp_path / "labels.csv").write_text("\n".join(["image_path,label,partition", *rows]) + "\n")
    return tmp_path / "labels.csv"


@pytest.mark.parametrize("storage_kind", ["jpeg", "tar", "parquet"])
def test_a_disk_that_fills_up_while_tiling(
    slides: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage_kind: str
) -> None:
    """It is not the slide's fault: none is marked as failed, and the same command goes on once there is room."""
    words = [*TILING, f"storage={storage_kind}"]
    dino("tile", slides, tmp_path / "whole", *words)
    root, wanted = small_disk / "root", visible(tmp_path / "whole")
    with monkeypatch.context() as patch:
        writer = {"jpeg": "write_jpegs", "tar": "write_tar", "parquet": "write_parquet"}[storage_kind]
        before_call(patch, storage, writer, 2, lambda: fill(small_disk))
        assert "No space left" in refused("tile", slides, root, *words)
    assert all(wanted[name] == content for name, content in visible(root).items() if name in wanted)
    (small_disk / "filler").unlink()
    assert "2 ok; 1 done before" in dino("tile", slides, root, *words)
    assert visible(root) == wanted and everything(root) == everything(tmp_path / "whole")


@pytest.mark.parametrize("level", ["patch", "region"])
def test_a_disk_that_fills_up_while_extracting(
    slides: Path, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    root, whole = small_disk / "root", tmp_path / "whole"
    patch_model, model = save_checkpoint(tmp_path / "patch.pt"), save_checkpoint(tmp_path / "region.pt", "region", 16)
    for place in (root, whole):
        dino("tile", slides, place, *TILING, "storage=none")
        dino("extract", patch_model, place, *EXTRACTION)
    if level == "patch":
        model = patch_model
        for path in root.glob("region_4096_pretraining/*.pt"):
            path.unlink()
    else:
        dino("extract", model, whole, *EXTRACTION)
    with monkeypatch.context() as patch:
        owner, writer = (regions, "write_features") if level == "patch" else (slide_files.files, "write_bytes")
        before_call(patch, owner, writer, 2, lambda: fill(small_disk))
        assert "No space left" in refused("extract", model, root, *EXTRACTION)
    wanted = visible(whole)
    assert all(wanted[name] == content for name, content in visible(root).items() if "slides_status" not in name)
    (small_disk / "filler").unlink()
    dino("extract", model, root, *EXTRACTION)
    assert visible(root) == wanted and everything(root) == everything(whole)


@pytest.mark.parametrize(
    ("owner", "writer", "number"),
    [(tile_files, "_allocate", 2), (tile_files.TileFile, "write", 1)],
    ids=["new", "rows"],
)
def test_a_disk_that_fills_up_while_tile_files_are_written(
    slides: Path,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    writer: str,
    number: int,
) -> None:
    """HDF5 only writes the empty file; after an error there the process goes on to end properly."""
    root, model = small_disk / "root", save_checkpoint(tmp_path / "patch.pt")
    dino("tile", slides, root, *TILING, "storage=none")
    with monkeypatch.context() as patch:
        before_call(patch, owner, writer, number, lambda: fill(small_disk))
        assert "No space left" in refused("extract", model, root, *EXTRACTION, "what=tiles")
    assert [path.name for path in root.glob("features_patch/*.h5")] in ([], ["one.h5"])
    (small_disk / "filler").unlink()
    dino("extract", model, root, *EXTRACTION, "what=tiles")
    found = visible(root / "features_patch")
    for path in root.glob("features_patch/*.h5"):
        path.unlink()
    dino("extract", model, root, *EXTRACTION, "what=tiles")
    assert visible(root / "features_patch") == found and len(found) == 3


def test_exports_and_scores_on_a_full_disk(labels: Path, small_disk: Path, tmp_path: Path) -> None:
    model, other = save_checkpoint(tmp_path / "a.pt"), save_checkpoint(tmp_path / "b.pt", seed=1)
    dino("export", model, small_disk / "export", "tile_size_px=64")
    dino("evaluate", "knn", model, labels, *KNN, f"output={small_disk / 'knn.json'}")
    before = visible(small_disk)
    fill(small_disk)
    assert "No space left" in refused("export", other, small_disk / "export", "tile_size_px=64")
    assert "No space left" in refused("export", other, small_disk / "new", "tile_size_px=64")
    assert "No space left" in refused("evaluate", "knn", other, labels, *KNN, f"output={small_disk / 'knn.json'}")
    (small_disk / "filler").unlink()
    assert visible(small_disk) == before  # the export and the scores of the first model are whole


def test_a_disk_that_may_only_be_read(labels: Path, slides: Path, small_disk: Path, tmp_path: Path) -> None:
    model, root = save_checkpoint(tmp_path / "a.pt"), small_disk / "root"
    dino("tile", slides / "one.tiff", root, *TILING)
    before = everything(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    lines = [
        refused("tile", slides, root, *TILING),
        refused("tile", slides, small_disk / "new", *TILING),
        refused("extract", model, root, *EXTRACTION),
        refused("export", model, small_disk / "export", "tile_size_px=64"),
        refused("evaluate", "knn", model, labels, *KNN, f"output={small_disk / 'knn.json'}"),
    ]
    assert all("Read-only file system" in line for line in lines)
    assert everything(small_disk) == before
    dino("tile", slides, root, *TILING, "dry_run=true")  # these write nothing
    dino("extract", model, root, *EXTRACTION, "dry_run=true")


def test_a_root_that_vanishes_is_not_made_anew(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a mount is lost: under its mount point nothing is written."""
    root, away, model = tmp_path / "root", tmp_path / "away", save_checkpoint(tmp_path / "a.pt")
    for number in (3, 60):  # within the first slide, and within the second
        with monkeypatch.context() as patch:
            before_call(patch, storage, "encode", number, lambda: root.rename(away))
            refused("tile", slides, root, *TILING)
        assert not root.exists()
        (away / "tiling.lock.json").unlink()  # of this very process, which lives on
        away.rename(root)
    dino("tile", slides, root, *TILING)
    with monkeypatch.context() as patch:
        before_call(patch, regions, "write_features", 2, lambda: root.rename(away))
        refused("extract", model, root, *EXTRACTION)
    assert not root.exists() and len(list(away.glob("region_4096_pretraining/*.pt"))) == 1
