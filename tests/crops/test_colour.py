"""Colour operations and blur against torchvision's with equal factors, stain jitter against the formula in float64."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as tv

from dino.crops import colour

FACTORS = torch.tensor([0.0, 0.3, 1.0, 1.4, 2.5])
SHIFTS = torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.5])


@pytest.fixture
def images() -> torch.Tensor:
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[:, :, 0, :4] = 0.25  # grey: no hue
    images[:, :, 0, 4:8] = 0.0
    images[:, :, 0, 8:12] = 1.0
    images[:, 0, 1] = images[:, 1, 1]  # ties between channels
    images[:, 1, 2] = images[:, 2, 2]
    images[:, 0, 3] = images[:, 2, 3]
    return images


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (colour.adjust_brightness, tv.adjust_brightness, FACTORS),
        (colour.adjust_contrast, tv.adjust_contrast, FACTORS),
        (colour.adjust_saturation, tv.adjust_saturation, FACTORS),
        (colour.adjust_hue, tv.adjust_hue, SHIFTS),
    ],
)
def test_jitters_equal_torchvision_to_1e_5(images, ours, theirs, factors):
    expected = torch.stack([theirs(image, float(f)) for image, f in zip(images, factors, strict=True)])
    assert (ours(images.clone(), factors) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("operation", "factors"),
    [
        (colour.adjust_contrast, lambda n, rng: [torch.rand(n, generator=rng) * 2]),
        (colour.adjust_saturation, lambda n, rng: [torch.rand(n, generator=rng) * 2]),
        (colour.adjust_hue, lambda n, rng: [torch.rand(n, generator=rng) - 0.5]),
        (
            colour.hed_jitter,
            lambda n, rng: [1 + 0.1 * torch.rand(n, 3, generator=rng), torch.rand(n, 3, generator=rng)],
        ),
        (lambda x, sigma: colour.gaussian_blur(x, sigma, 4), lambda n, rng: [0.1 + torch.rand(n, generator=rng)]),
    ],
    ids=["contrast", "saturation", "hue", "hed", "blur"],
)
@pytest.mark.parametrize("count", [2, 3, 5, 8, 16])
def test_an_image_does_not_depend_on_the_others(operation, factors, count):
    """Bit for bit: views are the same for any number of workers, processes, threads and images per call."""
    rng = torch.Generator().manual_seed(count)
    images, drawn = torch.rand(count, 3, 24, 24, generator=rng), factors(count, rng)
    together = operation(images.clone(), *drawn)
    alone = [operation(images[i : i + 1].clone(), *(f[i : i + 1] for f in drawn)) for i in range(count)]
    assert torch.equal(together, torch.cat(alone))


def test_grey_equals_torchvision(images):
    assert (colour.grayscale(images.clone()) - tv.rgb_to_grayscale(images, 3)).abs().max() < 1e-6


def test_solarize_equals_torchvision_and_pillow_on_8_bit_values(images):
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 4, 256).contiguous()
    ours = colour.solarize(levels.float() / 255)
    pillow = np.asarray(ImageOps.solarize(Image.fromarray(levels[0].permute(1, 2, 0).numpy()), 128))
    assert np.array_equal((ours[0] * 255).round().permute(1, 2, 0).numpy(), pillow)
    assert torch.equal(colour.solarize(images.clone()), tv.solarize(images, 128 / 255))


def direct_hed(image: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Stain jitter pixel by pixel, as in Ruifrok & Johnston 2001 and Tellez et al. 2018; (h, w, 3) float64."""
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains /= np.sqrt((stains**2).sum(axis=1, keepdims=True))
    result = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        density = -np.log10(np.maximum(image[place], 1 / 255))
        content = np.linalg.solve(stains.T, density)  # density = stains.T @ content
        result[place] = 10 ** -(stains.T @ (content * scale + shift))
    return result.clip(0, 1)


def test_stain_jitter_equals_the_formula(images):
    generator = np.random.default_rng(0)
    scale, shift = generator.uniform(0.8, 1.2, (5, 3)), generator.uniform(-0.2, 0.2, (5, 3))
    ours = colour.hed_jitter(images.clone(), torch.tensor(scale).float(), torch.tensor(shift).float())
    for image, result, s, b in zip(images, ours, scale, shift, strict=True):
        expected = direct_hed(image.permute(1, 2, 0).double().numpy(), s, b)
        assert np.abs(result.permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_stain_jitter_of_zero_strength_is_the_identity(images):
    images = images.clamp_min(1 / 255)
    ours = colour.hed_jitter(images.clone(), torch.ones(5, 3), torch.zeros(5, 3))
    assert (ours - images).abs().max() < 1e-5


def test_more_haematoxylin_absorbs_in_the_ratio_of_haematoxylin():
    white = torch.ones(1, 3, 2, 2)
    moved = colour.hed_jitter(white, torch.ones(1, 3), torch.tensor([[0.05, 0.0, 0.0]]))[0, :, 0, 0]
    vector = torch.tensor([0.65, 0.70, 0.29])
    assert torch.allclose(-moved.log10(), 0.05 * vector / vector.norm(), atol=1e-6)


SIGMAS = [0.1, 0.5, 1.0, 1.7, 2.0]


@pytest.mark.parametrize("largest_dense", [4, 128])
@pytest.mark.parametrize(("size", "radius"), [(32, 8), (32, 3), (9, 8)])
def test_equals_torchvision_to_1e_5(monkeypatch, size, radius, largest_dense):
    monkeypatch.setattr(colour, "LARGEST_DENSE_PX", largest_dense)  # sums of shifted images, and matrix products
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours = colour.gaussian_blur(images.clone(), torch.tensor(SIGMAS), radius)
    for image, sigma, result in zip(images, SIGMAS, ours, strict=True):
        expected = tv.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)
        assert (result - expected).abs().max() < 1e-5


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_agrees_with_pillow_to_three_grey_levels_in_the_mean_one(sigma):
    # Pillow approximates a Gaussian by three box blurs, rounds to 8 bits after each, and repeats the edge pixel at
    # borders, which are not compared.
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = tv.gaussian_blur(noise, [5, 5], [1.0, 1.0])
    picture = (smooth * 255).round()
    blurred = colour.gaussian_blur(picture.clone(), torch.tensor([sigma]), colour.blur_radius(sigma, 64))
    pillow = Image.fromarray(picture[0].permute(1, 2, 0).byte().numpy()).filter(ImageFilter.GaussianBlur(sigma))
    difference = np.abs(blurred[0].permute(1, 2, 0).numpy() - np.asarray(pillow, dtype=np.float32))[8:-8, 8:-8]
    assert difference.max() < 3
    assert difference.mean() < 1


def test_weights_sum_to_one_and_their_tail_is_negligible():
    weights = colour.blur_weights(torch.tensor(SIGMAS), 8, 20)
    assert torch.allclose(weights.sum(-1), torch.ones(5, 20), atol=1e-6)
    wide = colour.blur_weights(torch.tensor([2.0], dtype=torch.float64), 19, 20)
    assert (
        wide - colour.blur_weights(torch.tensor([2.0], dtype=torch.float64), colour.blur_radius(2.0, 20), 20)
    ).abs().max() < 1e-4
