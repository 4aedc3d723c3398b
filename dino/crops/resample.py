"""Crop, antialiased bicubic resize, flip and 90° rotation of a batch, with one box per sample.

The resize is that of Pillow and torchvision (``antialias=True``): Keys' cubic kernel with a = -0.5, widened by the
scale when downsampling, and normalised inside the crop. It is linear and separable: each sample is resized by two
weight matrices. :func:`resize_dense` multiplies with the full matrices, which is fast on a GPU; :func:`resize_boxed`
resizes crop by crop with torch's kernel, which is faster on a CPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_BYTES = 512 * 2**20  # upper bound of the largest intermediate tensor of resize_dense


def fold_rotation(flip_x: Tensor, flip_y: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Express "flip, then rotate counter-clockwise by ``turns`` times 90°" as "flip, then transpose".

    Args:
        flip_x: (...) bool, horizontal flip before the rotation.
        flip_y: (...) bool, vertical flip before the rotation.
        turns: (...) int64, 0 to 3, as in ``torch.rot90(x, turns, (-2, -1))``.

    Returns:
        Three (...) bool tensors: horizontal flip, vertical flip, and whether to transpose afterwards.
    """
    return flip_x ^ ((turns == 1) | (turns == 2)), flip_y ^ (turns >= 2), turns % 2 == 1


def resize_weights(start: Tensor, length: Tensor, flip: Tensor, size: int, extent: int) -> Tensor:
    """Weights of all source pixels for each pixel of the resized crop, along one axis.

    Args:
        start: (...) int64, first source pixel of the crop.
        length: (...) int64, size of the crop in source pixels.
        flip: (...) bool, reverse the result.
        size: Size of the result in px.
        extent: Size of the source in px, with padding; pixels outside the crop have weight 0.

    Returns:
        (..., size, extent) float32; each row sums to 1.
    """
    target = torch.arange(size, device=start.device)
    target = torch.where(flip[..., None], size - 1 - target, target)  # (..., size)
    source = torch.arange(extent, device=start.device) - start[..., None]  # (..., extent)
    length = length[..., None]
    # Distance to the centre of the target pixel, in units of the kernel. Integers up to the single division, so that
    # float32 is exact.
    distance = ((2 * source + 1) * size)[..., None, :] - ((2 * target + 1) * length)[..., None]
    distance = distance.float() / (2 * length.clamp_min(size))[..., None]  # (..., size, extent)
    weights = _cubic(distance) * ((source >= 0) & (source < length))[..., None, :]
    return weights / weights.sum(-1, keepdim=True)


def _cubic(distance: Tensor) -> Tensor:
    x = distance.abs().clamp_max_(2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


def resize_dense(pixels: Tensor, box: Tensor, flip_x: Tensor, flip_y: Tensor, transpose: Tensor, size: int) -> Tensor:
    """Crop, resize, flip and transpose by batched matrix products.

    Args:
        pixels: (B, 3, H, W) uint8 or float, padded at the bottom and right to a common size.
        box: (V, B, 4) int64 on the CPU: top, left, height, width.
        flip_x: (V, B) bool on the CPU, horizontal flip of the resized crop.
        flip_y: (V, B) bool on the CPU, vertical flip.
        transpose: (V, B) bool on the CPU, transpose after the flips.
        size: Size of the result in px.

    Returns:
        (V, B, 3, size, size) float32 on the device of ``pixels``, in the same units, not clamped.
    """
    views, batch = box.shape[:2]
    _, channels, height, width = pixels.shape
    out = pixels.new_empty((views, batch, channels, size, size), dtype=torch.float32)
    geometry = torch.cat([box, flip_x[..., None], flip_y[..., None]], dim=-1)  # (V, B, 6)
    geometry = to_device(geometry, pixels.device)
    chunk = max(1, DENSE_BYTES // (4 * channels * height * views * size))
    for start in range(0, batch, chunk):
        part = slice(start, start + chunk)
        top, left, box_height, box_width, reverse_x, reverse_y = geometry[:, part].transpose(0, 1).unbind(-1)  # (b, V)
        across = resize_weights(left, box_width, reverse_x.bool(), size, width)  # (b, V, s, W)
        down = resize_weights(top, box_height, reverse_y.bool(), size, height)  # (b, V, s, H)
        flat = pixels[part].float().flatten(1, 2)  # (b, 3H, W)
        columns = flat @ across.flatten(1, 2).transpose(1, 2)  # (b, 3H, Vs)
        columns = columns.unflatten(2, (views, size)).unflatten(1, (channels, height))  # (b, 3, H, V, s)
        out[:, part] = (down[:, :, None] @ columns.permute(0, 3, 1, 2, 4)).transpose(0, 1)
    transposed = transpose.flatten().nonzero().flatten()
    if len(transposed):
        transposed = to_device(transposed, pixels.device)
        flat_out = out.flatten(0, 1)
        flat_out[transposed] = flat_out[transposed].transpose(-1, -2)
    return out


def resize_boxed(pixels: Tensor, box: Tensor, flip_x: Tensor, flip_y: Tensor, transpose: Tensor, size: int) -> Tensor:
    """Same as :func:`resize_dense`, crop by crop."""
    views, batch = box.shape[:2]
    out = pixels.new_empty((views, batch, pixels.shape[1], size, size), dtype=torch.float32)
    boxes, flags = box.tolist(), torch.stack([flip_x, flip_y, transpose], dim=-1).tolist()
    for row in range(batch):
        for view in range(views):
            out[view, row] = resize_one(pixels[row], boxes[view][row], flags[view][row], size)
    return out


def resize_one(tile: Tensor, box: Sequence[int], flags: Sequence[bool], size: int) -> Tensor:
    """Same as :func:`resize_dense`, for one crop of one tile.

    Args:
        tile: (3, H, W) uint8 or float on the CPU.
        box: Top, left, height, width.
        flags: Whether to flip horizontally, to flip vertically, and to transpose after the flips.
        size: Size of the result in px.

    Returns:
        (3, size, size) float32.
    """
    top, left, height, width = box
    flip_x, flip_y, transpose = flags
    crop = tile[None, :, top : top + height, left : left + width].float()
    crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]  # (3, s, s)
    flips = [axis for axis, wanted in ((-1, flip_x), (-2, flip_y)) if wanted]
    crop = crop.flip(flips) if flips else crop
    return crop.transpose(-1, -2) if transpose else crop


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to ``device`` without synchronising with the GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
