"""Runs that distil a frozen teacher: exact, independent of processes, and without the teacher's weights."""

import json
from pathlib import Path

import pytest
import torch
from forked import run_group
from timm.models.vision_transformer import VisionTransformer
from tiny_runs import (
    Crash,
    assert_same_bits,
    assert_same_numbers,
    config,
    crash_after,
    last,
    metrics,
    with_evaluation,
)

from dino.api import load_backbone, pretrain, replay
from dino.errors import CheckpointError, ConfigError, TrainingFault
from dino.objectives import features

DISTILL = {
    "objective.dino": 0.0,
    "aug.local_crops_number": 0,
    "distill.patch": 0.5,
    "model.patch_size": 8,
}


def make_teacher(path: Path, seed: int = 0) -> Path:
    """A timm model of another width, patch size and table than the student's, with registers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vit = VisionTransformer(
            img_size=42, patch_size=14, embed_dim=64, depth=2, num_heads=1, num_classes=0, reg_tokens=2
        )
    torch.save(vit.state_dict(), path)
    return path


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_teacher(tmp_path / "teacher.pth")


def distilled(teacher: Path, **changes: object) -> dict[str, object]:
    return {**DISTILL, "teacher": str(teacher), **changes}


@pytest.mark.parametrize(
    "also", [{}, {"objective.dino": 1.0, "aug.local_crops_number": 2, "distill.loss": "smooth_l1"}]
)
def test_processes_and_micro_batches_do_not_matter(
    tiles: Path, teacher: Path, tmp_path: Path, also: dict[str, object]
) -> None:
    own = distilled(teacher, **also, **{"speed.precision": "fp64"})
    pretrain(config(tiles, tmp_path / "one", **own))
    halves = {"training.batch_size_per_gpu": 2}
    pretrain(config(tiles, tmp_path / "halves", **own, **halves, **{"training.gradient_accumulation": 2}))
    assert_same_numbers(tmp_path / "one", tmp_path / "halves")
    run_group(lambda: pretrain(config(tiles, tmp_path / "two", **own, **halves)))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")
    losses = {"loss/distill_cls", "loss/distill_patch"} | ({"loss/dino"} if also else set())
    lines = metrics(tmp_path / "one")
    assert all(line.keys() >= losses for line in lines)
    assert lines[-1]["distill_cls_cosine"] > lines[0]["distill_cls_cosine"]


def test_a_crash_changes_no_bit_and_no_checkpoint_contains_the_teacher(
    tiles: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = distilled(teacher, **with_evaluation(tiles, patience=0))
    pretrain(config(tiles, tmp_path / "whole", **own))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 5)
        pretrain(config(tiles, tmp_path / "cut", **own))
    pretrain(config(tiles, tmp_path / "cut", **own, **{"speed.num_workers": 2}))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    saved = last(tmp_path / "whole")
    assert saved["objectives"] == [{}, {}]
    heads = {f"distill_{part}_head.{name}" for part in ("cls", "patch") for name in ("weight", "bias")}
    assert {name for name in saved["student"] if not name.startswith("backbone.")} == heads
    assert saved["student"].keys() == saved["teacher"].keys()
    shapes = {tensor.shape for tensor in torch.load(teacher, weights_only=True).values() if tensor.ndim > 1}
    assert not shapes & {tensor.shape for tensor in saved["student"].values()}
    identity = json.loads((tmp_path / "whole" / "identity.json").read_text())
    assert saved["teacher_weights"] == identity["teacher_weights"] and len(saved["teacher_weights"]) == 64
    assert identity["teacher"] == str(teacher) and identity["teacher_transform"]["name"] == "imagenet"


def test_the_moving_average_is_exported_and_compared_with_the_teacher(
    tiles: Path, teacher: Path, tmp_path: Path
) -> None:
    found = pretrain(config(tiles, tmp_path / "run", **distilled(teacher), **with_evaluation(tiles)))
    image = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    exported = load_backbone(tmp_path / "run" / "backbone")
    assert torch.allclose(load_backbone(tmp_path / "run")(image), exported(image), atol=1e-5)
    assert {"own_place_teacher", "own_place_random_initialization", "own_place_frozen_teacher"} <= found.numbers[
        "floor"
    ].keys()
    comparison = found.numbers["floor"]["comparison"]
    assert list(comparison)[-2:] == ["random_initialization", "frozen_teacher"]
    assert "frozen teacher" in found.numbers["verdict"]["text"]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["evaluation"]
    assert first["frozen_teacher"]["knn_3_accuracy"] == comparison["frozen_teacher"]["value"]
    student = last(tmp_path / "run")["student"]["backbone.cls_token"]
    assert not torch.equal(student, last(tmp_path / "run")["teacher"]["backbone.cls_token"])


def test_another_teacher_is_another_run(tiles: Path, teacher: Path, tmp_path: Path) -> None:
    own = distilled(teacher, **{"training.max_steps": 2})
    pretrain(config(tiles, tmp_path / "run", **own))
    make_teacher(teacher, seed=1)
    with pytest.raises(ConfigError, match=r"another run \(teacher_weights '[0-9a-f]{64}' -> ") as error:
        pretrain(config(tiles, tmp_path / "run", **own))
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    teacher.unlink()
    with pytest.raises(CheckpointError, match=r"teacher\.pth"):
        pretrain(config(tiles, tmp_path / "run", **own))
    assert last(tmp_path / "run")["step"] == 2


def test_a_failed_step_is_replayed_sample_by_sample(
    tiles: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = features.LOSSES["cosine"], []

    def broken(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return honest(*arguments) * (float("nan") if len(calls) == 9 else 1.0)  # two losses in each step

    monkeypatch.setitem(features.LOSSES, "cosine", broken)
    with pytest.raises(TrainingFault, match="step 5"):
        pretrain(config(tiles, tmp_path / "run", **distilled(teacher)))
    found = replay(tmp_path / "run" / "failure")
    assert not found.again and len(found.samples) == 4
    for sample in found.samples:
        assert sample.losses.keys() == {"distill_cls", "distill_patch"} and sample.is_finite


def test_a_run_is_distilled_through_its_head(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config(tiles, tmp_path / "large", **{"training.max_steps": 2}))
    own = distilled(tmp_path / "large", **{"distill.dino": 1.0, "distill.patch": 0.0, "aug.local_crops_number": 2})
    exact = {**own, "speed.precision": "fp64"}
    pretrain(config(tiles, tmp_path / "one", **exact))
    halves = {"training.batch_size_per_gpu": 2, "training.gradient_accumulation": 2}
    pretrain(config(tiles, tmp_path / "halves", **exact, **halves))
    assert_same_numbers(tmp_path / "one", tmp_path / "halves")
    pretrain(config(tiles, tmp_path / "whole", **own))
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_after(patch, 5)
        pretrain(config(tiles, tmp_path / "cut", **own))
    pretrain(config(tiles, tmp_path / "cut", **own))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")
    line, saved = metrics(tmp_path / "whole")[-1], last(tmp_path / "whole")
    assert {
        "loss/distill_cls",
        "loss/distill_dino",
        "distill_dino_relative",
        "distill_dino_entropy_relative",
    } <= line.keys()
    assert {name.partition(".")[0] for name in saved["student"]} == {
        "backbone",
        "distill_cls_head",
        "distill_dino_head",
    }
    with pytest.raises(ConfigError, match="distill.dino needs its projection head"):
        export = {**own, "teacher": str(tmp_path / "large" / "backbone")}
        pretrain(config(tiles, tmp_path / "none", **export))
    assert not (tmp_path / "none").exists()
