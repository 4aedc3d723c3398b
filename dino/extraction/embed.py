"""Features of tiles and grids, for extraction, evaluation, reports and the demo."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino import distributed, progress
from dino.environment import run_threaded
from dino.errors import ConfigError, DataError
from dino.models.backbone import Backbone
from dino.models.inputs import TILE_SIZE_PX
from dino.models.weights import LoadedBackbone
from dino.precision import autocast, casts_to_bf16, check_precision

CLS, CLS_MEAN, PATCHES = "cls", "cls+mean", "patches"
FEATURES = (CLS, CLS_MEAN, PATCHES)
ATTENTION = "attention"  # of the cls token in the last block
ROLLOUT = "rollout"  # of its attention through all blocks
CACHED_VALUES = 2**19  # token values that a CPU core processes at a time: they fit into its cache

Normalise = Callable[[Tensor], Tensor]
Baseline = Callable[[Tensor], Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")


def check_settings(precision: str, batch_size: int, num_workers: int, device: torch.device) -> None:
    """Check the settings that every command which embeds has.

    Raises:
        ConfigError: If one is invalid, or the device does not support the precision.
    """
    check_precision(precision, device)
    if batch_size < 1 or num_workers < 0:
        raise ConfigError(
            f"expected batch_size of at least 1 and num_workers of at least 0, found {batch_size} and {num_workers}"
        )


def normaliser(
    mean: Sequence[float], std: Sequence[float], patch_size: int, size_px: tuple[int, int] | None = None
) -> Normalise:
    """A function that normalises 8-bit tiles for a network. The network gets the whole tile, not a centre crop.

    Args:
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel.
        patch_size: Patch size in px; tiles whose sides are not multiples of it are resized to the nearest multiple.
        size_px: ``(height, width)`` that every tile is resized to (timm models: their training size); None keeps
            the size.

    Returns:
        A function of uint8 ``(B, 3, H, W)`` to normalised float ``(B, 3, h, w)``, on the device of its input. Resizing
        is antialiased bicubic.
    """

    def normalise(pixels: Tensor) -> Tensor:
        values = pixels.to(torch.float32) / 255
        height, width = (max(patch_size, round(side / patch_size) * patch_size) for side in values.shape[-2:])
        target = size_px or (height, width)
        if target != tuple(values.shape[-2:]):
            values = F.interpolate(values, target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        channels = (torch.tensor(v, device=values.device)[:, None, None] for v in (mean, std))
        return (values - next(channels)) / next(channels)

    return normalise


def normaliser_of(loaded: LoadedBackbone) -> Normalise:
    """The normalisation that a loaded model expects: that of its transform; the identity for feature grids."""
    transform = loaded.transform
    if transform is None:
        return identity
    size = transform.input_size_px
    patch_size = loaded.backbone.spec.patch_size
    return normaliser(transform.mean, transform.std, patch_size, (size, size) if size else None)


def at_input_size(loaded: LoadedBackbone, input_size: int | None) -> LoadedBackbone:
    """The model with the size in px that it resizes tiles to; says how many tokens that gives where they are many.

    Args:
        loaded: The model. One that sees tiles at their own size, or feature grids, is returned as it is.
        input_size: The size, rounded to a multiple of the model's patch size; None for the model's own.

    Raises:
        ConfigError: If the size is smaller than half a patch.
    """
    transform, patch_size = loaded.transform, loaded.backbone.spec.patch_size
    if transform is None or transform.input_size_px is None:
        return loaded
    size = transform.input_size_px
    if input_size is not None:
        size = round(input_size / patch_size) * patch_size
        if size < patch_size:
            raise ConfigError(f"expected input_size of at least one patch of {patch_size} px, found {input_size}")
    if size > TILE_SIZE_PX:
        fitting = TILE_SIZE_PX // patch_size * patch_size
        progress.say(
            f"{loaded.source} resizes tiles to {size} px: {(size // patch_size) ** 2:,} tokens each "
            f"(input_size={fitting}: {(fitting // patch_size) ** 2:,} tokens, and other features)"
        )
    return replace(loaded, transform=replace(transform, input_size_px=size))


def identity(grids: Tensor) -> Tensor:
    """Return the input: feature grids are not normalised."""
    return grids


def embed(
    backbone: Backbone, batches: Iterable[Tensor], normalise: Normalise, device: torch.device, precision: str
) -> Tensor:
    """Features (the cls token after the final norm) of every item of ``batches``.

    Args:
        backbone: Patch or region backbone.
        batches: uint8 ``(B, 3, H, W)`` or float ``(B, D, h, w)`` tensors on the CPU; batches may differ in size.
        normalise: :func:`normaliser`, or :func:`identity`.
        device: Device to compute on; the backbone is moved to it.
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
    backbone: Backbone,
    batches: Iterable[Tensor],
    normalise: Normalise,
    device: torch.device,
    precision: str,
    features: str = CLS,
) -> Generator[Tensor, None, None]:
    """:func:`embed` batch by batch, for callers that write features while others are computed.

    The backbone's training mode and dtype are restored when the iteration ends or the generator is closed.

    Args:
        backbone: As in :func:`embed`, as are the following three.
        batches: See there.
        normalise: See there.
        device: See there.
        precision: See there.
        features: One of :data:`FEATURES`: the cls token; with the mean of the patch tokens concatenated to it (Virchow,
            Vorontsov et al. 2024, arXiv 2309.07778); or with all patch tokens. Or ``attention`` or ``rollout``.

    Yields:
        Float32 on the CPU for each batch: ``(B, D)``, for ``cls+mean`` ``(B, 2 D)``, for ``patches``
        ``(B, 1 + N, D)`` with the cls token first, then the patch tokens row-major. All are after the final norm. For
        ``attention``, ``(B, heads * N)``: that of the cls token over the patch tokens in the last block; for
        ``rollout``, ``(B, N)``: that through all blocks.
    """
    check_precision(precision, device)
    with _inference(backbone, device, precision) as dtype:

        def forward(batch: Tensor) -> Tensor:
            with torch.inference_mode(), autocast(precision, device):
                inputs = normalise(batch.to(device, non_blocking=True)).to(dtype)
                return _features(backbone, inputs, features).float().cpu()

        for batch in batches:
            threaded = device.type == "cpu" and len(batch) >= torch.get_num_threads()
            found = _threaded(forward, batch, _chunk_size(backbone, batch)) if threaded else forward(batch)
            if not found.isfinite().all():
                raise DataError("expected finite features, found NaN or infinity; check the model and the grids")
            yield found.clone()  # tensors created in inference mode cannot be used for training


