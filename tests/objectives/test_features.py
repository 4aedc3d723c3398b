"""Distillation of a frozen network: distances, targets, and what the networks see, against independent formulas."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_checkpoint
from torch import Tensor

from dino.config.schema import DistillConfig, ModelConfig
from dino.errors import CheckpointError, ConfigError
from dino.extraction.embed import normaliser_of
from dino.models.backbone import Tokens
from dino.models.head import DINOHead
from dino.models.transforms import TRANSFORMS, Transform
from dino.models.weights import load_backbone_file
from dino.objectives import Outputs
from dino.objectives.features import (
    ClsFeatures,
    FrozenBackbone,
    FrozenDINO,
    PatchFeatures,
    cosine_distance,
    smooth_l1_distance,
)

IMAGENET = TRANSFORMS["imagenet"]


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frozen(path: Path, settings: DistillConfig | None = None, transform: Transform = IMAGENET) -> FrozenBackbone:
    return FrozenBackbone.load(
        str(path), settings or DistillConfig(patch=1.0), transform, ModelConfig(patch_size=8)
    ).double()


def test_distances_are_those_of_their_formulas() -> None:
    predicted, target = vectors(2, 3, 5), 7 + 3 * vectors(2, 3, 5, seed=1)
    pairs = list(zip(predicted.reshape(-1, 5).numpy(), target.reshape(-1, 5).numpy(), strict=True))
    cosines = [p @ t / math.sqrt((p @ p) * (t @ t)) for p, t in pairs]
    assert cosine_distance(predicted, target).item() == pytest.approx(1 - np.mean(cosines), rel=1e-12)
    elements = []
    for p, t in pairs:
        error = np.abs(p - (t - t.mean()) / np.sqrt(t.var() + 1e-5))
        elements += [e - 0.5 if e >= 1 else 0.5 * e * e for e in error]
    assert smooth_l1_distance(predicted, target).item() == pytest.approx(np.mean(elements), rel=1e-12)


@pytest.mark.parametrize("distance", [cosine_distance, smooth_l1_distance])
def test_gradients_are_those_of_finite_differences(distance: object) -> None:
    objective = ClsFeatures(1.0, distance, 5, seed=0).double()  # type: ignore[arg-type]
    head, target = objective.build_head(4).double(), vectors(2, 3, 5, seed=1)

    def loss(cls: Tensor) -> Tensor:
        predicted = objective.project(head, [Tokens(cls)], None)
        return objective(Outputs([], {"distill_cls": predicted}), Outputs([], {"distill_cls": target}), {}).losses[
            "distill_cls"
        ]

    cls = vectors(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(loss, (cls,))


def test_only_global_views_are_predicted() -> None:
    tokens = [Tokens(vectors(4, 3, 6), None, vectors(4, 3, 9, 6)), Tokens(vectors(5, 3, 6))]
    for objective, shape in (
        (ClsFeatures(1, cosine_distance, 7, 0), (2, 3, 7)),
        (PatchFeatures(1, cosine_distance, 7, 0), (2, 3, 9, 7)),
    ):
        head = objective.build_head(6).double()
        assert objective.project(head, tokens, None).shape == shape
        again = objective.build_head(6).double()
        assert torch.equal(head.weight, again.weight)  # type: ignore[arg-type]


def test_the_frozen_network_sees_the_same_crop_normalized_its_own_way(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "teacher.pt")  # patch size 16, mean and std 0.5
    network = frozen(path)
    pixels = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (IMAGENET.mean, IMAGENET.std))
    found = network.targets((pixels - mean) / std)
    backbone = load_backbone_file(path).backbone.double()
    expected = backbone((pixels.flatten(0, 1) - 0.5) / 0.5)
    assert torch.allclose(found["distill_cls"].flatten(0, 1), expected.cls, rtol=1e-9)
    # The student has patches of 8 px: its grid is 4 x 4, that of the frozen network 2 x 2.
    assert expected.patches is not None
    maps = expected.patches.reshape(6, 2, 2, 16)
    weights = torch.tensor(
        [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], dtype=torch.float64
    )  # linear, half-pixel centres
    resampled = torch.einsum("ya,xb,nabd->nyxd", weights, weights, maps).reshape(2, 3, 16, 16)
    assert torch.allclose(found["distill_patch"], resampled, rtol=1e-9)
    assert frozen(path, DistillConfig()).targets(pixels).keys() == {"distill_cls"}


@pytest.mark.parametrize(("side", "size", "seen"), [(40, None, 32), (24, None, 32), (8, None, 16), (32, 48, 48)])
def test_crops_are_resized_to_what_the_frozen_network_takes(
    side: int, size: int | None, seen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = frozen(save_checkpoint(tmp_path / "teacher.pt"), DistillConfig(patch=1.0, input_size=size))
    sizes, forward = [], network.backbone.forward
    monkeypatch.setattr(network.backbone, "forward", lambda x, **o: sizes.append(x.shape[-1]) or forward(x, **o))
    found = network.targets(vectors(2, 1, 3, side, side))
    assert sizes == [seen] and found["distill_patch"].shape == (2, 1, (side // 8) ** 2, 16)


def test_as_a_backbone_it_gives_the_features_that_evaluation_gives(tmp_path: Path) -> None:
    path = save_checkpoint(
        tmp_path / "teacher.pt", transform={"name": "timm", "mean": [0.5] * 3, "std": [0.2] * 3, "input_size_px": 48}
    )
    network, loaded = frozen(path).float(), load_backbone_file(path)
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET.mean, IMAGENET.std))
    expected = loaded.backbone(normaliser_of(loaded)(pixels)).cls
    assert torch.allclose(network((pixels / 255 - mean) / std, cls_only=True).cls, expected, atol=2e-3)
    assert network.origin["teacher_weights"] == loaded.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DistillConfig(cls=-1.0), r"distill.cls of at least 0, found -1"),
        (DistillConfig(cls=0.0), "set distill.cls or distill.patch"),
        (DistillConfig(dino=1.0), "distill.dino needs its projection head, found none: name a run"),
        (DistillConfig(loss="l2"), "distill.loss cosine or smooth_l1, found 'l2'"),
        (DistillConfig(input_size=30), "multiple of the teacher's patch size 16, found 30; the nearest is 32"),
        (DistillConfig(transform="none"), "transform: expected auto"),
    ],
)
def test_settings_out_of_range_are_refused(settings: DistillConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        frozen(save_checkpoint(tmp_path / "teacher.pt"), settings)


def test_a_model_of_grids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model of images"):
        frozen(save_checkpoint(tmp_path / "region.pt", level="region", input_dim=10))


def test_dino_against_the_head_of_the_frozen_network_is_its_published_cross_entropy(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "teacher.pt")
    content = torch.load(path, weights_only=True)
    head = DINOHead(16, 9, hidden_dim=12, bottleneck_dim=5, seed=3)
    content["teacher"] |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save(content, path)
    network = frozen(path, DistillConfig(cls=0.0, dino=1.0))
    (objective,) = network.objectives(seed=0)
    assert isinstance(objective, FrozenDINO) and objective.settings.out_dim == 9
    views = vectors(2, 3, 3, 32, 32)
    targets = network.targets(views)
    cls = network(views.flatten(0, 1), cls_only=True).cls  # 32 px is its native size
    logits = head.double()(cls).unflatten(0, (2, 3)).detach()
    assert torch.allclose(targets["distill_dino"], logits, rtol=1e-9)
    student = vectors(4, 3, 9, seed=1)  # of two global and two local views
    probabilities, expected = (logits / 0.04).softmax(-1), []
    for g in range(2):
        for v in range(4):
            if v != g:
                expected.append(-(probabilities[g] * (student[v] / 0.1).log_softmax(-1)).sum(-1).mean())
    terms = objective.double()(
        Outputs([], {"distill_dino": student.clone()}), Outputs([], dict(targets)), objective.scheduled(0)
    )
    assert terms.losses["distill_dino"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-9)
    assert network.origin["teacher_weights"] != load_backbone_file(path).fingerprint  # that of the head is part of it
