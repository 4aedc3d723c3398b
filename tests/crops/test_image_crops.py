"""Views of a batch of tiles against torchvision's functions applied step by step; independence of samples."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dino.config.schema import PatchAugConfig
from dino.crops import images as module
from dino.crops.colour import blur_radius
from dino.crops.images import ImageCrops
from dino.crops.parameters import JITTER_ORDERS
from dino.crops.resample import resize_dense
from dino.randomness import generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [(64, 64), (50, 61), (64, 40), (33, 35), (64, 64), (57, 64)]


def settings(**more) -> PatchAugConfig:
    """Two global views of 48 px and four local views of 20 px; every operation has a positive probability."""
    return PatchAugConfig(
        global_crops_size=48,
        local_crops_size=20,
        local_crops_number=4,
        vertical_flip=0.5,
        quarter_turns=True,
        solarize=0.5,
        **more,
    )


def batch(crops: ImageCrops, shapes=SHAPES) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    random = np.random.default_rng(0)
    pixels = torch.zeros(len(shapes), 3, max(s[0] for s in shapes), max(s[1] for s in shapes), dtype=torch.uint8)
    for row, (height, width) in enumerate(shapes):
        pixels[row, :, :height, :width] = torch.from_numpy(random.integers(0, 256, (3, height, width), dtype=np.uint8))
    drawn = [crops.draw(shape, None, generator(0, row, "crops")) for row, shape in enumerate(shapes)]
    return pixels, {k: torch.from_numpy(np.stack([d[k] for d in drawn])) for k in drawn[0]}


def step_by_step(image: torch.Tensor, view: dict[str, torch.Tensor], side: int) -> torch.Tensor:
    """One view of one tile by torchvision's functions."""
    size = [side] * 2
    x = tv.resized_crop(
        image.float() / 255, *view["box"].tolist(), size, interpolation=InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 1)
    x = tv.horizontal_flip(x) if view["flip_x"] else x
    x = tv.vertical_flip(x) if view["flip_y"] else x
    x = torch.rot90(x, int(view["turns"]), (-2, -1))
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    factors = [float(view[name]) for name in ("brightness", "contrast", "saturation", "hue")]
    if view["jitter_order"] >= 0:
        for index in JITTER_ORDERS[view["jitter_order"]]:
            x = operations[index](x, factors[index])
    x = tv.rgb_to_grayscale(x, 3) if view["grayscale"] else x
    if view["sigma"] > 0:
        kernel = 2 * blur_radius(2.0, side) + 1
        x = tv.gaussian_blur(x, [kernel] * 2, [float(view["sigma"])] * 2)
    x = tv.solarize(x, 128 / 255) if view["solarize"] else x
    return tv.normalize(x, list(MEAN), list(STD))


@pytest.fixture(scope="module")
def crops() -> ImageCrops:
    return ImageCrops(settings(), MEAN, STD)


def test_every_view_equals_torchvision_with_the_same_parameters(crops):
    pixels, parameters = batch(crops)
    # Solarizing is discontinuous at 128: values near it may be rounded to the other side, as happens for one in 1e4.
    groups = crops.apply(pixels, parameters)
    assert [g.shape for g in groups] == [(2, 6, 3, 48, 48), (4, 6, 3, 20, 20)]
    views = [view for group in groups for view in group]
    assert parameters["solarize"].any() and parameters["grayscale"].any() and (parameters["turns"] == 3).any()
    for number, (view, side) in enumerate(zip(views, crops.view_sizes, strict=True)):
        for row in range(len(pixels)):
            drawn = {name: value[row, number] for name, value in parameters.items()}
            wrong = (view[row] - step_by_step(pixels[row], drawn, side)).abs() > 1e-4
            assert wrong.float().mean() <= (1e-3 if drawn["solarize"] else 0)


