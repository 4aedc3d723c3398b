"""Crop and resize against torchvision and Pillow, and the two implementations against each other."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino.crops import resample
from dino.crops.resample import fold_rotation, resize_boxed, resize_dense, resize_weights

FORMS = [resize_boxed, resize_dense]
BOXES = [(0, 0, 61, 70), (3, 5, 31, 40), (10, 0, 20, 21), (60, 69, 1, 1), (0, 30, 61, 3), (7, 9, 32, 32)]
OFF = torch.zeros(1, 1, dtype=torch.bool)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, 61, 70), generator=generator, dtype=torch.uint8)


def one(form, pixels, box, size, flip_x=OFF, flip_y=OFF, transpose=OFF) -> torch.Tensor:
    return form(pixels, torch.tensor([[box]]), flip_x, flip_y, transpose, size)[0, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [32, 96, 8, 1])
def test_equals_torchvision_to_1e_5(form, pixels, box, size):
    expected = tv.resized_crop(
        pixels[0].float() / 255, *box, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    assert (one(form, pixels, box, size) / 255 - expected).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("size", [32, 96, 8])
def test_agrees_with_pillow_to_two_grey_levels(form, pixels, box, size):
    # Pillow rounds to 8 bits and clips after each of its two passes; noise around mid-grey is never clipped.
    pixels = pixels // 3 + 85
    top, left, height, width = box
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
    expected = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    difference = np.abs(one(form, pixels, box, size).permute(1, 2, 0).clamp(0, 255).numpy() - expected)
    assert difference.max() < 2
    assert difference.mean() < 0.6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip_x", [False, True])
@pytest.mark.parametrize("flip_y", [False, True])
def test_flips_and_rotations_equal_those_of_the_resized_crop(form, pixels, turns, flip_x, flip_y):
    folded = fold_rotation(torch.tensor([[flip_x]]), torch.tensor([[flip_y]]), torch.tensor([[turns]]))
    upright = one(form, pixels, BOXES[1], 24)
    expected = upright.flip([-1] * flip_x + [-2] * flip_y)
    expected = torch.rot90(expected, turns, (-2, -1))
    assert torch.allclose(one(form, pixels, BOXES[1], 24, *folded), expected, atol=1e-3)  # of 255 grey levels


def batch_of_crops(rows: int = 5, views: int = 3):
    generator = torch.Generator().manual_seed(1)

    def draw(high, shape):
        return torch.randint(0, high, shape, generator=generator)

    pixels = draw(256, (rows, 3, 61, 70)).to(torch.uint8)
    corner, side = draw(20, (views, rows, 2)), 1 + draw(40, (views, rows, 2))
    flags = draw(2, (3, views, rows)).bool()
    return pixels, torch.cat([corner, side], dim=-1), *flags


def test_both_implementations_agree_and_samples_are_independent():
    pixels, box, *flags = batch_of_crops()
    boxed, dense = (form(pixels, box, *flags, 32) for form in FORMS)
    assert boxed.shape == (3, 5, 3, 32, 32)
    assert (boxed - dense).abs().max() < 2e-3  # grey levels of 255
    for form, together in ((resize_boxed, boxed), (resize_dense, dense)):
        for row in range(len(pixels)):
            part = slice(row, row + 1)
            alone = form(pixels[part], box[:, part], *(f[:, part] for f in flags), 32)
            assert (alone - together[:, part]).abs().max() < 255e-6


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_never_read(form):
    pixels, box, *flags = batch_of_crops()
    padded = torch.full((5, 3, 80, 90), 255, dtype=torch.uint8)
    padded[..., :61, :70] = pixels
    assert (form(padded, box, *flags, 32) - form(pixels, box, *flags, 32)).abs().max() < 255e-6


def test_the_dense_implementation_does_not_depend_on_the_chunk_size(monkeypatch):
    pixels, box, *flags = batch_of_crops()
    whole = resize_dense(pixels, box, *flags, 32)
    monkeypatch.setattr(resample, "DENSE_BYTES", 2 * 4 * 3 * 61 * 3 * 32)
    assert (resize_dense(pixels, box, *flags, 32) - whole).abs().max() < 255e-6


def test_weights_sum_to_one_and_stay_inside_the_crop():
    start, length = torch.tensor([3, 0, 10]), torch.tensor([40, 64, 2])
    weights = resize_weights(start, length, torch.tensor([False, True, False]), 16, 64)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 16), atol=1e-6)
    assert (weights[0, :, :3] == 0).all() and (weights[0, :, 43:] == 0).all() and (weights[2, :, 12:] == 0).all()


def test_a_full_crop_at_the_size_of_the_tile_is_the_identity(pixels):
    square = pixels[..., :48, :48].contiguous()
    for form in FORMS:
        assert (one(form, square, (0, 0, 48, 48), 48) - square[0]).abs().max() < 1e-4


@pytest.mark.skipif("DINO_TEST_DATA" not in os.environ, reason="needs DINO_TEST_DATA")
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_pillow_on_tissue_to_a_third_of_a_grey_level_in_the_mean(form):
    path = sorted((Path(os.environ["DINO_TEST_DATA"]) / "crc5" / "train").rglob("*.jp*g"))[0]
    picture = Image.open(path).convert("RGB")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    for top, left, height, width, size in ((5, 9, 190, 200, 224), (20, 30, 110, 96, 96), (100, 80, 60, 55, 96)):
        crop = picture.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
        ours = one(form, pixels, (top, left, height, width), size).permute(1, 2, 0).clamp(0, 255).numpy()
        difference = np.abs(ours - np.asarray(crop, dtype=np.float32))
        assert difference.mean() < 1 / 3
        assert np.quantile(difference, 0.999) < 2
