"""Slides, masks and links that cannot be used: each has an outcome of its own, and the others go on."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from painted_slide import halved, noise, write_slide
from PIL import Image

from dino.api.tiling import tile
from dino.config.schema import TileConfig
from dino.slides import slide
from dino.slides.tables import read_status, read_tiles

SMALL = {"tile_size_px": 64, "region_size_px": 128, "num_workers": 1, "previews": False}


def small(**settings: object) -> TileConfig:
    return TileConfig(**{**SMALL, **settings})  # type: ignore[arg-type]


def painted(path: Path, seed: int = 0) -> Path:
    pixels = noise(517, 391, seed)
    return write_slide(path, [pixels, halved(pixels)])


def directories(content: bytes) -> list[int]:
    """Offsets of a TIFF's directories, one for each level."""
    found, link = [], struct.unpack_from("<I", content, 4)[0]
    while link:
        found.append(link)
        count = struct.unpack_from("<H", content, link)[0]
        link = struct.unpack_from("<I", content, link + 2 + 12 * count)[0]
    return found


def with_tag(content: bytes, level: int, tag: int, value: int) -> bytes:
    """The TIFF with another value, or place of its values, for a tag of one level."""
    start, changed = directories(content)[level], bytearray(content)
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        if struct.unpack_from("<H", content, entry)[0] == tag:
            struct.pack_into("<I", changed, entry + 8, value)
            return bytes(changed)
    raise AssertionError(f"no tag {tag}")


OFFSETS, COMPRESSION, JPEG = 324, 259, 7  # where a level's tiles lie, and how they are packed


