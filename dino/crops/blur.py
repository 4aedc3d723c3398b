"""Gaussian blur of a batch, each sample with a standard deviation of its own."""

import math

import torch
from torch import Tensor

TRUNCATE = 4.0  # taps reach this many standard deviations; what lies beyond weighs less than 1e-4


def blur_radius(sigma: float, size: int) -> int:
    """How many taps the kernel has on each side: 4 sigma, and less than the image."""
    return min(math.ceil(TRUNCATE * sigma), size - 1)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur by two matrix products; equals torchvision's ``gaussian_blur`` with kernel ``2 radius + 1``.

    Args:
        images: (n, C, s, s) float.
        sigma: (n,) standard deviations in px, above 0, on the same device.
        radius: Taps on each side of the kernel, less than s.

    Returns:
        (n, C, s, s) float; borders are mirrored without repeating the edge pixel.
    """
    weights = blur_weights(sigma, radius, images.shape[-1])[:, None]  # (n, 1, s, s)
    return weights @ images @ weights.transpose(-1, -2)


def blur_weights(sigma: Tensor, radius: int, size: int) -> Tensor:
    """Blur along one axis as a matrix.

    Args:
        sigma: (n,) standard deviations in px.
        radius: Taps on each side.
        size: Length of the axis in px.

    Returns:
        (n, size, size); row i holds the weights of pixel i's result.
    """
    place = torch.arange(size, device=sigma.device)
    row, column = place[:, None], place[None]
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    total = _bell(taps, sigma[:, None]).sum(-1)[:, None, None]

    def weights(distance: Tensor) -> Tensor:
        return _bell(distance, sigma[:, None, None]) * (distance.abs() <= radius)

    # A mirrored pixel -j (or 2 (size - 1) - j) shows pixel j once more; the edge pixel itself has no mirror image.
    mirrored_low = weights(row + column) * (column > 0)
    mirrored_high = weights(2 * (size - 1) - row - column) * (column < size - 1)
    return (weights(row - column) + mirrored_low + mirrored_high) / total


def _bell(distance: Tensor, sigma: Tensor) -> Tensor:
    return torch.exp(-0.5 * (distance / sigma) ** 2)
