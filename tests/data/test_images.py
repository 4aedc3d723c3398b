import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.data import images
from dino.errors import DataError


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_decodes_as_pillow_does(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tile{suffix}"
    Image.fromarray(noise(37, 53)).save(path)
    decoded = images.decode(path)
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, 37, 53)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.asarray(Image.open(path).convert("RGB")))


def test_both_jpeg_decoders_give_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tile.jpg"
    Image.fromarray(noise(64, 48)).save(path)
    fast = images.decode(path)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert torch.equal(fast, images.decode(path))


def test_unusual_modes_become_rgb(tmp_path: Path) -> None:
    grey = noise(8, 8, 1)
    Image.fromarray(grey).save(tmp_path / "grey.jpg", quality=100)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    clear = np.dstack([noise(8, 8), np.zeros((8, 8), np.uint8)])
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    Image.fromarray(noise(8, 8, 4), "CMYK").save(tmp_path / "print.jpg")
    frames = [Image.fromarray(noise(8, 8)), Image.fromarray(255 - noise(8, 8))]
    frames[0].save(tmp_path / "frames.tif", save_all=True, append_images=frames[1:])

    assert images.decode(tmp_path / "grey.jpg").shape == (3, 8, 8)
    assert np.array_equal(images.decode(tmp_path / "deep.png")[1].numpy(), grey)  # 16 bit to 8
    assert (images.decode(tmp_path / "clear.png") == 255).all()  # transparency is glass
    assert images.decode(tmp_path / "print.jpg").shape == (3, 8, 8)
    assert np.array_equal(images.decode(tmp_path / "frames.tif").permute(1, 2, 0).numpy(), noise(8, 8))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_errors_name_damaged_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jpg"):
        images.decode(path)


def test_truncated_jpegs_and_decompression_bombs_raise_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"cut\.jpg"):
        images.decode(path)
    Image.fromarray(noise(64, 64)).save(tmp_path / "big.jpg")
    monkeypatch.setattr(images, "LARGEST_PX", 1000)
    with pytest.raises(DataError, match="64 x 64"):
        images.decode(tmp_path / "big.jpg")


def test_listing_is_sorted_and_recursive_and_ends_at_cycles(tmp_path: Path) -> None:
    for name in ["b/2.jpg", "a/1.png", "3.TIF", "a/.hidden.jpg", ".cache/4.jpg", "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    listed = [str(path.relative_to(tmp_path)) for path in images.list_images(tmp_path)]
    assert listed == images.list_names(tmp_path) == ["3.TIF", "a/1.png", "b/2.jpg"]


def test_names_are_sorted_as_paths(tmp_path: Path) -> None:
    names = ["a/b.png", "a-b.png", "a/b-c/d.png", "a/b/c.png", "A.png", "a b/c.png", "µ/1.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [Path(name) for name in images.list_names(tmp_path)] == sorted(Path(name) for name in names)
    assert images.list_names(tmp_path / "a" / "..") == images.list_names(tmp_path)


def test_folders_without_images_raise_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing"):
        images.list_images(tmp_path / "absent")
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match="found 1 other files"):
        images.list_images(tmp_path)


@pytest.mark.parametrize(
    "names", [[], ["a"], ["slide_0_0.jpg", "b/c d.png", "line\nbreak", "Gewebe_µ_組織.png", "not-\udcff.png"]]
)
def test_names_are_stored_unchanged(names: list[str]) -> None:
    kept = pickle.loads(pickle.dumps(images.Names(iter(names))))
    assert list(kept) == names and len(kept) == len(names)
    assert [kept[-i] for i in range(1, len(names) + 1)] == names[::-1] and kept[1:4] == names[1:4]
    with pytest.raises(IndexError):
        kept[len(names)]


def test_the_fingerprint_depends_on_names_and_order() -> None:
    digest = hashlib.sha256(b"a\0b\xff/c\0").hexdigest()
    assert images.Names(["a", "b\udcff/c"]).fingerprint == digest
    assert len({images.Names(n).fingerprint for n in (["ab"], ["a", "b"], ["b", "a"], [])}) == 4
