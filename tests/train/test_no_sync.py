"""A step never makes the host wait for the device.

The step runs on torch's ``meta`` device, whose tensors have a shape and no values: whatever would have to wait for a
value there (``item``, ``nonzero``, a copy back) fails, as would an operation on tensors of two devices. Copies to the
device must be asynchronous; a dispatch mode sees to it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino import objectives as seams
from dino.config.schema import DistillConfig, ModelConfig, ObjectiveConfig, OptimConfig, PatchAugConfig
from dino.crops import grids as grid_crops
from dino.crops import images as image_crops
from dino.crops import resample
from dino.crops.grids import GridCrops
from dino.crops.images import ImageCrops
from dino.data.loader import Batch, DropPath
from dino.models.backbone import BackboneSpec, build_backbone
from dino.models.transforms import TRANSFORMS
from dino.models.weights import LoadedBackbone, LoadReport
from dino.objectives import FrozenNetwork, Objective
from dino.objectives.dino import DINO
from dino.objectives.features import FrozenBackbone
from dino.objectives.ibot import IBOT
from dino.objectives.regression import Regression
from dino.objectives.spread import KDE, KoLeo
from dino.signals import StopSignal
from dino.train import loop
from dino.train.distill import Network, SelfDistillation
from dino.train.loop import Trainer
from dino.train.optimizer import Cosine, Length, Ramp, Schedules, build_optimizer

DEVICE = torch.device("meta")
K, DIM, DEPTH, BATCH = 16, 32, 2, 6


class Waits(AssertionError):
    """The host would wait."""


class NoWaiting(TorchDispatchMode):
    """Refuses copies between host and device, but those to the device that are asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.inside_to_device = False
        self.crossings = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim}
        made = {x.device.type for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        if "cpu" in given and "meta" in given | made:
            asynchronous = kwargs.get("non_blocking") or any(x is True for x in args) or self.inside_to_device
            if "copy" not in str(func) or not asynchronous:
                raise Waits(f"{func} takes values of the host to the device, and waits")
            self.crossings += 1
        if "meta" in given and ("cpu" in made or "nonzero" in str(func)):
            raise Waits(f"{func} waits for the device")
        return result

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Stands in for :func:`dino.crops.resample.to_device`, which pins memory: that needs a GPU."""
        assert tensor.device.type == "cpu"
        self.inside_to_device = True
        try:
            return tensor.to(device)
        finally:
            self.inside_to_device = False


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> NoWaiting:
    mode = NoWaiting()
    for module in (resample, image_crops, grid_crops, loop, seams):
        monkeypatch.setattr(module, "to_device", mode.to_device)
    # torch knows neither autocast nor fused optimizers for this device; both are the same for it as without.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    return mode


def image_batch() -> tuple[ImageCrops, Batch]:
    """Tiles with every operation on some of the samples, and none on others."""
    aug = PatchAugConfig(
        global_crops_size=32,
        local_crops_size=16,
        local_crops_number=2,
        vertical_flip=0.5,
        quarter_turns=True,
        hed_jitter=0.5,
        solarize=0.5,
    )
    crops = ImageCrops(aug, (0.5,) * 3, (0.2,) * 3)
    return crops, batch(crops, torch.empty(BATCH, 3, 48, 48, dtype=torch.uint8), (48, 48))


def grid_batch() -> tuple[GridCrops, Batch]:
    crops = GridCrops((6, 6))
    return crops, batch(crops, torch.empty(BATCH, 6 * 6, 10), (6, 6))


def batch(crops: ImageCrops | GridCrops, inputs: torch.Tensor, size: tuple[int, int]) -> Batch:
    drawn = [crops.draw(size, None, np.random.default_rng(i)) for i in range(BATCH)]
    views = DropPath(0.3, DEPTH, sum(crops.groups))
    keep = torch.from_numpy(np.stack([views.draw(np.random.default_rng(i)) for i in range(BATCH)]))
    parameters = {key: torch.from_numpy(np.stack([one[key] for one in drawn])) for key in drawn[0]}
    masks = crops.masks(ObjectiveConfig(mask_ratio=[0.3, 0.5]), 16)
    mask = torch.from_numpy(np.stack([masks(one, None, np.random.default_rng(i)) for i, one in enumerate(drawn)]))
    return Batch(inputs, torch.arange(BATCH), parameters, keep, [""] * BATCH, [None] * BATCH, mask=mask)


def objectives(targets: str) -> list[Objective]:
    settings, temp = ModelConfig(out_dim=K, hidden_dim=24, bottleneck_dim=8), Ramp(0.04, 0.07, 3)
    weights = ObjectiveConfig(ibot=1.0, regression=1.0, targets=targets)
    masked = [IBOT(settings, weights, temp, seed=0), Regression(weights, seed=0)]
    return [DINO(settings, temp, 0, targets), *masked, KoLeo(0.1, 2, BATCH), KDE(0.1, 10.0, 2, BATCH)]


def frozen_network() -> FrozenNetwork:
    """Another patch size, width and normalization than the student's."""
    backbone = build_backbone(BackboneSpec("vit:dim=48,depth=1,heads=2", "patch", 3, (28, 28), 14), seed=1)
    loaded = LoadedBackbone(backbone, TRANSFORMS["hipt"], "patch", LoadReport(0, [], []), "teacher")
    return FrozenBackbone(loaded, DistillConfig(patch=1.0), TRANSFORMS["imagenet"], ModelConfig(patch_size=16))


def trainer(
    make: Callable[[], tuple[Any, Batch]],
    checkpointing: bool,
    parts: list[Objective],
    frozen: FrozenNetwork | None = None,
) -> Trainer:
    crops, one = make()
    if not any(objective.masks for objective in parts):
        one.mask = None
    size, patch = crops.sizes[0], 16 if isinstance(crops, ImageCrops) else 1
    level, side = ("patch", (size, size)) if isinstance(crops, ImageCrops) else ("region", size)
    input_dim = 3 if isinstance(crops, ImageCrops) else one.inputs.shape[-1]
    spec = BackboneSpec(f"vit:dim={DIM},depth={DEPTH},heads=2", level, input_dim, side, patch)

    def network() -> Network:
        backbone = build_backbone(spec, seed=0)
        backbone.checkpointing = checkpointing
        return Network(backbone, parts).to(DEVICE)

    model = SelfDistillation(network(), network(), [objective.to(DEVICE) for objective in parts], DEVICE, frozen)
    return Trainer(
        model=model,
        optimizer=build_optimizer(OptimConfig(), model.student),
        crops=crops,
        batches=lambda first, last: [one] * 2 * (last - first),
        accumulation=2,
        schedules=Schedules(Cosine(1, 0, 8), Cosine(0, 1, 8), Cosine(1, 1, 8), 1),
        length=Length(8, 2 * BATCH, 4),
        device=DEVICE,
        precision="fp32",
        clip_grad=3.0,
        clip_mode="per_parameter",
        largest_quarantine=0,
    )


@pytest.mark.parametrize("also_dino", [False, True])
def test_a_step_that_distils_a_frozen_network_never_waits(also_dino: bool, no_waiting: NoWaiting) -> None:
    frozen = frozen_network()
    parts = frozen.objectives(seed=0) + objectives("centring")[:also_dino]
    training = trainer(image_batch, False, parts, frozen.to(DEVICE))
    batches = iter(training.batches(0, 3))
    for step in range(3):
        with no_waiting if step else nullcontext():
            training._step(batches, StopSignal())
    assert training.step == 3


@pytest.mark.parametrize("make", [image_batch, grid_batch])
@pytest.mark.parametrize(("parts", "checkpointing"), [("dino", True), ("centring", False), ("sinkhorn", True)], ids=str)
def test_a_step_never_waits(make: Any, parts: str, checkpointing: bool, no_waiting: NoWaiting) -> None:
    chosen = objectives("centring")[:1] if parts == "dino" else objectives(parts)
    training = trainer(make, checkpointing, chosen)
    batches = iter(training.batches(0, 3))
    for step in range(3):
        with no_waiting if step else nullcontext():  # the first one fills caches: matrices of positions, constants
            training._step(batches, StopSignal())
    assert training.step == 3 and no_waiting.crossings >= 8


def test_what_waits_is_found(no_waiting: NoWaiting) -> None:
    there, here = torch.empty(3, device=DEVICE), torch.ones(3)
    with no_waiting:
        for wait in (
            lambda: there.sum().item(),
            lambda: float(there.sum()),
            lambda: bool(there.sum() > 0),
            there.nonzero,
            lambda: there[there > 0],
            there.tolist,
            there.cpu,
            lambda: here.to(DEVICE),
            lambda: there.copy_(here),
            lambda: there + here,
        ):
            with pytest.raises((Waits, RuntimeError, NotImplementedError)):
                wait()
        here.to(DEVICE, non_blocking=True)
        here.nonzero()
