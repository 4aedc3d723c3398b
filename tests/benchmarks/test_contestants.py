"""Ours and the reference compute the same: what makes their times comparable. All on tiny sizes."""

from functools import partial

import pytest
import torch

from benchmarks import crops, extraction, grids, loss, optimizer, parts, step
from benchmarks.material import grid_files, original_crops, random_views, tile_files
from benchmarks.measure import expect_close
from benchmarks.networks import same_step, their_step
from benchmarks.reference.data import GridViews, WholeTiles, open_rgb

CPU = torch.device("cpu")


@pytest.mark.parametrize("task", [step.SMALL, step.SMALL_REGION], ids=["patch", "region"])
def test_step_gives_the_reference_loss_and_gradients(task):
    views = random_views(task.batch, task.input_dim, task.groups, CPU)
    assert "every gradient" in same_step(task, partial(their_step, precision="fp32"), views, step.TOLERANCE)


@pytest.mark.parametrize("name", parts.SETS)
def test_step_with_parts_gives_the_loss_and_gradients_of_the_plain_one(name):
    task = parts.with_parts(parts.SMALL, parts.SETS[name])
    views = random_views(task.batch, task.input_dim, task.groups, CPU)
    assert "every gradient" in same_step(task, partial(their_step, precision="fp32"), views, step.TOLERANCE)


def test_a_step_that_differs_is_refused():
    views = random_views(2, 3, step.SMALL.groups, CPU)

    def with_other_temperature(task, trainer):
        theirs = their_step(task, trainer, "fp32")
        theirs.loss.student_temp = 0.2  # type: ignore[assignment]
        return theirs

    with pytest.raises(RuntimeError, match="expected the two to differ by at most"):
        same_step(step.SMALL, with_other_temperature, views, step.TOLERANCE)


def test_loss_gradient_and_centre_equal_the_eighteen_pairs():
    assert loss.check(loss.Ours(65, CPU), loss.Theirs(65, CPU), *loss.example(3, 65, CPU))


def test_loss_gradient_and_centre_of_masked_tokens_equal_the_plain_ones():
    student, teacher, weights = loss.masked_example(7, 65, CPU)
    assert loss.check(loss.OursMasked(65, weights), loss.TheirsMasked(65, weights), student, teacher)


@pytest.mark.parametrize(("name", "make"), [("Pillow", crops.by_pillow), ("torchvision v2", crops.by_torchvision)])
def test_crops_equal_to_the_comparators_rounding(tmp_path, name, make):
    ours = original_crops((48, 32), 3)
    assert crops.check(ours, name, make(ours), tile_files(tmp_path, 3))


def test_views_of_grids_are_the_same_numbers(tmp_path):
    paths = grid_files(tmp_path, 4)
    ours = grids.Ours(tmp_path, paths, 2, CPU)
    assert grids.check(ours, GridViews(paths, 16, ours.crops.draw)) == "views within 0.0e+00"


def test_optimizer_tail_gives_the_same_student_and_teacher():
    assert optimizer.check(optimizer.build(optimizer.SMALL, CPU))


def test_features_equal_those_of_timm(tmp_path):
    backbone, model = extraction.network("vit:dim=32,depth=2,heads=2")
    paths = tile_files(tmp_path, 3)
    ours = extraction.Ours(backbone, paths, extraction.decode, 2, 1, CPU)("fp32")
    data = WholeTiles(paths, open_rgb, extraction.IMAGENET.mean, extraction.IMAGENET.std)
    theirs = extraction.Theirs(model, data, 2, 0, CPU)("fp32")
    expect_close("features", float((ours - theirs).abs().max()), 1e-5)
