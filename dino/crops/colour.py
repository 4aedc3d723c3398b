"""Colour operations on batches of images, in place, each sample with a factor of its own.

Brightness, contrast, saturation, hue, grey and solarize compute what torchvision's functional operations compute on
float tensors; stain jitter is that of Tellez et al. 2018 in the colour space of Ruifrok & Johnston 2001,
"Quantification of histochemical staining by color deconvolution". Everywhere ``images`` is (n, 3, s, s) float32 in
[0, 1], which the operation overwrites and returns, and a factor is (n,) float32 on the same device.
"""

import math
from functools import cache

import torch
from torch import Tensor

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's
# Absorbance of red, green and blue by haematoxylin, eosin and DAB (Ruifrok & Johnston 2001), as in scikit-image.
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
DARKEST = 1 / 255  # the darkest level that 8 bits can tell from black: its optical density is finite
SOLARIZE_THRESHOLD = 128 / 255
SMALLEST_CHROMA = 1e-12  # divides the zeros of grey pixels, whose hue does not matter


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by ``factor``."""
    return images.mul_(_spread(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey of each image."""
    weights = constant(GRAY_WEIGHTS, images.device)
    return _blend(images, (images.mean((2, 3)) @ weights).view(-1, 1, 1, 1), factor)  # the mean of grey is grey's mean


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image."""
    return _blend(images, gray(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by ``shift`` turns, keeping HSV's saturation and value.

    Written without comparisons, which a CPU's vector units are slow at. With h the hue in sixths of a turn from red,
    chroma = greatest - least channel, and f = (channel - least) / chroma for each channel: ``|h| = 1 + f_green +
    f_blue - f_red``, and h has the sign of green - blue. Backwards, for h from -3 to 3, a channel is ``least +
    chroma (clamp(||h - centre| - 3|, 1, 2) - 1)`` with centre 0 for red, 2 for green and -2 for blue.
    """
    red, green, blue = images.split(1, 1)  # (n, 1, s, s)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(least)
    hue = (green + blue).sub_(red).sub_(least).div_(chroma.clamp_min(SMALLEST_CHROMA)).add_(1)  # without sign
    hue = hue.copysign_(green - blue).add_(_spread(6 * shift))
    hue = hue.sub_((hue / 6).round_(), alpha=6)  # from -3 to 3
    centre = constant((0, 2, -2), images.device)[:, None, None]
    share = torch.sub(hue, centre, out=images).abs_().sub_(3).abs_().clamp_(1, 2)  # the old values are used up
    return torch.addcmul(least.sub_(chroma), share, chroma, out=images).clamp_(0, 1)


def grayscale(images: Tensor) -> Tensor:
    """Give every channel the luma."""
    return images.copy_(gray(images).expand_as(images))


def gray(images: Tensor) -> Tensor:
    """Luma, (n, 1, s, s), a new tensor."""
    red, green, blue = images.split(1, 1)
    return (red * GRAY_WEIGHTS[0]).add_(green, alpha=GRAY_WEIGHTS[1]).add_(blue, alpha=GRAY_WEIGHTS[2])


def solarize(images: Tensor) -> Tensor:
    """Invert every value of at least 128 / 255."""
    return images.copy_(torch.where(images >= SOLARIZE_THRESHOLD, 1 - images, images))


def hed_jitter(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift the haematoxylin, eosin and DAB content of each image.

    With D = -log10 I the optical density of a pixel and M the rows of ``STAINS``, each of length 1, the stains are
    ``c = D inv(M)``; they become ``c * scale + shift`` and go back by M. Unlike scikit-image the density is in
    absorbance (Ruifrok & Johnston's unit: there a shift of 0.05 dims a white pixel's most absorbed channel by at most
    11 %) and negative stains are kept, so that scale 1 and shift 0 change nothing.

    Args:
        images: (n, 3, s, s) float32 in [0, 1].
        scale: (n, 3) factor of each stain.
        shift: (n, 3) what is added to each, in absorbance.

    Returns:
        (n, 3, s, s) float32 in [0, 1].
    """
    stains = constant(_unit_stains(), images.device)  # (3, 3) rows: stains
    unmix = constant(_unmixing(), images.device)
    mix = torch.einsum("ij,nj,jk->nki", unmix, scale, stains)  # (n, 3, 3), rows: channels of the result
    moved = (shift @ stains) * -math.log(10)  # (n, 3)
    density = images.clamp_(min=DARKEST).log_().flatten(2)  # (n, 3, ss), natural and negative: the signs cancel
    mixed = torch.baddbmm(moved[:, :, None], mix, density).view_as(images)
    return torch.exp(mixed, out=images).clamp_(0, 1)


def _unit_stains() -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(x / math.hypot(*row) for x in row) for row in STAINS)


@cache
def _unmixing() -> tuple[tuple[float, ...], ...]:
    inverse = torch.tensor(_unit_stains(), dtype=torch.float64).inverse()
    return tuple(tuple(row) for row in inverse.tolist())


@cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """A constant, copied to the device once: a copy per batch would make the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _spread(factor)
    return images.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 1)


def _spread(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)
