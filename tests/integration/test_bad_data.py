"""Data as it is in the world: every kind of file has a stated outcome, and none ends a run with a traceback."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import Crash, assert_same_bits, config, crash_after, last

from dino.api import pretrain
from dino.errors import DataError

GENEROUS = {"training.max_bad_fraction": 0.5, "training.max_steps": 12}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def quarantine(run: Path) -> dict[str, str]:
    with (run / "quarantine.csv").open(newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def unusual_tiles(folder: Path) -> None:
    """Files that are used: other modes, sizes down to one pixel, and names that few programs expect."""
    folder.mkdir()
    Image.fromarray(noise(40, 40, 4), "CMYK").save(folder / "print.jpg")
    Image.fromarray(noise(40, 40).astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(noise(40, 40)).save(folder / "grey.jpg")
    Image.fromarray(noise(40, 40, 4), "RGBA").save(folder / "alpha.png")
    frames = [Image.fromarray(noise(40, 40, 3)), Image.fromarray(255 - noise(40, 40, 3))]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees; tiles are taken as they are stored
    Image.fromarray(noise(40, 24, 3)).save(folder / "exif.jpg", exif=turned)
    Image.fromarray(noise(48, 1, 3)).save(folder / "narrow.png")
    Image.fromarray(noise(1, 48, 3)).save(folder / "flat.png")
    Image.fromarray(noise(1, 1, 3)).save(folder / "dot.png")
    for name in (b"a space.png", b"line\nbreak.png", b"not-utf8-\xff.png", "Gewebe_µ_組織.png".encode()):
        Image.fromarray(noise(40, 40, 3)).save(folder / os.fsdecode(name))
    (folder / "circle").symlink_to(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_unusual_tiles_are_used_as_they_are(tmp_path: Path, workers: int) -> None:
    unusual_tiles(tmp_path / "tiles")
    strict = {"training.max_bad_fraction": 0.0, "training.max_steps": 8, "speed.num_workers": workers}
    summary = pretrain(config(tmp_path / "tiles", tmp_path / "run", **strict))
    assert summary.state == "finished" and summary.numbers["bad_files"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in last(tmp_path / "run")["student"].values())
    assert not (tmp_path / "run" / "quarantine.csv").exists()


def bad_tiles(folder: Path) -> dict[str, str]:
    """Put files that cannot be used into a folder; what each is to be quarantined for, by name."""
    Image.fromarray(noise(64, 64, 3)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-600])
    (folder / "empty.png").write_bytes(b"")
    (folder / "=cmd.png").write_bytes(b"no image")
    with (folder / "slide.tif").open("wb") as file:
        file.truncate(2**30)  # a slide among the tiles, without its bytes
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "float.tif")
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.png").symlink_to(folder / "nowhere.png")
    (folder / "two\nlines.png").write_bytes(b"x")
    reasons = {"cut.jpg": "cut.jpg", "empty.png": "cannot decode", "'=cmd.png": "cannot decode", "slide.tif": "1.1 GB"}
    reasons |= {
        "float.tif": "floating point",
        "pipe.png": "pipe",
        "nowhere.png": "nowhere",
        r"two\nlines.png": "decode",
    }
    return reasons


def test_bad_tiles_are_replaced_listed_and_the_same_after_a_crash(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = bad_tiles(tiles)
    pretrain(config(tiles, tmp_path / "run", **GENEROUS))
    listed = quarantine(tmp_path / "run")
    assert listed.keys() == reasons.keys() and all(reasons[name] in listed[name] for name in reasons)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["bad_files"] == len(reasons)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 8)
        pretrain(config(tiles, tmp_path / "cut", **GENEROUS))
    assert quarantine(tmp_path / "cut")
    (tmp_path / "cut" / "quarantine.csv").unlink()
    pretrain(config(tiles, tmp_path / "cut", **GENEROUS))
    assert quarantine(tmp_path / "cut") == listed
    assert_same_bits(tmp_path / "run", tmp_path / "cut")
    assert last(tmp_path / "run")["state"]["quarantine"] == last(tmp_path / "cut")["state"]["quarantine"]


def spoil_files(monkeypatch: pytest.MonkeyPatch, data: Path) -> set[Path]:
    """Let one file vanish and another change during the second step of each run."""
    from dino.train.loop import Trainer

    honest = Trainer._step
    gone, changed = sorted(path for path in data.iterdir() if path.is_file())[:2]

    def step(self: Trainer, *args: object) -> object:
        if self.step == 1:
            gone.unlink(missing_ok=True)
            torch.save(torch.randn(36, 7), changed) if changed.suffix == ".pt" else changed.write_bytes(
                b"\xff\xd8 torn"
            )
        return honest(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_step", step)
    return {gone, changed}


@pytest.mark.parametrize("level", ["tiles", "grids"])
def test_files_that_vanish_or_change_meanwhile_are_replaced(
    level: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, suffix = request.getfixturevalue(level), "#0" if level == "grids" else ""
    spoiled = spoil_files(monkeypatch, data)
    unpacked = {"speed.cache_dir": "none"} if level == "grids" else {}
    assert pretrain(config(data, tmp_path / "run", **GENEROUS, **unpacked)).state == "finished"
    assert quarantine(tmp_path / "run").keys() == {f"{path.name}{suffix}" for path in spoiled}


def test_packed_grids_are_those_that_a_run_began_with(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(config(grids, tmp_path / "undisturbed", **GENEROUS))
    spoil_files(monkeypatch, grids)
    pretrain(config(grids, tmp_path / "disturbed", **GENEROUS))
    assert_same_bits(tmp_path / "undisturbed", tmp_path / "disturbed")


def bad_grids(folder: Path) -> dict[str, str]:
    """Overwrite six grids; what each is to be quarantined for, by name."""
    contents = {
        "finite": torch.full((36, 10), float("nan")),
        "float tensor": torch.zeros(36, 10, dtype=torch.long),
        "found torch.float32 (36,)": torch.zeros(36),
        "35": torch.zeros(35, 10),
        "found dict": {"features": torch.zeros(36, 10)},
    }
    paths = sorted(folder.glob("*.pt"))
    for path, content in zip(paths, contents.values(), strict=False):
        torch.save(content, path)
    paths[5].write_bytes(paths[5].read_bytes()[:-200])
    return {f"{path.name}#0": reason for path, reason in zip(paths, [*contents, "cannot read"], strict=False)}


def test_bad_grids_are_replaced_and_listed(grids: Path, tmp_path: Path) -> None:
    reasons = bad_grids(grids)
    pretrain(config(grids, tmp_path / "run", **GENEROUS))
    listed = quarantine(tmp_path / "run")
    assert listed.keys() == reasons.keys() and all(reasons[name] in listed[name] for name in reasons)
    with pytest.raises(DataError, match=r"4 more such files.*max_bad_fraction=0\.1"):
        pretrain(config(grids, tmp_path / "strict", **{"training.max_bad_fraction": 0.1}))
    assert not (tmp_path / "strict").exists()


def test_a_grid_that_turns_out_bad_counts_too(grids: Path, tmp_path: Path) -> None:
    torch.save(torch.full((36, 10), float("inf")), grids / "slide_0_0.pt")
    with pytest.raises(DataError, match=r"at most 0 samples.*slide_0_0\.pt"):
        pretrain(config(grids, tmp_path / "run"))
    assert list(quarantine(tmp_path / "run")) == ["slide_0_0.pt#0"]
