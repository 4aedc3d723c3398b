"""Gaussian blur of a batch, each sample with a standard deviation of its own."""

import math
from functools import cache

import torch
from torch import Tensor

TRUNCATE = 4.0  # taps reach this many standard deviations; what lies beyond weighs less than 1e-4


def blur_radius(sigma: float, size: int) -> int:
    """How many taps the kernel has on each side: 4 sigma, and less than the image."""
    return min(math.ceil(TRUNCATE * sigma), size - 1)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur by two matrix products; equals torchvision's ``gaussian_blur`` with kernel ``2 radius + 1``.

    Args:
        images: (n, C, s, s) float, overwritten.
        sigma: (n,) standard deviations in px, above 0, on the same device.
        radius: Taps on each side of the kernel, less than s.

    Returns:
        ``images``; borders are mirrored without repeating the edge pixel.
    """
    weights = blur_weights(sigma, radius, images.shape[-1])[:, None]  # (n, 1, s, s)
    return images.copy_(weights @ images @ weights.transpose(-1, -2))


def blur_weights(sigma: Tensor, radius: int, size: int) -> Tensor:
    """Blur along one axis as a matrix.

    Args:
        sigma: (n,) standard deviations in px.
        radius: Taps on each side, less than ``size``.
        size: Length of the axis in px.

    Returns:
        (n, size, size); row i holds the weights of pixel i's result.
    """
    distance, source = _taps(radius, size, sigma.device)
    taps = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # (n, taps)
    taps = taps / taps.sum(-1, keepdim=True)
    shape = (len(sigma), size, len(distance))
    weights = sigma.new_zeros(len(sigma), size, size)
    return weights.scatter_add_(2, source.expand(shape), taps[:, None].expand(shape))


@cache
def _taps(radius: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distance of each tap, (taps,), and the pixel that it reads for each result, mirrored at the borders."""
    distance = torch.arange(-radius, radius + 1)
    source = (torch.arange(size)[:, None] + distance).abs()  # (size, taps)
    source = (size - 1) - ((size - 1) - source).abs()
    return distance.to(device), source.to(device)