@pytest.mark.parametrize("stains", [0.0, 0.5])
def test_a_sample_does_not_depend_on_its_batch(stains):
    crops = ImageCrops(settings(hed_jitter=stains), MEAN, STD)
    pixels, parameters = batch(crops)
    together = crops.apply(pixels, parameters)
    order = [3, 1, 5, 0, 4, 2]
    shuffled = crops.apply(pixels[order], {k: v[order] for k, v in parameters.items()})
    for a, b in zip(together, shuffled, strict=True):
        assert close(a[:, order], b)
    for row in range(len(pixels)):
        height, width = SHAPES[row]  # a single tile is not padded
        one = {k: v[row : row + 1] for k, v in parameters.items()}
        for a, b in zip(together, crops.apply(pixels[row : row + 1, :, :height, :width], one), strict=True):
            assert close(a[:, row : row + 1], b)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding, except where the discontinuity of solarizing at 128 magnifies it."""
    return bool((((a - b).abs() > 1e-5).float().mean() < 1e-3).item())


def test_repeated_calls_are_identical_and_do_not_change_their_input(crops):
    pixels, parameters = batch(crops)
    before = pixels.clone(), {k: v.clone() for k, v in parameters.items()}
    first, second = crops.apply(pixels, parameters), crops.apply(pixels, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(pixels, before[0])
    assert all(torch.equal(parameters[k], before[1][k]) for k in parameters)


def test_views_keep_their_values_while_they_exist(crops):
    pixels, parameters = batch(crops)
    held = [crops.apply(pixels + i, parameters) for i in range(6)]  # more than the memory pool keeps
    before = [[group.clone() for group in views] for views in held]
    crops.apply(255 - pixels, parameters)
    for views, copies in zip(held, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))
    assert not torch.equal(held[0][0], held[1][0])


@pytest.mark.parametrize("on_gpu_path", [False, True])
def test_local_views_are_cut_from_the_second_picture(monkeypatch, on_gpu_path):
    """As if every view was cut from its own picture alone."""
    across = ImageCrops(settings(global_spacing_um=1.0, local_spacing_um=0.5), MEAN, STD)
    single = ImageCrops(settings(), MEAN, STD)
    if on_gpu_path:
        for one in (across, single):
            monkeypatch.setattr(module, "resize_boxed", resize_dense)
            monkeypatch.setattr(one, "_make_on_cpu", one._make)
    pixels, parameters = batch(single)
    pair = torch.stack([pixels, 255 - pixels.flip(0)], dim=1)  # (B, 2, 3, H, W)
    views = across.apply(pair, parameters)
    expected = [single.apply(pair[:, picture].contiguous(), parameters)[picture] for picture in (0, 1)]
    assert across.groups == single.groups == [2, 4] and across.pictures == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


def test_views_of_one_size_from_two_pictures_are_two_groups():
    across = ImageCrops(PatchAugConfig(local_crops_size=224, global_spacing_um=1.0), MEAN, STD)
    assert (across.sizes, across.groups, across.pictures) == ([224, 224], [2, 8], [0, 1])


def test_the_gpu_code_path_gives_the_same_views(crops, monkeypatch):
    pixels, parameters = batch(crops)
    expected = crops.apply(pixels, parameters)
    monkeypatch.setattr(module, "resize_boxed", resize_dense)
    monkeypatch.setattr(crops, "_make_on_cpu", crops._make)
    for a, b in zip(expected, crops.apply(pixels, parameters), strict=True):
        assert ((a - b).abs() > 2e-4).float().mean() < 1e-3


def test_batched_and_single_images_give_the_same_views(crops, monkeypatch):
    pixels, parameters = batch(crops)
    monkeypatch.setattr(module, "GATHERED_PX", 48)
    gathered = crops.apply(pixels, parameters)
    monkeypatch.setattr(module, "GATHERED_PX", 0)
    assert all(close(a, b) for a, b in zip(gathered, crops.apply(pixels, parameters), strict=True))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_and_chunk_sizes_do_not_change_the_views(crops, monkeypatch, threads):
    pixels, parameters = batch(crops)
    monkeypatch.setattr(module, "CACHED_VALUES", 2 * sum(side**2 * 3 for side in crops.view_sizes))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = crops.apply(pixels, parameters)
        torch.set_num_threads(threads)
        found = crops.apply(pixels, parameters)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_error_on_a_thread_is_raised(crops):
    pixels, parameters = batch(crops)
    with pytest.raises(KeyError, match="box"):
        crops.apply(pixels, {k: v for k, v in parameters.items() if k != "box"})


def test_an_empty_batch_gives_no_views(crops):
    pixels, parameters = batch(crops)
    groups = crops.apply(pixels[:0], {k: v[:0] for k, v in parameters.items()})
    assert [g.shape for g in groups] == [(2, 0, 3, 48, 48), (4, 0, 3, 20, 20)]


def test_autocast_does_not_affect_pixels(crops):
    pixels, parameters = batch(crops)
    expected = crops.apply(pixels, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        found = crops.apply(pixels, parameters)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(("local_size", "local_number", "groups"), [(16, 0, [2]), (32, 1, [3]), (16, 1, [2, 1])])
def test_groups_follow_the_sizes(local_size, local_number, groups):
    aug = PatchAugConfig(global_crops_size=32, local_crops_size=local_size, local_crops_number=local_number)
    assert ImageCrops(aug, MEAN, STD).groups == groups


def test_drawing_needs_only_the_seed_and_the_draw(crops):
    a, b = (crops.draw((64, 64), None, generator(0, 12, "crops")) for _ in range(2))
    assert all(np.array_equal(a[k], b[k]) and len(a[k]) == 6 for k in a)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_on_a_gpu_equal_those_on_a_cpu_without_synchronisation(crops):
    pixels, parameters = batch(crops)
    crops.apply(pixels.cuda(), parameters)  # constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = crops.apply(pixels.cuda(non_blocking=True), parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(crops.apply(pixels, parameters), found, strict=True):
        assert ((a - b.cpu()).abs() > 1e-3).float().mean() < 1e-3
