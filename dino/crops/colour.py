"""In-place colour operations and Gaussian blur of batches of images, with one factor per image.

Brightness, contrast, saturation, hue, grey and solarize compute what torchvision's functional operations compute on
float tensors; stain jitter is that of Tellez et al. 2018 in the colour space of Ruifrok & Johnston 2001,
"Quantification of histochemical staining by color deconvolution". In all functions ``images`` is (n, 3, s, s)
float32 in [0, 1], which the operation overwrites and returns, and a factor is (n,) float32 on the same device.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # torchvision's
# Absorbance of red, green and blue by haematoxylin, eosin and DAB (Ruifrok & Johnston 2001), as in scikit-image.
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
DARKEST = 1 / 255  # the smallest 8-bit value above black: its optical density is finite
SOLARIZE_THRESHOLD = 128 / 255
SMALLEST_CHROMA = 1e-12  # avoids 0 / 0 for grey pixels, whose hue does not matter
TRUNCATE = 4.0  # radius of the kernel in standard deviations; the weight outside is less than 1e-4
NEGLIGIBLE = 5.0  # the total weight outside this many standard deviations is less than 1e-5
LARGEST_DENSE_PX = 128  # up to this size, matrix products are as fast on a CPU as adding shifted images


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply by ``factor``."""
    return images.mul_(_per_image(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey of each image."""
    weights = constant(GRAY_WEIGHTS, images.device)
    # Grey of the channel means. No matrix product: MKL rounds it differently for different numbers of images.
    means = (images.mean((2, 3)) * weights).sum(1)  # (n,)
    return _blend(images, means.view(-1, 1, 1, 1), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image."""
    return _blend(images, gray(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue by ``shift``, a fraction of the colour circle, keeping HSV's saturation and value.

    Written without comparisons, which are slow on a CPU's vector units. With h the hue in sixths of the circle from
    red, chroma = max - min of the channels, and f = (channel - min) / chroma for each channel: ``|h| = 1 + f_green +
    f_blue - f_red``, and h has the sign of green - blue. Inversely, for h from -3 to 3, a channel is ``min + chroma
    (clamp(||h - centre| - 3|, 1, 2) - 1)`` with centre 0 for red, 2 for green and -2 for blue.
    """
    red, green, blue = images.split(1, 1)  # (n, 1, s, s)
    lowest = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(lowest)
    hue = (green + blue).sub_(red).sub_(lowest).div_(chroma.clamp_min(SMALLEST_CHROMA)).add_(1)  # without sign
    hue = hue.copysign_(green - blue).add_(_per_image(6 * shift))
    hue = hue.sub_((hue / 6).round_(), alpha=6)  # from -3 to 3
    centre = constant((0, 2, -2), images.device)[:, None, None]
    fraction = torch.sub(hue, centre, out=images).abs_().sub_(3).abs_().clamp_(1, 2)  # overwrites the input
    return torch.addcmul(lowest.sub_(chroma), fraction, chroma, out=images).clamp_(0, 1)


def grayscale(images: Tensor) -> Tensor:
    """Set every channel to the luma."""
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
    ``c = D inv(M)``; they become ``c * scale + shift`` and are converted back with M. Unlike in scikit-image, the
    density is in absorbance (Ruifrok & Johnston's unit: a shift of 0.05 darkens a white pixel's most absorbed channel
    by at most 11 %) and negative stains are kept, so that scale 1 and shift 0 change nothing.

    Args:
        images: (n, 3, s, s) float32 in [0, 1].
        scale: (n, 3) factor of each stain.
        shift: (n, 3) offset of each stain, in absorbance.

    Returns:
        (n, 3, s, s) float32 in [0, 1].
    """
    stains = constant(_unit_stains(), images.device)  # (3, 3) row: stain
    unmix = constant(_unmixing(), images.device)
    # Sums over the stains, not matrix products: MKL rounds those differently for different numbers of images.
    per_stain = unmix.T[:, None, :] * stains[:, :, None]  # (stain, channel of the result, channel)
    mix = (scale[:, :, None, None] * per_stain).sum(1)  # (n, 3, 3), row: channel of the result
    offset = (shift[:, :, None] * stains).sum(1) * -math.log(10)  # (n, 3)
    density = images.clamp_(min=DARKEST).log_().flatten(2)  # (n, 3, ss), natural and negative: the signs cancel
    mixed = torch.baddbmm(offset[:, :, None], mix, density).view_as(images)
    return torch.exp(mixed, out=images).clamp_(0, 1)


def blur_radius(sigma: float, size: int) -> int:
    """Number of taps on each side of the kernel's centre: 4 sigma, but less than the size of the image."""
    return min(math.ceil(TRUNCATE * sigma), size - 1)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image; equals torchvision's ``gaussian_blur`` with kernel ``2 radius + 1``.

    Computed by two matrix products on a GPU and for small images, otherwise as a sum of shifted images.

    Args:
        images: (n, C, s, s) float, overwritten.
        sigma: (n,) standard deviations in px, above 0, on the same device.
        radius: Taps on each side of the kernel's centre, less than s.

    Returns:
        ``images``; borders are reflected without repeating the edge pixel.
    """
    if images.device.type == "cpu" and images.shape[-1] > LARGEST_DENSE_PX:
        for image, deviation in zip(images, sigma.tolist(), strict=True):
            taps = _half_kernel(deviation, radius)
            image.copy_(_along_rows(_along_columns(image, taps), taps))
        return images
    weights = blur_weights(sigma, radius, images.shape[-1])[:, None]  # (n, 1, s, s)
    return images.copy_(weights @ images @ weights.transpose(-1, -2))


def _half_kernel(sigma: float, radius: int) -> list[float]:
    """Weights of the centre tap and of the taps on one side of it, without negligible ones."""
    reach = min(radius, math.ceil(NEGLIGIBLE * sigma))
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(reach + 1)]
    total = 2 * sum(taps) - taps[0]
    return [tap / total for tap in taps]


def _along_columns(image: Tensor, taps: Sequence[float]) -> Tensor:
    """Blur (C, h, w) vertically: rows are contiguous in memory, so each tap is a shifted view."""
    reach, (channels, height, width) = len(taps) - 1, image.shape
    padded = F.pad(image[:, None], (0, 0, reach, reach), mode="reflect").flatten(1)  # (C, (h + 2 reach) w)
    return _sum_of_taps(padded, taps, width, height * width).view(channels, height, width)


def _along_rows(image: Tensor, taps: Sequence[float]) -> Tensor:
    """Blur (C, h, w) horizontally; rows stay padded until the end, where sums across row ends are discarded."""
    reach, (channels, height, width) = len(taps) - 1, image.shape
    padded = F.pad(image[:, None], (reach, reach, 0, 0), mode="reflect").flatten(1)  # (C, h (w + 2 reach))
    padded = F.pad(padded, (0, 2 * reach))  # so that shifted views of the last row stay inside the tensor
    blurred = _sum_of_taps(padded, taps, 1, height * (width + 2 * reach))
    return blurred.view(channels, height, width + 2 * reach)[..., :width]


def _sum_of_taps(padded: Tensor, taps: Sequence[float], step: int, length: int) -> Tensor:
    """(C, length): weighted sum of ``padded`` shifted by 0, step, 2 step ..., symmetric around the centre."""
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
        (n, size, size); row i contains the weights for pixel i of the result.
    """
    distance, source = _taps(radius, size, sigma.device)
    taps = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)  # (n, taps)
    taps = taps / taps.sum(-1, keepdim=True)
    shape = (len(sigma), size, len(distance))
    weights = sigma.new_zeros(len(sigma), size, size)
    return weights.scatter_add_(2, source.expand(shape), taps[:, None].expand(shape))


@cache
def _taps(radius: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distance of each tap, (taps,), and the pixel it reads for each result, (size, taps), reflected at the borders."""
    distance = torch.arange(-radius, radius + 1)
    source = (torch.arange(size)[:, None] + distance).abs()  # (size, taps)
    source = (size - 1) - ((size - 1) - source).abs()
    return distance.to(device), source.to(device)


def _unit_stains() -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(x / math.hypot(*row) for x in row) for row in STAINS)


@cache
def _unmixing() -> tuple[tuple[float, ...], ...]:
    inverse = torch.tensor(_unit_stains(), dtype=torch.float64).inverse()
    return tuple(tuple(row) for row in inverse.tolist())


@cache
def constant(values: tuple, device: torch.device) -> Tensor:
    """A constant tensor, copied to the device once: a copy per batch would synchronise with the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor)
    return images.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 1)


def _per_image(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)