def _features(backbone: Backbone, inputs: Tensor, features: str) -> Tensor:
    """What :func:`embed_batches` yields of a batch, on its device and in the dtype of the network."""
    if features == CLS:
        return backbone(inputs, cls_only=True).cls  # (B, D)
    if features == ATTENTION:
        return backbone.last_attention(inputs).flatten(1)  # (B, heads * N)
    if features == ROLLOUT:
        return backbone.attention_rollout(inputs)  # (B, N)
    tokens = backbone(inputs)
    assert tokens.patches is not None
    if features == PATCHES:
        return torch.cat([tokens.cls[:, None], tokens.patches], 1)  # (B, 1 + N, D)
    return torch.cat([tokens.cls.float(), tokens.patches.float().mean(1)], 1)  # (B, 2 D)


@dataclass(frozen=True)
class FileEmbedder:
    """Features of files: each process reads and embeds every ``world_size``-th file, and gets the features of all.

    Attributes:
        paths: The files, the same on every process.
        read: Reads one: uint8 ``(3, H, W)`` or float ``(D, h, w)``.
        normalise: :func:`normaliser`, or :func:`identity`.
        device: Where to compute.
        precision: ``bf16`` (autocast), ``fp32`` or ``fp64``.
        batch_size: Files per forward pass.
        workers: Threads that read files.
    """

    paths: Sequence[Path]
    read: Callable[[Path], Tensor]
    normalise: Normalise
    device: torch.device
    precision: str
    batch_size: int = 64
    workers: int = 2

    @property
    def own_paths(self) -> Sequence[Path]:
        """The files that this process reads."""
        return self.paths[distributed.rank() :: distributed.world_size()]

    def embed(
        self, backbone: Backbone, *baselines: Baseline, advance: Callable[[int], object] = lambda count: None
    ) -> list[Tensor]:
        """Features of all files by a backbone, and by functions that need no network; every file is read once.

        Args:
            backbone: Patch or region backbone.
            baselines: Each maps a batch as it was read to ``(B, d)`` features.
            advance: Called with the number of files of each batch.

        Returns:
            ``(N, D)`` float32 on the CPU of the backbone, then of each baseline.

        Raises:
            DataError: On every process, if one of them cannot read a file or a feature is not finite.
        """
        parts = distributed.gather(self._own_features(backbone, baselines, advance))  # of each process
        for part in parts:
            if isinstance(part, DataError):
                raise part
        features = [part for part in parts if not isinstance(part, DataError)]
        return [self._interleave(list(column)) for column in zip(*features, strict=True)]

    def _own_features(
        self, backbone: Backbone, baselines: Sequence[Baseline], advance: Callable[[int], object]
    ) -> list[Tensor] | DataError:
        """Features of this process's files; an error is returned, because the other processes wait for a result."""
        found: list[list[Tensor]] = [[] for _ in baselines]
        inputs = read_ahead(self.read, self.own_paths, self.workers, 2 * self.batch_size)

        def watched() -> Iterator[Tensor]:
            for batch in batches(inputs, self.batch_size):
                for values, baseline in zip(found, baselines, strict=True):
                    values.append(baseline(batch))
                yield batch
                advance(len(batch))

        try:
            features = embed(backbone, watched(), self.normalise, self.device, self.precision)
        except DataError as error:
            return error
        return [features, *(torch.cat(values) if values else torch.empty(0, 0) for values in found)]

    def _interleave(self, parts: Sequence[Tensor]) -> Tensor:
        """The features of all files in the order of :attr:`paths`, from those of each process."""
        whole = parts[0].new_empty(len(self.paths), max(part.shape[1] for part in parts))
        for rank, part in enumerate(parts):
            if len(part):
                whole[rank :: len(parts)] = part
        return whole


