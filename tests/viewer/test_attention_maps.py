"""Attention in the viewer: tiles of pyramids against colours of the values themselves, and a model's over one tile."""

import io
import json
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from dino.errors import DataError
from dino.extraction.pyramid import write_pyramid
from dino.slides.tables import SlideTiles
from dino.viewer.attention import AttentionFiles, MapFile, coloured
from dino.viewer.attention_folders import find_attention, open_attention
from dino.viewer.models import RegionAttention, TileAttention
from tests.tiny_models import save_checkpoint
from tests.viewer.conftest import DIM, write_grids

STEP, TOKENS = 64, 4  # level-0 px of a tile, tokens of its side
SPACING = 0.5


def values_of(catalogue, slide_id, channels=2, seed=0):
    """A map of random numbers over the tiles of a slide, NaN elsewhere: ``(channels, rows * 4, columns * 4)``."""
    status = catalogue.slides.status[slide_id]
    shape = tuple(TOKENS * (side // STEP) for side in (status.height, status.width))
    return np.random.default_rng(seed).random((channels, *shape)).astype(np.float32)


@pytest.fixture
def folder(catalogue, tmp_path):
    maps = values_of(catalogue, "one")
    maps[0, :6, :6] = np.nan
    spacing = catalogue.slides.status["one"].spacing_um
    write_pyramid(
        tmp_path / "one.ome.tif",
        lambda: iter(maps),
        ["tile", "tile head 1"],
        maps.shape[1:],
        spacing * STEP / TOKENS,
    )
    return tmp_path


def test_a_tile_has_the_colours_of_its_values(catalogue, folder):
    files = AttentionFiles(catalogue, folder)
    about, maps = files.describe("one"), values_of(catalogue, "one")
    assert about["px_lv0"] == STEP / TOKENS and about["sizes"] == [maps.shape[:0:-1]]
    assert [one["name"] for one in about["channels"]] == ["tile", "tile head 1"]
    low, high = np.percentile(maps[1], [1, 99])
    assert about["channels"][1] | {"name": ""} == {
        "name": "", "low": pytest.approx(low), "high": pytest.approx(high)
    }  # fmt: skip
    shown = np.asarray(Image.open(io.BytesIO(files.picture("one", 1, 0, 0, 0))).convert("RGBA"))
    expected = 255 * colormaps["viridis"](np.clip((maps[1] - low) / (high - low), 0, 1))
    assert shown.shape[:2] == maps.shape[1:]
    assert np.abs(shown - expected).max() < 15  # eleven colours and what is between, instead of matplotlib's 256
    transparent = np.asarray(Image.open(io.BytesIO(files.picture("one", 0, 0, 0, 0))).convert("RGBA"))[..., 3] == 0
    assert transparent[:6, :6].all() and transparent.sum() == 36


def test_a_file_of_one_map_is_read(catalogue, tmp_path):
    """As rollout of level 1 gives; its heads are not kept apart."""
    maps, spacing = values_of(catalogue, "one", channels=1), SPACING * STEP / TOKENS
    write_pyramid(tmp_path / "one.ome.tif", lambda: iter(maps), ["tile rollout"], maps.shape[1:], spacing)
    files = AttentionFiles(catalogue, tmp_path)
    assert [one["name"] for one in files.describe("one")["channels"]] == ["tile rollout"]
    np.testing.assert_array_equal(files._opened("one").values(0, 0, 0, 0), maps[0])


def test_tiles_of_a_pyramid_are_those_of_the_whole_level(catalogue, tmp_path):
    """Read tile by tile, as tifffile reads whole levels; the last ones are narrower, and one is all zeros."""
    import tifffile

    maps = np.random.default_rng(0).random((2, 700, 1300)).astype(np.float32)
    maps[1, 256:512, 256:512] = 0
    write_pyramid(tmp_path / "one.ome.tif", lambda: iter(maps), ["a", "b"], (700, 1300), 1.0)
    files = AttentionFiles(catalogue, tmp_path)
    files._px_lv0 = lambda *ignored: 1.0  # type: ignore[method-assign] -- larger than the slide
    opened = files._opened("one")
    with tifffile.TiffFile(tmp_path / "one.ome.tif") as file:
        for level, whole in enumerate(one.asarray() for one in file.series[0].levels):
            for channel in (0, 1):
                for row in range(-(-whole.shape[1] // 256)):
                    for column in range(-(-whole.shape[2] // 256)):
                        expected = whole[channel, 256 * row : 256 * row + 256, 256 * column : 256 * column + 256]
                        np.testing.assert_array_equal(opened.values(channel, level, column, row), expected)


def _files(catalogue, folder, coords, side, px_lv0):
    """Maps of a slide with these tiles, which may be larger than the painted one."""
    tiles = SlideTiles("one", coords, side, SPACING, np.ones(len(coords), np.float32))
    files = AttentionFiles(replace(catalogue, tiles={"one": tiles}), folder)
    files._px_lv0 = lambda *ignored: px_lv0  # type: ignore[method-assign] -- of the painted slide
    return files


def test_attention_of_tiles_is_that_of_their_part_of_the_map(catalogue, tmp_path, monkeypatch):
    """Tiles of 7 tokens lie across the file's tiles of 256 px, overlap by half, and end beyond the map; NaN is left
    out. The values of the whole maps, one tile at a time, in float64; heads are not measured.
    """
    side, px, shape = 112, 16.0, (300, 530)
    maps = np.random.default_rng(0).random((5, *shape)).astype(np.float32)
    maps[:, :40, :50] = np.nan
    maps[:, 100:200, 250:260] = np.nan
    names = ["tile", "tile head 1", "region", "region head 1", "tile x region"]
    write_pyramid(tmp_path / "one.ome.tif", lambda: iter(maps), names, shape, 1.0)
    corners = [(x, y) for y in range(0, 300 * 16, 56) for x in range(0, 530 * 16, 56)]
    coords = np.random.default_rng(1).permutation(np.array(corners))
    read: Counter[tuple[int, ...]] = Counter()
    values_of_file = MapFile.values
    monkeypatch.setattr(MapFile, "values", lambda file, *at: read.update([at]) or values_of_file(file, *at))
    found = _files(catalogue, tmp_path, coords, side, px).measurements("one", "vit")
    assert set(read.values()) == {1} and len(read) == 3 * 2 * 3  # each tile of the file once
    statistics = {"within the tile: Max": (0, np.nanmax), "within the region: Mean": (2, np.nanmean)}
    statistics["both levels: Max"] = (4, np.nanmax)
    assert list(found) == [f"Attention vit: {name}" for name in statistics]
    for name, (channel, statistic) in statistics.items():
        values = found[f"Attention vit: {name}"]
        for (x, y), value in zip(coords, values, strict=True):
            column, row = round(x / px), round(y / px)
            part = maps[channel, row : row + 7, column : column + 7].astype(np.float64)
            if np.isfinite(part).any():
                assert value == pytest.approx(statistic(part), rel=1e-6)
            else:
                assert np.isnan(value)
        assert np.isnan(values).any() and not np.isnan(values).all()


def test_attention_of_tiles_is_read_in_strips(catalogue, tmp_path):
    """A map of 32 MB through less than 8 MB."""
    values = np.ones((8192, 1024), np.float32)
    write_pyramid(tmp_path / "one.ome.tif", lambda: iter([values]), ["tile rollout"], values.shape, 1.0)
    coords = np.array([(x, y) for y in range(0, 8192 * 16, 256) for x in range(0, 1024 * 16, 256)])
    files = _files(catalogue, tmp_path, coords, 256, 16.0)
    files.describe("one")
    tracemalloc.start()
    found = files.measurements("one", "vit")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.keys() == {"Attention rollout vit: within the tile: Max"}
    assert all((one == 1).all() for one in found.values())
    assert peak < 8e6


def _recorded(folder, catalogue, slide_id, **record):
    """A map that says what made it, and the folder that does."""
    maps, spacing = values_of(catalogue, slide_id), SPACING * STEP / TOKENS
    about = {"model": "/home/me/runs/vit", "fingerprint": "a" * 64, "region": None} | record
    write_pyramid(folder / f"{slide_id}.ome.tif", lambda: iter(maps), "ab", maps.shape[1:], spacing, record=about)
    if not (folder / "attention.json").exists():
        (folder / "attention.json").write_text(json.dumps(about))


def test_maps_say_whose_they_are_without_paths(catalogue, tmp_path):
    region = {"model": "runs/hvit", "fingerprint": "b" * 64}
    _recorded(tmp_path, catalogue, "one", region=region)
    _recorded(tmp_path, catalogue, "two", region={**region, "fingerprint": "c" * 64})
    files = AttentionFiles(catalogue, tmp_path)
    assert files.describe("one")["made_by"] == "vit (aaaaaaaaaaaa) and hvit (bbbbbbbbbbbb)"
    with pytest.raises(DataError, match="expected maps of the same models in .*two.ome.tif: level 2: fingerprint b+ "):
        files.describe("two")
    (tmp_path / "attention.json").unlink()
    (tmp_path / "two.ome.tif").unlink()
    assert AttentionFiles(catalogue, tmp_path).describe("one")["made_by"].startswith("vit (aaaaaaaaaaaa) and hvit")


def test_maps_of_earlier_versions_are_of_an_unknown_model(catalogue, folder, capsys):
    (found,) = open_attention(catalogue, {"random": folder}, {"random"}).values()
    assert found.describe("one")["made_by"] == "an unknown model"
    assert "maps of an unknown model: they have no record of it (attention.json)" in capsys.readouterr().out


def test_maps_of_another_model_than_the_features_are_not_shown(catalogue, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "features_vit").mkdir(parents=True)
    (root / "features_vit" / "extract.json").write_text(json.dumps({"model": "runs/vit", "fingerprint": "d" * 64}))
    _recorded(root / "attention_vit", catalogue, "one")
    moved, folders = replace(catalogue, root=root), {"vit": root / "attention_vit"}
    with pytest.raises(DataError, match="expected maps of the model of .*features_vit in .*attention_vit, found those"):
        open_attention(moved, folders, {"vit"})
    assert open_attention(moved, folders, ()) == {}
    assert "they are left out" in " ".join(capsys.readouterr().out.split())
    (root / "features_vit" / "extract.json").write_text(json.dumps({"model": "moved/vit", "fingerprint": "a" * 64}))
    assert list(open_attention(moved, folders, {"vit"})) == ["vit"]


def test_what_is_not_there_is_one_line(catalogue, folder):
    files = AttentionFiles(catalogue, folder)
    with pytest.raises(DataError, match="expected a map of slide 'two', found none; run `dino attention`"):
        files.describe("two")
    with pytest.raises(DataError, match="expected one of 2 channels and 1 levels, found 2, 0"):
        files.picture("one", 2, 0, 0, 0)
    with pytest.raises(DataError, match="expected a tile of 1 x 1, found column 1"):
        files.picture("one", 0, 0, 1, 0)
    with pytest.raises(DataError, match="expected maps of the slides of .*, as `dino attention` writes them"):
        AttentionFiles(catalogue, folder.parent)
    (folder / "one.ome.tif").write_bytes(b"II*\0damaged")
    with pytest.raises(DataError, match="expected maps of `dino attention` in .*, could not read them"):
        AttentionFiles(catalogue, folder).describe("one")


def test_maps_of_another_tiling_are_refused(catalogue, tmp_path):
    maps = np.ones((2, 2000, 2000), np.float32)
    write_pyramid(
        tmp_path / "one.ome.tif", lambda: iter(maps), ["tile", "tile head 1"], (2000, 2000), SPACING * STEP / TOKENS
    )
    with pytest.raises(DataError, match="expected maps of slide 'one' as it was tiled, found 2000 x 2000 values"):
        AttentionFiles(catalogue, tmp_path).describe("one")


def test_maps_are_found_by_their_encoder(catalogue, folder):
    root = catalogue.root
    (root / "attention_random").mkdir()
    (root / "attention_empty").mkdir()
    (root / "attention_random" / "one.ome.tif").write_bytes(b"")
    try:
        assert find_attention(catalogue, ["random"], None) == {"random": root / "attention_random"}
        assert find_attention(catalogue, ["random"], str(folder)) == {"random": folder}
        assert find_attention(catalogue, [], str(folder))[folder.name] == folder
    finally:
        (root / "attention_random" / "one.ome.tif").unlink()
        for name in ("random", "empty"):
            (root / f"attention_{name}").rmdir()


def test_values_that_are_all_the_same_have_a_colour():
    picture = np.asarray(Image.open(io.BytesIO(coloured(np.ones((2, 3), np.float32), 1.0, 1.0))).convert("RGBA"))
    assert picture.shape == (2, 3, 4) and (picture[..., 3] == 255).all()


def test_attention_over_one_tile_is_that_of_the_network(catalogue, tmp_path):
    """From pixels read with openslide, through the last block written out in float64."""
    import openslide
    import torch

    from dino.models.weights import load_backbone_file

    loaded = load_backbone_file(save_checkpoint(tmp_path / "model.pt"))
    tile = 5
    found = TileAttention(catalogue, loaded).maps("one", tile)
    x, y = catalogue.tiles["one"].coords[tile].tolist()
    with openslide.OpenSlide(str(catalogue.slides.path("one"))) as slide:
        pixels = np.asarray(slide.read_region((x, y), 0, (STEP, STEP)).convert("RGB"), np.float64)
    inputs = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    np.testing.assert_allclose(found.reshape(3, -1), _attention(loaded, inputs), rtol=1e-4)


def _attention(loaded, inputs):
    """Attention of the only block, written out: ``(1 + heads, N)`` of one float64 input."""
    import torch

    network = loaded.backbone.double()
    with torch.no_grad():
        tokens = network.vit.norm_pre(network.embed(inputs))
        block = network.vit.blocks[0]
        query, key, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 2, 8)).unbind(2)  # (1, N, heads, 8)
        scores = torch.einsum("hd,nhd->hn", query[0, 0], key[0]) / 8**0.5
        weights = scores.softmax(-1)[:, 1:].numpy()
    heads = weights / weights.mean(1, keepdims=True)
    return np.stack([heads.mean(0), *heads])


def test_attention_over_one_region_is_that_of_the_network(catalogue, tmp_path):
    """From the rows of the file, each put at its cell, through the block written out in float64."""
    import torch

    from dino.models.weights import load_backbone_file

    root = tmp_path / "root"
    shutil.copytree(catalogue.root, root)
    rows = write_grids(root, "random")
    loaded = load_backbone_file(save_checkpoint(tmp_path / "region.pt", "region", DIM))
    folder = root / "region_4096_pretraining_random"
    models = RegionAttention(catalogue, loaded, folder)
    record = catalogue.regions["two"][1]
    found = models.maps("two", 1)
    grid = np.zeros((DIM, *record.grid))
    for number, row in enumerate(rows[record.path.name]):
        grid[:, number // record.grid[1], number % record.grid[1]] = row
    np.testing.assert_allclose(found.reshape(3, -1), _attention(loaded, torch.from_numpy(grid)[None]), rtol=1e-4)
    torch.save(torch.zeros(16, DIM + 1), folder / record.path.name)
    with pytest.raises(DataError, match=rf"expected {DIM} features per cell in .*, found {DIM + 1}; extract it again"):
        models.maps("two", 1)
    (folder / record.path.name).unlink()
    with pytest.raises(DataError, match=r"expected the features of this region, found none \(two_.*run `dino extract`"):
        models.maps("two", 1)


def test_attention_over_a_region_from_maps_is_that_of_its_cells(catalogue, tmp_path):
    """Of maps with a value per cell, enlarged to its tokens as `dino attention` writes them."""
    shape = values_of(catalogue, "one").shape[1:]
    cells = np.random.default_rng(4).random((4, shape[0] // TOKENS, shape[1] // TOKENS)).astype(np.float32)
    cells[:, 0, 0] = np.nan
    maps = cells.repeat(TOKENS, 1).repeat(TOKENS, 2)
    names, spacing = ["tile", "region", "region head 1", "region head 2"], catalogue.slides.status["one"].spacing_um
    write_pyramid(tmp_path / "one.ome.tif", lambda: iter(maps), names, shape, spacing * STEP / TOKENS)
    files = AttentionFiles(catalogue, tmp_path)
    assert files.region("two", catalogue.regions["two"][0]) is None  # of which there is no map
    for record in catalogue.regions["one"]:
        row, column = record.y // STEP, record.x // STEP
        expected = cells[1:, row : row + record.grid[0], column : column + record.grid[1]]
        np.testing.assert_allclose(files.region("one", record), expected, rtol=1e-6)
    write_pyramid(tmp_path / "one.ome.tif", lambda: iter(maps[:1]), names[:1], shape, spacing * STEP / TOKENS)
    assert AttentionFiles(catalogue, tmp_path).region("one", catalogue.regions["one"][0]) is None


def test_the_region_of_a_tile_is_the_one_around_it(catalogue):
    """Every px of the tile is in it; of overlapping regions it is that whose middle is nearest."""
    for slide_id, tiles in catalogue.tiles.items():
        for tile, (x, y) in enumerate(tiles.coords.tolist()):
            boxes = [
                (one.x <= x and x + STEP <= one.x + 256 and one.y <= y and y + STEP <= one.y + 256)
                for one in catalogue.regions[slide_id]
            ]
            found = catalogue.region_of(slide_id, tile)
            assert (found is None) == (not any(boxes)) and (found is None or boxes[found])
    first = catalogue.regions["one"][0]
    shifted = [replace(first, x=first.x + STEP * shift) for shift in (0, 1, 2)]
    overlapping = replace(catalogue, regions={"one": shifted})
    columns = {}
    for tile, (x, y) in enumerate(catalogue.tiles["one"].coords.tolist()):
        if y == first.y:
            columns[(x - first.x) // STEP] = overlapping.region_of("one", tile)
    assert [columns[column] for column in (-1, 0, 1, 4, 5, 6) if column in columns] == [0, 0, 2, 2, None]