def bad_slides(folder: Path) -> dict[str, str]:
    """Write slides that cannot be tiled; what each one's reason says, by name."""
    whole = painted(folder.parent / "whole.tiff").read_bytes()
    contents = {
        "zero_bytes": (b"", "openslide can read"),
        "a_text": (b"this is no slide\n" * 100, "openslide can read"),
        "a_picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "openslide can read"),
        "cut_in_its_header": (whole[:5000], "openslide can read"),
        "cut_by_a_half": (whole[: len(whole) // 2], "openslide can read"),
        "level_0_gone": (with_tag(whole, 0, OFFSETS, len(whole) + 9), "openslide can read"),
        "level_0_undecodable": (with_tag(whole, 0, COMPRESSION, JPEG), "Not a JPEG"),
        "level_1_undecodable": (with_tag(whole, 1, COMPRESSION, JPEG), "Not a JPEG"),
    }
    for name, (content, _) in contents.items():
        (folder / f"{name}.tiff").write_bytes(content)
    (folder / "nowhere.tiff").symlink_to("/nowhere/at/all.tiff")
    (folder / "itself.tiff").symlink_to(folder / "itself.tiff")
    return {name: words for name, (_, words) in contents.items()} | {"nowhere": "link", "itself": "link"}


def test_each_bad_slide_has_a_reason_and_the_others_go_on(tmp_path: Path) -> None:
    folder, root = tmp_path / "slides", tmp_path / "root"
    folder.mkdir()
    bad = bad_slides(folder)
    whole = painted(folder / "good.tiff", 1).read_bytes()
    (folder / "level_1_gone.tiff").write_bytes(with_tag(whole, 1, OFFSETS, len(whole) + 9))  # openslide leaves it out
    write_slide(folder / "glass.tiff", [np.full((300, 300, 3), 245, np.uint8)])
    (folder / "a_folder.tiff").mkdir()
    os.mkfifo(folder / "a_pipe.tiff")  # neither is a slide: passed by
    summary = tile([folder], root, small(tissue_downsample=4))
    assert summary.exit_code == 2
    statuses = read_status(root)
    assert {name for name, status in statuses.items() if status.status == "failed"} == set(bad)
    assert set(statuses) == {*bad, "good", "level_1_gone", "glass"}
    for name, words in bad.items():
        assert words in statuses[name].reason and "\n" not in statuses[name].reason, name
        assert statuses[name].tiles == 0
    assert (statuses["good"].status, statuses["glass"].status) == ("ok", "no_tissue")
    assert statuses["level_1_gone"].tiles == statuses["good"].tiles > 0
    assert "no tile has at least" in statuses["glass"].reason
    assert {t.slide_id for t in read_tiles(root)} == {"good", "level_1_gone"}
    assert not (root / ".partial").exists()


def test_a_rerun_repairs_only_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, root = tmp_path / "slides", tmp_path / "root"
    painted(folder / "good.tiff", 1)
    (folder / "bad.tiff").write_bytes(b"")
    assert tile([folder], root, small()).exit_code == 2
    painted(folder / "bad.tiff", 2)
    worked_on = []
    honest = slide.survey_slide
    monkeypatch.setattr(slide, "survey_slide", lambda *a: worked_on.append(a[1].slide_id) or honest(*a))
    summary = tile([folder], root, small())
    assert (summary.exit_code, summary.reused, worked_on) == (0, 1, ["bad"])
    tile([folder], tmp_path / "fresh", small())
    for name in ("tiles.csv", "regions.csv", "slides_status.csv"):
        assert (root / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_slide_that_vanishes_after_it_was_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, root = tmp_path / "slides", tmp_path / "root"
    painted(folder / "a.tiff", 1)
    painted(folder / "b.tiff", 2)
    honest = slide.survey_slide
    monkeypatch.setattr(slide, "survey_slide", lambda *a: (folder / "b.tiff").unlink(missing_ok=True) or honest(*a))
    assert tile([folder], root, small()).exit_code == 2
    statuses = read_status(root)
    assert (statuses["a"].status, statuses["b"].status) == ("ok", "failed")
    assert "no file" in statuses["b"].reason


def masks(folder: Path) -> dict[str, str]:
    """Write masks that do not fit a slide of 517 x 391 px; what each one's reason says, by name."""
    folder.mkdir()
    Image.fromarray(np.ones((391, 391), np.uint8)).save(folder / "wrong_size.png")
    Image.fromarray(np.full((391, 517), 7, np.uint8)).save(folder / "wrong_values.png")
    (folder / "a_text.png").write_bytes(b"no picture")
    (folder / "zero_bytes.png").write_bytes(b"")
    whole = folder / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (391, 517), np.uint8)).save(whole)
    (folder / "cut.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return dict.fromkeys(("wrong_size", "wrong_values", "a_text", "zero_bytes", "cut"), "binary mask")


def test_masks_that_do_not_fit_or_cannot_be_read(tmp_path: Path) -> None:
    bad, root = masks(tmp_path / "masks"), tmp_path / "root"
    painted(tmp_path / "slide.tiff")
    rows = [f"{name},slide.tiff,masks/{name}.png" for name in [*bad, "whole"]]
    (tmp_path / "slides.csv").write_text("\n".join(["sample_id,image_path,mask_path", *rows]) + "\n")
    assert tile([tmp_path / "slides.csv"], root, small()).exit_code == 2
    statuses = read_status(root)
    assert statuses["whole"].status == "ok" and statuses["whole"].tiles > 0
    for name, words in bad.items():
        assert statuses[name].status == "failed" and words in statuses[name].reason, statuses[name].reason
        assert f"{name}.png" in statuses[name].reason


def test_damaged_copies_of_real_slides(real_tissue: Path, tmp_path: Path) -> None:
    """Cut off, the ends of both slides' directories are gone; with pixels overwritten, a decoder stumbles."""
    folder, root = tmp_path / "slides", tmp_path / "root"
    folder.mkdir()
    wholes = {"cmu": "cmu-1-small-region.svs", "tcga": "tcga-cr-7395-01a-01-ts1.svs"}
    for name, file in wholes.items():
        content = (real_tissue / "slides" / file).read_bytes()
        (folder / f"{name}.svs").write_bytes(content)
        (folder / f"{name}_cut.svs").write_bytes(content[: int(0.7 * len(content))])
        third = len(content) // 3
        (folder / f"{name}_overwritten.svs").write_bytes(content[:third] + b"\xff" * third + content[2 * third :])
    summary = tile(
        [folder], root, small(tile_size_px=256, region_size_px=1024, spacing_at_level_0=0.25, storage="none")
    )
    assert summary.exit_code == 2
    words = {name: status.status for name, status in read_status(root).items()}
    assert (words["cmu"], words["tcga"], words["cmu_cut"], words["tcga_cut"]) == ("ok", "ok", "failed", "failed")
    assert words["cmu_overwritten"] in ("failed", "ok") and len(words) == 6