def _chunk_size(backbone: Backbone, batch: Tensor) -> int:
    """Number of items that a CPU core processes at a time: they fit into its cache, and every core has work."""
    tokens = batch.shape[-2] * batch.shape[-1] // backbone.spec.patch_size**2
    fitting = max(1, CACHED_VALUES // max(1, tokens * backbone.embed_dim))
    return min(fitting, math.ceil(len(batch) / torch.get_num_threads()))


def _threaded(forward: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Tensor:
    """``forward(batch)`` in chunks, one at a time on each core, so that cores do not synchronise in every operation."""
    chunks = list(enumerate(batch.split(size)))
    features: dict[int, Tensor] = {}

    def work(chunk: tuple[int, Tensor]) -> None:
        number, items = chunk
        features[number] = forward(items)

    run_threaded(work, chunks)
    return torch.cat([features[number] for number, _ in chunks])


@contextmanager
def _inference(backbone: Backbone, device: torch.device, precision: str) -> Iterator[torch.dtype]:
    """The backbone on ``device`` in eval mode and with the dtype of ``precision``; both are restored afterwards."""
    modes = {module: module.training for module in backbone.modules()}
    before = next(backbone.parameters()).dtype
    backbone.to(device).eval()
    if precision == "fp64":
        backbone.double()
    exact = {p: p.data for p in _cast_by_autocast(backbone)} if casts_to_bf16(precision, device) else {}
    dtype = next(backbone.parameters()).dtype
    for parameter, values in exact.items():
        parameter.data = values.bfloat16()  # once, instead of by autocast for every batch
    try:
        yield dtype
    finally:
        for parameter, values in exact.items():
            parameter.data = values
        backbone.to(before)  # exact: float64 represents every float32
        for module, training in modes.items():
            module.training = training


def _cast_by_autocast(backbone: Backbone) -> list[nn.Parameter]:
    """Weights and biases of the layers that compute in bf16 under autocast."""
    layers = (layer for layer in backbone.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int = 64
) -> Generator[Result, None, None]:
    """``map(read, items)`` in order, with up to ``ahead`` results read in advance by threads.

    Image decoders and openslide release the GIL, so threads are as fast as processes and need not copy pixels.

    Args:
        read: Reads one item; its exception is raised when the result is due.
        items: Items to read.
        workers: Number of threads; 0 reads in the calling thread.
        ahead: Maximum number of results in memory in addition to the one yielded.
    """
    if workers < 1:
        yield from map(read, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(read, item) for item in islice(rest, max(ahead, workers)))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def batches(tensors: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Stack consecutive tensors of one shape: at most ``size``, fewer where the shape changes.

    Args:
        tensors: Images ``(3, H, W)`` or grids ``(D, h, w)``.
        size: Batch size.

    Yields:
        ``(B, ...)`` in the order of ``tensors``.
    """
    pending: list[Tensor] = []
    for tensor in tensors:
        if pending and (len(pending) == size or tensor.shape != pending[0].shape):
            yield torch.stack(pending)
            pending = []
        pending.append(tensor)
    if pending:
        yield torch.stack(pending)
