"""Distillation of a frozen network, such as a foundation model: the student predicts its features of the same crops.

A linear projection maps the student's tokens to the frozen network's width (Romero et al. 2015, "FitNets", arXiv
1412.6550). The distances are those of Ranzinger et al. 2024, "AM-RADIO", arXiv 2312.06709, which distils vision
foundation models of several widths and patch sizes in this way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dino.config.schema import DistillConfig, ModelConfig
from dino.crops.parameters import GLOBAL_VIEWS
from dino.errors import ConfigError
from dino.models.backbone import Tokens
from dino.models.checkpoint import fingerprint
from dino.models.head import DINOHead, init_linear, load_head
from dino.models.transforms import Transform
from dino.models.weights import LoadedBackbone, expect_level, load_backbone_file
from dino.objectives import Condition, FrozenNetwork, Masked, Objective, Outputs, Terms
from dino.objectives.dino import DINO


class FrozenBackbone(FrozenNetwork):
    """A backbone that is never trained, for inputs that are normalized for another one.

    Called as a :class:`~dino.models.backbone.Backbone` is, it undoes the other's normalization, resizes the images to a
    size that it takes, and normalizes them its own way, all on the device of its input.

    Args:
        loaded: The backbone and its transform.
        settings: Weights of the objectives, their distance, and the input size.
        transform: Normalization of the inputs: the student's.
        student: Its patch size, onto whose grid patch tokens are resampled, and its temperatures.
        head: Its projection head, which ``distill.dino`` needs.

    Attributes:
        origin: What a run's identity and checkpoints record of it: fingerprint of the weights, and transform.

    Raises:
        CheckpointError: If it is no model of images.
        ConfigError: If a setting is out of range, or nothing is to be learned from it.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        loaded: LoadedBackbone,
        settings: DistillConfig,
        transform: Transform,
        student: ModelConfig,
        head: DINOHead | None = None,
    ) -> None:
        super().__init__()
        expect_level(loaded, "patch")
        _check(settings, loaded, head)
        own = loaded.transform
        assert own is not None  # of every model of images
        self.backbone, self.settings = loaded.backbone.eval().requires_grad_(False), settings
        self.head = head.requires_grad_(False) if head else None
        self.student, self.patch_size = student, student.patch_size
        self.spec, self.embed_dim = self.backbone.spec, self.backbone.embed_dim
        self.input_size, self.native_size = settings.input_size, settings.input_size or own.input_size_px
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in (transform.mean, transform.std, own.mean, own.std)
        )
        # ((x * std + mean) - own_mean) / own_std = x * scale + shift
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        self.is_same = (transform.mean, transform.std) == (own.mean, own.std)
        weights = fingerprint(head, loaded.fingerprint) if head else loaded.fingerprint
        self.origin: Mapping[str, Any] = {"teacher_weights": weights, "teacher_transform": own.to_dict()}

    @classmethod
    def load(cls, source: str, settings: DistillConfig, transform: Transform, student: ModelConfig) -> "FrozenBackbone":
        """Load the weights; further arguments and errors are those of the class.

        Args:
            source: As in :func:`~dino.models.weights.load_backbone_file`, whose errors are raised too.
            settings: With ``arch`` and ``transform`` of the source.
            transform: Normalization of the inputs.
            student: Settings of the student.
        """
        loaded = load_backbone_file(source, settings.arch, settings.transform)
        head = load_head(Path(loaded.source)) if settings.dino > 0 else None
        return cls(loaded, settings, transform, student, head)

    def forward(self, x: Tensor, cls_only: bool = False) -> Tokens:
        """Tokens of whole tiles, or of crops, as ``dino evaluate`` computes them: at the input size of the transform.

        Args:
            x: (B, 3, H, W) images, normalized for the student.
            cls_only: Return the cls token only.
        """
        return self._tokens(x, self.native_size, cls_only)

    def objectives(self, seed: int) -> list[Objective]:
        """The objectives with a weight; ``seed`` is that of the initial weights of their heads."""
        settings, arguments = self.settings, (LOSSES[self.settings.loss], self.embed_dim)
        built: list[Objective] = [
            ClsFeatures(settings.cls, *arguments, seed),
            PatchFeatures(settings.patch, *arguments, seed + 1),
        ]
        if self.head is not None:
            built.append(FrozenDINO(self.student, self.head, seed + 2, settings.dino))
        return [objective for objective in built if objective.weight > 0]

    def targets(self, views: Tensor) -> dict[str, Tensor]:
        """Features of the global views, by the name of the objective that predicts them.

        Args:
            views: (G, B, 3, h, w), normalized for the student.

        Returns:
            ``distill_cls`` (G, B, D), ``distill_patch`` (G, B, N, D) on the student's grid if it has a weight, and
            ``distill_dino`` (G, B, K) if it has one; fp32 or fp64.
        """
        tokens = self._tokens(views.flatten(0, 1), self.input_size, cls_only=self.settings.patch == 0)
        found = {ClsFeatures.name: _exact(tokens.cls).unflatten(0, views.shape[:2])}
        if tokens.patches is not None:
            height, width = (side // self.patch_size for side in views.shape[-2:])
            patches = _resampled(_exact(tokens.patches), self._grid(views, self.input_size), (height, width))
            found[PatchFeatures.name] = patches.unflatten(0, views.shape[:2])
        if self.head is not None:
            found[FrozenDINO.name] = self.head(tokens.cls).unflatten(0, views.shape[:2])
        return found

    def _size(self, x: Tensor, size: int | None) -> tuple[int, int]:
        """Input size (height, width): ``size``, or that of ``x`` rounded to a multiple of the patch size."""
        patch = self.spec.patch_size
        height, width = (size or max(patch, round(side / patch) * patch) for side in x.shape[-2:])
        return height, width

    def _grid(self, x: Tensor, size: int | None) -> tuple[int, int]:
        height, width = self._size(x, size)
        return height // self.spec.patch_size, width // self.spec.patch_size

    def _tokens(self, x: Tensor, size: int | None, cls_only: bool) -> Tokens:
        target = self._size(x, size)
        if target != tuple(x.shape[-2:]):
            x = F.interpolate(x, target, mode="bicubic", antialias=True, align_corners=False)
        if not self.is_same:
            x = x * self.scale.to(x.dtype) + self.shift.to(x.dtype)
        return self.backbone(x, cls_only=cls_only)


class _Features(Objective):
    """Base of the objectives that predict features of a frozen network.

    Args:
        weight: Factor of the loss.
        distance: Of predicted and frozen features, (..., D); a scalar.
        dim: Width D of the frozen network.
        seed: Seed of the projection's initial weights.
    """

    teacher_head = False
    reads_teacher = False

    def __init__(self, weight: float, distance: Callable[[Tensor, Tensor], Tensor], dim: int, seed: int) -> None:
        super().__init__(weight)
        self.distance, self.dim, self.seed = distance, dim, seed

    def build_head(self, embed_dim: int) -> nn.Module:
        """The linear projection to the width of the frozen network."""
        with torch.random.fork_rng(devices=[]):
            head = nn.Linear(embed_dim, self.dim)
        init_linear(head, torch.Generator().manual_seed(self.seed))
        return head

    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        """The distance, a mean over views, samples and tokens, and the mean cosine.

        Args:
            student: With predicted features, (G, B, ..., D).
            teacher: With the frozen network's features of the same views under the same name.
            values: Nothing is scheduled.
        """
        predicted, target = student.logits[self.name], teacher.logits[self.name]
        with torch.autocast(predicted.device.type, enabled=False):
            predicted = _exact(predicted)
            cosine = F.cosine_similarity(predicted.detach(), target, dim=-1).mean()
            return Terms({self.name: self.distance(predicted, target)}, {f"{self.name}_cosine": cosine})


class ClsFeatures(_Features):
    """The student's cls token predicts that of the frozen network, view by view."""

    name = "distill_cls"
    head = "distill_cls_head"

    @staticmethod
    def project(head: nn.Module, tokens: Sequence[Tokens], masked: Masked | None) -> Tensor:
        """Predicted features of the global views: (G, B, D)."""
        return head(tokens[0].cls[:GLOBAL_VIEWS])


class PatchFeatures(_Features):
    """The student's patch tokens predict those of the frozen network at the same places."""

    name = "distill_patch"
    head = "distill_patch_head"
    cls_only = False

    @staticmethod
    def project(head: nn.Module, tokens: Sequence[Tokens], masked: Masked | None) -> Tensor:
        """Predicted features of the global views: (G, B, N, D)."""
        assert tokens[0].patches is not None
        return head(tokens[0].patches[:GLOBAL_VIEWS])


class FrozenDINO(DINO):
    """DINO's cross-entropy with a frozen teacher: its head, its prototypes, and a centre of its own.

    DINOv2 distils its smaller models in this way (Oquab et al. 2024, arXiv 2304.07193, section 5). The temperature is
    ``model.teacher_temp`` throughout, because the teacher does not change.

    Args:
        settings: Temperatures, and momentum of the centre.
        head: The teacher's; the student's has the same shape, but for its input.
        seed: Seed of the initial weights of the student's head.
        weight: Factor of the loss.
    """

    name = "distill_dino"
    head = "distill_dino_head"
    teacher_head = False
    reads_teacher = False
    warnings: ClassVar[Mapping[str, Condition]] = {}  # those of DINO are about a teacher that changes

    def __init__(self, settings: ModelConfig, head: DINOHead, seed: int, weight: float) -> None:
        first, last = next(head.mlp.parameters()), head.last_layer.weight_v
        (hidden_dim, _), (out_dim, bottleneck_dim) = first.shape, last.shape
        shape = replace(settings, out_dim=out_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
        super().__init__(shape, lambda step: settings.teacher_temp, seed, weight=weight)

    def scheduled(self, step: int) -> dict[str, float]:
        """Nothing: the temperature is constant."""
        return {}

    def forward(self, student: Outputs, teacher: Outputs, values: Mapping[str, float]) -> Terms:
        """Loss and entropy of the targets, as :meth:`DINO.forward`, under names of their own."""
        losses, diagnostics = super().forward(student, teacher, {"teacher_temp": self.teacher_temp(0)})
        return Terms({self.name: losses[DINO.name]}, {f"{self.name}_entropy": diagnostics["teacher_entropy"]})

    def log_values(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Loss and entropy relative to ln K."""
        own = {"loss/dino": numbers[f"loss/{self.name}"], "teacher_entropy": numbers[f"{self.name}_entropy"]}
        found = super().log_values(own)
        return {
            f"{self.name}_relative": found["loss_relative"],
            f"{self.name}_entropy_relative": found["teacher_entropy_relative"],
        }


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """``1 - cos(predicted, target)``, a mean over all vectors.

    Args:
        predicted: (..., D).
        target: (..., D).
    """
    return 1 - F.cosine_similarity(predicted, target, dim=-1).mean()


def smooth_l1_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 distance (beta 1) to the layer-normalized target, a mean over all elements.

    Models differ in the scale of their features; after layer normalization without weights (as in data2vec, Baevski et
    al. 2022, arXiv 2202.03555) those of a vector have mean 0 and variance 1.

    Args:
        predicted: (..., D).
        target: (..., D).
    """
    return F.smooth_l1_loss(predicted, F.layer_norm(target, target.shape[-1:]))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine_distance, "smooth_l1": smooth_l1_distance}


def _exact(values: Tensor) -> Tensor:
    """In fp32, or fp64 if it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _resampled(patches: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Patch tokens (B, N, D) of a grid (h, w) on another one, by antialiased bilinear interpolation."""
    if grid == wanted:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
    maps = F.interpolate(maps, wanted, mode="bilinear", antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2)  # (B, h' w', D)


def _check(settings: DistillConfig, loaded: LoadedBackbone, head: DINOHead | None) -> None:
    """Raise ConfigError for a setting that is out of range or does not fit."""
    weights = {name: getattr(settings, name) for name in ("cls", "patch", "dino")}
    for name, weight in weights.items():
        if weight < 0:
            raise ConfigError(f"expected distill.{name} of at least 0, found {weight}")
    if not any(weights.values()):
        raise ConfigError(f"teacher={loaded.source}: nothing is learned from it: set distill.cls or distill.patch")
    if settings.dino > 0 and head is None:
        raise ConfigError(
            f"teacher={loaded.source}: distill.dino needs its projection head, found none: name a run or a checkpoint "
            "with one (exports and timm models have none), or set distill.dino=0"
        )
    if settings.loss not in LOSSES:
        raise ConfigError(f"expected distill.loss {' or '.join(LOSSES)}, found '{settings.loss}'")
    size, patch = settings.input_size, loaded.backbone.spec.patch_size
    if size is not None and (size < patch or size % patch):
        nearest = max(1, round(size / patch)) * patch
        raise ConfigError(
            f"expected distill.input_size to be a multiple of the teacher's patch size {patch}, found {size}; the "
            f"nearest is {nearest}"
        )
    if loaded.backbone.spec.input_dim != 3:
        raise ConfigError(f"teacher={loaded.source}: expected 3 channels, found {loaded.backbone.spec.input_dim}")
