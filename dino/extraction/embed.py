"""The one way in which pixels and grids become features: for extraction, kNN, reports and the demo alike."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino.environment import run_threaded
from dino.errors import ConfigError, DataError
from dino.models.backbone import Backbone

__all__ = ["Normalise", "embed", "embed_batches", "grids_as_they_are", "normaliser"]

PRECISIONS = ("bf16", "fp32", "fp64")
CACHED_VALUES = 2**19  # on a CPU, of the tokens that a core takes through the network at a time

Normalise = Callable[[Tensor], Tensor]


def normaliser(
    mean: Sequence[float], std: Sequence[float], patch_size: int, size_px: tuple[int, int] | None = None
) -> Normalise:
    """Make the step from 8-bit tiles to what a network takes. It sees the whole tile, never a centre crop.

    Args:
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel.
        patch_size: Side of a token; tiles whose sides are no multiple of it are resized to the nearest one.
        size_px: ``(height, width)`` that every tile is resized to (timm models: what they were trained at); None
            leaves the size as it is.

    Returns:
        A function of uint8 ``(B, 3, H, W)`` to normalised float ``(B, 3, h, w)``, on the device of its input. Resizing
        is antialiased bicubic.
    """

    def normalise(pixels: Tensor) -> Tensor:
        values = pixels.to(torch.float32) / 255
        height, width = (max(patch_size, round(side / patch_size) * patch_size) for side in values.shape[-2:])
        wanted = size_px or (height, width)
        if wanted != tuple(values.shape[-2:]):
            values = F.interpolate(values, wanted, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        channels = (torch.tensor(v, device=values.device)[:, None, None] for v in (mean, std))
        return (values - next(channels)) / next(channels)

    return normalise


def grids_as_they_are(grids: Tensor) -> Tensor:
    """The ``normalise`` of feature grids: none."""
    return grids


def embed(
    backbone: Backbone, batches: Iterable[Tensor], normalise: Normalise, device: torch.device, precision: str
) -> Tensor:
    """Features (the cls token after the final norm) of every item of ``batches``.

    Args:
        backbone: Patch or region backbone.
        batches: uint8 ``(B, 3, H, W)`` or float ``(B, D, h, w)`` tensors on the CPU; batches may differ in size.
        normalise: :func:`normaliser`, or :func:`grids_as_they_are`.
        device: Where to compute; the backbone is moved there.
        precision: ``bf16`` (autocast), ``fp32`` or ``fp64``.

    Returns:
        ``(N, D)`` float32 on the CPU.

    Raises:
        ConfigError: If the precision is unknown, or the batches do not fit the backbone.
        DataError: If a feature is not finite.
    """
    features = list(embed_batches(backbone, batches, normalise, device, precision))
    return torch.cat(features) if features else torch.empty(0, backbone.embed_dim)


def embed_batches(
    backbone: Backbone, batches: Iterable[Tensor], normalise: Normalise, device: torch.device, precision: str
) -> Generator[Tensor, None, None]:
    """:func:`embed`, batch by batch, for who writes while it computes.

    The backbone gets its train or eval mode and its number format back when the iteration ends, or is closed.

    Yields:
        ``(B, D)`` float32 on the CPU for each batch.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"expected precision bf16, fp32 or fp64, found '{precision}'")
    with _at_rest(backbone, device, precision) as number_format:

        def forward(batch: Tensor) -> Tensor:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                inputs = normalise(batch.to(device, non_blocking=True)).to(number_format)
                return backbone(inputs, cls_only=True).cls.float().cpu()  # (B, D)

        for batch in batches:
            shared = device.type == "cpu" and len(batch) >= torch.get_num_threads()
            features = _in_shares(forward, batch, _share(backbone, batch)) if shared else forward(batch)
            if not features.isfinite().all():
                raise DataError("expected finite features, found NaN or infinity; the model or a grid has broken down")
            yield features.clone()  # an ordinary tensor: one made in inference mode could not be trained on later


def _share(backbone: Backbone, batch: Tensor) -> int:
    """How many items a core takes at a time: few enough for its cache, and no more than keep every core at work."""
    tokens = batch.shape[-2] * batch.shape[-1] // backbone.spec.patch_size**2
    fitting = max(1, CACHED_VALUES // max(1, tokens * backbone.embed_dim))
    return min(fitting, math.ceil(len(batch) / torch.get_num_threads()))


def _in_shares(forward: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Tensor:
    """``forward(batch)``, so many items at a time on each core: cores do not wait for each other in every operation."""
    shares = list(enumerate(batch.split(size)))
    features: dict[int, Tensor] = {}

    def work(share: tuple[int, Tensor]) -> None:
        number, items = share
        features[number] = forward(items)

    run_threaded(work, shares)
    return torch.cat([features[number] for number, _ in shares])


@contextmanager
def _at_rest(backbone: Backbone, device: torch.device, precision: str) -> Iterator[torch.dtype]:
    """The backbone on ``device`` in eval mode and in the precision asked for; all put back afterwards."""
    modes = {module: module.training for module in backbone.modules()}
    before = next(backbone.parameters()).dtype
    backbone.to(device).eval()
    if precision == "fp64":
        backbone.double()
    exact = {p: p.data for p in _cast_by_autocast(backbone)} if precision == "bf16" else {}
    number_format = next(backbone.parameters()).dtype
    for parameter, values in exact.items():
        parameter.data = values.bfloat16()  # as autocast would for every batch anew
    try:
        yield number_format
    finally:
        for parameter, values in exact.items():
            parameter.data = values
        backbone.to(before)  # exact: every float32 is a float64
        for module, training in modes.items():
            module.training = training


def _cast_by_autocast(backbone: Backbone) -> list[nn.Parameter]:
    """Weights and biases of the layers that compute in bf16 under autocast."""
    layers = (layer for layer in backbone.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
