"""Gaussian blur of a batch, each sample with a standard deviation of its own."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

TRUNCATE = 4.0  # taps reach this many standard deviations; what lies beyond weighs less than 1e-4
NEGLIGIBLE = 5.0  # taps beyond this many standard deviations weigh less than 1e-5 together
LARGEST_DENSE_PX = 128  # up to this side a CPU is as fast by matrices as tap by tap


def blur_radius(sigma: float, size: int) -> int:
    """How many taps the kernel has on each side: 4 sigma, and less than the image."""
    return min(math.ceil(TRUNCATE * sigma), size - 1)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image; equals torchvision's ``gaussian_blur`` with kernel ``2 radius + 1``.

    By two matrix products, which suit a GPU and small images, or on a CPU tap by tap.

    Args:
        images: (n, C, s, s) float, overwritten.
        sigma: (n,) standard deviations in px, above 0, on the same device.
        radius: Taps on each side of the kernel, less than s.

    Returns:
        ``images``; borders are mirrored without repeating the edge pixel.
    """
    if images.device.type == "cpu" and images.shape[-1] > LARGEST_DENSE_PX:
        for image, one in zip(images, sigma.tolist(), strict=True):
            taps = _taps_of(one, radius)
            image.copy_(_along_rows(_along_columns(image, taps), taps))
        return images
    weights = blur_weights(sigma, radius, images.shape[-1])[:, None]  # (n, 1, s, s)
    return images.copy_(weights @ images @ weights.transpose(-1, -2))


def _taps_of(sigma: float, radius: int) -> list[float]:
    """Weights of the middle tap and of those on one side of it; those that weigh next to nothing are left out."""
    reach = min(radius, math.ceil(NEGLIGIBLE * sigma))
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(reach + 1)]
    total = 2 * sum(taps) - taps[0]
    return [tap / total for tap in taps]


def _along_columns(image: Tensor, taps: Sequence[float]) -> Tensor:
    """Blur (C, h, w) from top to bottom. Rows follow each other in memory, so that a tap is a shifted copy of them."""
    reach, (channels, height, width) = len(taps) - 1, image.shape
    padded = F.pad(image[:, None], (0, 0, reach, reach), mode="reflect").flatten(1)  # (C, (h + 2 reach) w)
    return _sum_of_taps(padded, taps, width, height * width).view(channels, height, width)


def _along_rows(image: Tensor, taps: Sequence[float]) -> Tensor:
    """Blur (C, h, w) from left to right; rows stay padded meanwhile, what is summed across their ends is cut off."""
    reach, (channels, height, width) = len(taps) - 1, image.shape
    padded = F.pad(image[:, None], (reach, reach, 0, 0), mode="reflect").flatten(1)  # (C, h (w + 2 reach))
    padded = F.pad(padded, (0, 2 * reach))  # the last row has no successor to run into
    blurred = _sum_of_taps(padded, taps, 1, height * (width + 2 * reach))
    return blurred.view(channels, height, width + 2 * reach)[..., :width]


def _sum_of_taps(padded: Tensor, taps: Sequence[float], step: int, length: int) -> Tensor:
    """(C, length): weighted sum of ``padded`` shifted by 0, step, 2 step ..., symmetric around the middle one."""
    reach = len(taps) - 1

    def shifted(by: int) -> Tensor:
        return padded[:, (reach + by) * step :][:, :length]

    total = shifted(0) * taps[0]
    for i in range(1, reach + 1):
        total.add_(shifted(-i), alpha=taps[i]).add_(shifted(i), alpha=taps[i])
    return total


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
