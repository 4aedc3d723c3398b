"""Blur against torchvision with the same kernel, and against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as tv

from dino.crops import blur
from dino.crops.blur import blur_radius, blur_weights, gaussian_blur

SIGMAS = [0.1, 0.5, 1.0, 1.7, 2.0]


@pytest.mark.parametrize("largest_dense", [4, 128])
@pytest.mark.parametrize(("size", "radius"), [(32, 8), (32, 3), (9, 8)])
def test_equals_torchvision_to_1e_5(monkeypatch, size, radius, largest_dense):
    monkeypatch.setattr(blur, "LARGEST_DENSE_PX", largest_dense)  # tap by tap, and by matrices
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours = gaussian_blur(images.clone(), torch.tensor(SIGMAS), radius)
    for image, sigma, result in zip(images, SIGMAS, ours, strict=True):
        expected = tv.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)
        assert (result - expected).abs().max() < 1e-5


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_agrees_with_pillow_to_three_grey_levels_in_the_mean_one(sigma):
    # Pillow takes three box blurs for a Gaussian, rounds to 8 bits after each, and repeats the edge pixel (left out).
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = tv.gaussian_blur(noise, [5, 5], [1.0, 1.0])
    picture = (smooth * 255).round()
    blurred = gaussian_blur(picture.clone(), torch.tensor([sigma]), blur_radius(sigma, 64))
    pillow = Image.fromarray(picture[0].permute(1, 2, 0).byte().numpy()).filter(ImageFilter.GaussianBlur(sigma))
    difference = np.abs(blurred[0].permute(1, 2, 0).numpy() - np.asarray(pillow, dtype=np.float32))[8:-8, 8:-8]
    assert difference.max() < 3
    assert difference.mean() < 1


def test_weights_sum_to_one_and_their_tail_is_negligible():
    weights = blur_weights(torch.tensor(SIGMAS), 8, 20)
    assert torch.allclose(weights.sum(-1), torch.ones(5, 20), atol=1e-6)
    wide = blur_weights(torch.tensor([2.0], dtype=torch.float64), 19, 20)
    assert (wide - blur_weights(torch.tensor([2.0], dtype=torch.float64), blur_radius(2.0, 20), 20)).abs().max() < 1e-4
