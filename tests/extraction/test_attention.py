"""Attention over slides: every value at its place, overlaps averaged, against direct sums over the pixels."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
import torch
from painted_slide import halved, noise, write_slide
from tiny_models import save_checkpoint
from torch import nn
from typer.testing import CliRunner

from dino.api import attention, extract
from dino.api.tiling import tile
from dino.cli.main import app
from dino.config.schema import AttentionConfig, ExtractConfig, TileConfig
from dino.errors import ConfigError, DataError
from dino.extraction.attention import AttentionModels, Canvas, relative, shifted_cells, whole_windows
from dino.extraction.embed import ATTENTION, embed_batches, normaliser_of
from dino.extraction.pyramid import halved as half
from dino.extraction.pyramid import write_pyramid
from dino.models.backbone import BackboneSpec, build_backbone
from dino.models.transforms import Transform
from dino.models.weights import LoadedBackbone, LoadReport, load_backbone_file
from dino.slides.lattice import Geometry
from dino.slides.reader import SlideReader

SIDE, TOKEN = 32, 8
CONFIG = AttentionConfig(device="cpu", precision="fp32", batch_size=5, num_workers=0)


class Brightness(nn.Module):
    """Replacement of a backbone: attention of one head by the sum of each token, of another by its square."""

    num_heads = 2

    def __init__(self, level: str, token: int) -> None:
        super().__init__()
        self.weight, self.token, self.embed_dim = nn.Parameter(torch.ones(1)), token, 3
        self.spec = BackboneSpec("vit:dim=3,depth=1,heads=1", level, 3, (SIDE, SIDE), token)

    def last_attention(self, x: torch.Tensor) -> torch.Tensor:
        sums = nn.functional.avg_pool2d(x, self.token).sum(1).flatten(1)  # (B, N)
        return torch.stack([sums, sums**2], 1)


def loaded(level: str) -> LoadedBackbone:
    transform = Transform("none", (0.0,) * 3, (1 / 255,) * 3) if level == "patch" else None
    network = Brightness(level, TOKEN if level == "patch" else 1)
    report = LoadReport(0, [], [])
    return LoadedBackbone(network, transform, level, report, level, region_cells=(2, 3))  # type: ignore[arg-type]


@pytest.fixture
def reader(tmp_path: Path) -> SlideReader:
    pixels = noise(9 * SIDE + 5, 7 * SIDE + 9)
    path = write_slide(tmp_path / "slide.tiff", [pixels, halved(pixels)], mpp=0.5)
    return SlideReader(path, Geometry(spacing_um=0.5, tile_size_px=SIDE, region_cells=2))


def test_a_constant_stays_constant_and_a_hot_square_stays_in_its_place() -> None:
    canvas, hot = Canvas(1, (12, 15)), Canvas(1, (12, 15))
    places = [(row, column) for row in range(0, 9) for column in range(0, 11, 2)]
    for row, column in places:
        canvas.add(row, column, np.full((1, 4, 5), 3.5, np.float32))
        part = np.zeros((1, 4, 5), np.float32)
        if row <= 7 < row + 4 and column <= 6 < column + 5:
            part[0, 7 - row, 6 - column] = 2.0
        hot.add(row, column, part)
    assert np.all(np.asarray(canvas.mean()) == np.float32(3.5))
    expected = np.zeros((12, 15), np.float32)
    expected[7, 6] = 2.0
    np.testing.assert_allclose(hot.mean()[0], expected, rtol=1e-6)


def test_finished_rows_are_those_that_were_not_finished_before_the_end() -> None:
    """Row by row as a slide is mapped, with rows that no part covers, against one canvas that keeps everything."""
    rng = np.random.default_rng(0)
    whole, banded = Canvas(2, (40, 9)), Canvas(2, (40, 9))
    for row in (3, 3, 4, 7, 20, 22):
        for column in (0, 2, 5):
            part = rng.random((2, 4, 4)).astype(np.float32)
            banded.finish(row)
            assert len(banded._count) <= 5  # rows in memory
            banded.add(row, column, part)
            whole.add(row, column, part)
    banded.finish(33)
    maps = banded.mean()
    np.testing.assert_array_equal(np.asarray(maps), np.asarray(whole.mean()))
    np.testing.assert_array_equal(maps[1], np.asarray(maps)[1])
    assert np.isnan(maps[0][:3]).all() and np.isnan(maps[0][26:]).all() and np.isfinite(maps[0][3:7]).all()


@pytest.mark.parametrize("offsets", [1, 2, 4])
def test_level_1_is_the_mean_over_all_tiles_that_contain_a_token(reader: SlideReader, offsets: int) -> None:
    """Direct sums in double precision over the pixels of the slide, with some cells missing."""
    cells = [(row, column) for row in range(7) for column in range(9) if (row, column) not in {(2, 3), (0, 0), (5, 8)}]
    config = AttentionConfig(**{**vars(CONFIG), "offsets": offsets})
    found = AttentionModels(loaded("patch"), None, config, torch.device("cpu")).maps(reader, cells, {})
    pixels = np.asarray(reader.slide.read_region((0, 0), 0, (9 * SIDE, 7 * SIDE)), np.float64)
    sums = pixels.sum(2).reshape(7 * 4, TOKEN, 9 * 4, TOKEN).mean((1, 3))  # (28, 36) of each token
    total, count = np.zeros((3, 28, 36)), np.zeros((28, 36))
    known = np.zeros((28, 36), bool)
    for row, column in cells:
        known[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    for top in range(0, 25, 4 // offsets):
        for left in range(0, 33, 4 // offsets):
            if known[top : top + 4, left : left + 4].all():
                part = sums[top : top + 4, left : left + 4]
                heads = [part / part.mean(), part**2 / (part**2).mean()]
                total[:, top : top + 4, left : left + 4] += [(heads[0] + heads[1]) / 2, *heads]
                count[top : top + 4, left : left + 4] += 1
    expected = total / np.where(count > 0, count, np.nan)
    assert found.tokens == 4 and found.token_lv0 == TOKEN and found.region is None
    np.testing.assert_allclose(found.tile, expected, rtol=2e-5)
    assert np.isnan(expected[0, 8:12, 12:16]).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_level_2_and_the_product(reader: SlideReader, stride: int) -> None:
    rng = np.random.default_rng(0)
    cells = {(row, column) for row in range(6) for column in range(8)} - {(3, 4)}
    features = {cell: rng.random(3).astype(np.float32) for cell in sorted(cells)}
    config = AttentionConfig(**{**vars(CONFIG), "stride": stride})
    models = AttentionModels(loaded("patch"), loaded("region"), config, torch.device("cpu"))
    found = models.maps(reader, list(features), features)
    total, count = np.zeros((7, 9)), np.zeros((7, 9))
    for row in range(0, 5, stride):
        for column in range(0, 6, stride):
            window = [(row + i, column + j) for i in range(2) for j in range(3)]
            if all(cell in cells for cell in window):
                part = np.array([features[cell].sum(dtype=np.float64) for cell in window]).reshape(2, 3)
                both = (part / part.mean() + part**2 / (part**2).mean()) / 2
                total[row : row + 2, column : column + 3] += both
                count[row : row + 2, column : column + 3] += 1
    expected = total / np.where(count > 0, count, np.nan)
    assert found.region is not None
    np.testing.assert_allclose(found.region[0], expected, rtol=1e-5)
    names, channels = found.names(), list(found.channels())
    assert names == [
        "tile",
        *(f"tile head {i}" for i in (1, 2)),
        "region",
        "region head 1",
        "region head 2",
        "tile x region",
    ]
    product = found.tile[0] * np.kron(found.region[0], np.ones((4, 4), np.float32))
    np.testing.assert_array_equal(channels[-1], product.astype(np.float32))
    assert {channel.shape for channel in channels} == {(28, 36)}


def test_uniform_attention_is_1_at_both_levels() -> None:
    maps = relative(torch.full((3, 2 * 12), 0.02), 2, (3, 4))
    assert maps.shape == (3, 3, 3, 4) and np.abs(maps - 1).max() < 1e-6


def test_places_and_windows() -> None:
    cells = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert list(shifted_cells(cells, 1)) == cells
    found = set(shifted_cells(cells, 2))
    assert found == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4), (0, 2)}
    assert list(whole_windows(dict.fromkeys(cells), (2, 2), 1)) == [(0, 0)]


def test_the_attention_of_a_network_is_that_of_its_last_block(tmp_path: Path) -> None:
    network = load_backbone_file(save_checkpoint(tmp_path / "model.pt"))
    tiles = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    (found,) = embed_batches(network.backbone, [tiles], normaliser_of(network), torch.device("cpu"), "fp32", ATTENTION)
    assert found.shape == (3, 2 * 4)
    with torch.no_grad():
        expected = network.backbone.last_attention(normaliser_of(network)(tiles))
    torch.testing.assert_close(found, expected.flatten(1))


@pytest.mark.parametrize("arch", ["vit:dim=16,depth=3,heads=2", "vit_tiny"])
def test_rollout_is_the_product_over_all_blocks(arch: str) -> None:
    """Written out in double precision with the weights of each block, and multiplied matrix by matrix."""
    network = build_backbone(BackboneSpec(arch, "patch", 3, (32, 32), 16 if arch == "vit_tiny" else 8), 0).double()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        found = network.attention_rollout(pixels)
        tokens = network.vit.norm_pre(network.embed(pixels))
        products = []
        for block in network.vit.blocks:
            heads = block.attn.num_heads
            query, key, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, heads, -1)).unbind(2)
            scores = torch.einsum("bnhd,bmhd->bhnm", query, key) / query.shape[-1] ** 0.5
            products.append(((scores.softmax(-1).mean(1) + torch.eye(tokens.shape[1])) / 2).numpy())
            tokens = block(tokens)
    for i in range(2):
        expected = np.linalg.multi_dot([one[i] for one in products[::-1]])[0, 1:]
        np.testing.assert_allclose(found[i].numpy(), expected, rtol=1e-10)
        assert expected.sum() < 1


def test_rollout_of_a_whole_slide(root: Path) -> None:
    config = AttentionConfig(**{**vars(CONFIG), "method": "rollout"})
    models = [str(root.parent / "patch.pt"), str(root.parent / "region.pt")]
    done = attention(models, root, None, config)
    assert done.written == {"one": root / "attention_patch" / "one.ome.tif"}
    with tifffile.TiffFile(done.written["one"]) as file:
        maps, description = file.series[0].asarray(), file.ome_metadata
    assert description is not None
    assert [name in description for name in ('"tile rollout"', '"region rollout"', '"tile x region rollout"')] == [
        True
    ] * 3
    assert maps.shape == (3, 8 * 2, 10 * 2) and np.nanmean(maps[0]) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(maps[2], maps[0] * maps[1], rtol=1e-6)
    with pytest.raises(ConfigError, match="expected method last or rollout, found 'mean'"):
        attention(models, root, None, AttentionConfig(**{**vars(CONFIG), "method": "mean"}))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(root: Path) -> None:
    slides = root.parent / "slides"
    for name in ("two", "three"):
        pixels = noise(200, 200, seed=len(name))
        write_slide(slides / f"{name}.tiff", [pixels, halved(pixels)], mpp=0.5)
    settings = TileConfig(tile_size_px=SIDE, region_size_px=4 * SIDE, num_workers=1, storage="none", previews=False)
    assert tile([slides], root, settings).exit_code == 0
    model, together = str(root.parent / "patch.pt"), root.parent / "together"
    alone = attention([model], root, root.parent / "alone", CONFIG)
    assert sorted(alone.written) == ["one", "three", "two"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dino"]
    words = ["attention", model, str(root), str(together), "device=cpu", "precision=fp32", "num_workers=0"]
    subprocess.run([*launch, *words], check=True)
    for name, path in alone.written.items():
        with tifffile.TiffFile(path) as first, tifffile.TiffFile(together / f"{name}.ome.tif") as second:
            np.testing.assert_allclose(second.series[0].asarray(), first.series[0].asarray(), rtol=1e-5)


def test_a_file_holds_the_maps_at_every_level(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((2, 700, 1300)).astype(np.float32)
    maps[0, :300, :300] = np.nan
    write_pyramid(tmp_path / "maps.ome.tif", lambda: iter(maps), ["tile µ", "<&>"], (700, 1300), 8.0)
    with tifffile.TiffFile(tmp_path / "maps.ome.tif") as file:
        (series,) = file.series
        assert series.axes == "CYX" and [level.shape for level in series.levels] == [
            (2, 700, 1300), (2, 350, 650), (2, 175, 325)
        ]  # fmt: skip
        np.testing.assert_array_equal(series.asarray(), maps)
        np.testing.assert_array_equal(series.levels[1].asarray()[1], half(maps[1]))
        assert file.ome_metadata is not None
        for words in ('PhysicalSizeX="8.0"', 'PhysicalSizeXUnit="µm"', 'Name="tile µ"', 'Name="&lt;&amp;&gt;"'):
            assert words in file.ome_metadata
    blocks = maps[1][:, :1300].reshape(350, 2, 650, 2).mean((1, 3), dtype=np.float64)
    np.testing.assert_allclose(half(maps[1]), blocks, rtol=1e-6)
    odd = np.array([[1.0, np.nan, 5.0]], np.float32)
    np.testing.assert_array_equal(half(odd), [[1.0, 5.0]])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tiled slide with the features of one model, and a level-2 model that was trained on them."""
    pixels = noise(330, 270)
    write_slide(tmp_path / "slides" / "one.tiff", [pixels, halved(pixels)])
    settings = TileConfig(tile_size_px=SIDE, region_size_px=4 * SIDE, num_workers=1, storage="none", previews=False)
    assert tile([tmp_path / "slides"], tmp_path / "root", settings).exit_code == 0
    model = save_checkpoint(tmp_path / "patch.pt")
    assert extract(str(model), tmp_path / "root", ExtractConfig(device="cpu", precision="fp32")).exit_code == 0
    source = load_backbone_file(model)
    grids = {"model": "patch.pt", "fingerprint": source.fingerprint, "transform": None, "precision": "fp32"}
    geometry = {"spacing_um": 0.5, "tile_size_px": SIDE, "region_cells": [4, 4]}
    save_checkpoint(tmp_path / "region.pt", "region", 16, training=None, geometry=geometry)
    save_checkpoint(tmp_path / "other.pt", "region", 16, geometry=geometry, grids={**grids, "fingerprint": "0" * 64})
    return tmp_path / "root"


def test_the_command_writes_a_file_per_slide(root: Path) -> None:
    words = ["attention", root.parent / "patch.pt", root.parent / "region.pt", root, root.parent / "maps", "offsets=2"]
    done = CliRunner().invoke(app, [*map(str, words), "device=cpu", "precision=fp32"])
    assert done.exit_code == 0, done.output
    with tifffile.TiffFile(root.parent / "maps" / "one.ome.tif") as file:
        maps = file.series[0].asarray()
    assert maps.shape == (7, 8 * 2, 10 * 2)  # 8 x 10 cells of 2 x 2 tokens; two heads at both levels
    assert np.isfinite(maps[6]).any() and np.nanmean(maps[0]) == pytest.approx(1, abs=1e-3)
    assert np.nanmean(maps[3]) == pytest.approx(1, abs=0.05)
    alone = attention([str(root.parent / "patch.pt")], root, root.parent / "alone", CONFIG)
    assert list(alone.written) == ["one"]


def _settings(**changed: object) -> AttentionConfig:
    return AttentionConfig(**{**vars(CONFIG), **changed})  # type: ignore[arg-type]


def test_maps_say_what_made_them_in_the_words_of_the_features(root: Path) -> None:
    """The record of the folder, and that in the file, against `extract.json` and the checkpoints."""
    patch, region = root.parent / "patch.pt", root.parent / "region.pt"
    done = attention([str(patch), str(region)], root, None, CONFIG)
    features = json.loads((root / "features_patch" / "extract.json").read_text())
    record = json.loads((done.written["one"].parent / "attention.json").read_text())
    for key in ("level", "model", "fingerprint", "arch", "embed_dim", "step", "transform", "precision", "geometry"):
        assert record[key] == features[key]
    assert record["region"]["fingerprint"] == load_backbone_file(region).fingerprint != record["fingerprint"]
    grids = json.loads((root / "extract.json").read_text())
    assert record["grids"] == {key: grids[key] for key in ("fingerprint", "transform", "precision")}
    assert [record[key] for key in ("method", "offsets", "stride")] == ["last", 1, 1]
    with tifffile.TiffFile(done.written["one"]) as file:
        assert file.ome_metadata is not None
        description = ElementTree.fromstring(file.ome_metadata).findtext("{*}Image/{*}Description")
    own = json.loads(description or "")
    assert own.pop("slide")["slide_id"] == "one" and own == record


def test_maps_are_written_once_and_never_mixed(root: Path) -> None:
    patch, region, out = str(root.parent / "patch.pt"), str(root.parent / "region.pt"), root.parent / "maps"
    (path,) = attention([patch], root, out, CONFIG).written.values()
    before = {one.name: one.read_bytes() for one in out.iterdir()}
    again = attention([patch], root, out, CONFIG)
    assert again.skipped == {"one": path} and not again.written and again.exit_code == 0
    other = str(save_checkpoint(root.parent / "other" / "patch.pt", seed=3))
    for models, changed, words in (
        ([other], {}, r"fingerprint \w{12} \(.*patch.pt\), now \w{12} \(.*other/patch.pt\)"),
        ([patch], {"offsets": 2}, "offsets 1, now 2"),
        ([patch], {"precision": "fp64"}, 'precision "fp32", now "fp64"'),
        ([patch], {"transform": "imagenet"}, 'transform .*"hipt".*, now .*"imagenet"'),
        ([patch, region], {}, "level 2: no model, now .*region.pt"),
    ):
        with pytest.raises(DataError, match=f"expected maps of the same model and settings in .*: .*{words}.* OUT"):
            attention(models, root, out, _settings(**changed))
    assert {one.name: one.read_bytes() for one in out.iterdir()} == before
    (out / "attention.json").unlink()  # as of earlier versions, or a folder of slides
    with pytest.raises(DataError, match="expected a record of the maps in .* they may be from another model"):
        attention([patch], root, out, CONFIG)
    assert path.read_bytes() == before["one.ome.tif"]


def test_a_map_of_other_tiles_is_written_again(root: Path) -> None:
    patch, out = str(root.parent / "patch.pt"), root.parent / "maps"
    attention([patch], root, out, CONFIG)
    lines = (root / "tiles.csv").read_text().splitlines(keepends=True)
    (root / "tiles.csv").write_text("".join(lines[:-1]))
    (path,) = attention([patch], root, out, CONFIG).written.values()
    path.write_bytes(path.read_bytes()[:100])  # damaged
    assert attention([patch], root, out, CONFIG).written == {"one": path}


def test_what_does_not_fit_is_refused(root: Path) -> None:
    patch, region, out = str(root.parent / "patch.pt"), str(root.parent / "region.pt"), root.parent / "maps"
    other = save_checkpoint(root.parent / "another.pt", seed=3)
    with pytest.raises(DataError, match="whose features .*other.pt was trained on"):
        attention([patch, str(root.parent / "other.pt")], root, out, CONFIG)
    with pytest.raises(DataError, match="expected feature grids of .*another.pt in .*, found those of .*patch.pt"):
        attention([str(other), region], root, out, CONFIG)  # the level-2 model does not know its level 1
    coarse = {"spacing_um": 2.0, "tile_size_px": SIDE}
    save_checkpoint(root.parent / "coarse.pt", training=None, geometry=coarse)
    with pytest.raises(DataError, match="expected a ROOT tiled at the 2 µm/px that .*coarse.pt was trained at"):
        attention([str(root.parent / "coarse.pt")], root, out, CONFIG)
    with pytest.raises(ConfigError, match="expected a level-1 model, and at most one level-2 model, found 0 and 1"):
        attention([region], root, out, CONFIG)
    with pytest.raises(ConfigError, match="found 2 and 0"):
        attention([patch, str(other)], root, out, CONFIG)
    with pytest.raises(DataError, match="expected tiles of slide 'two' .*, found slides one; check slide="):
        attention([patch], root, out, AttentionConfig(**{**vars(CONFIG), "slide": "two"}))
    with pytest.raises(ConfigError, match="expected offsets to divide the 2 tokens of a tile, found 3"):
        attention([patch], root, out, AttentionConfig(**{**vars(CONFIG), "offsets": 3}))
    with pytest.raises(ConfigError, match="offsets and stride of at least 1"):
        attention([patch], root, out, AttentionConfig(**{**vars(CONFIG), "stride": 0}))
    with pytest.raises(DataError, match="expected the ROOT of `dino tile` at .*nowhere, found nothing; the words are"):
        attention([patch], root.parent / "nowhere", out, CONFIG)
    slides = root.parent / "slides"
    slides.rename(root.parent / "elsewhere")
    with pytest.raises(DataError, match="expected the files of 1 slides .* name their folder or slides.csv"):
        attention([patch], root, root.parent / "moved", CONFIG)  # one line, not one of each slide
    (root.parent / "elsewhere").rename(slides)
    grids = root / "region_4096_pretraining"
    grids.rename(root.parent / "grids")
    with pytest.raises(DataError, match=r"expected feature grids \(\*.pt\) in .* for the level-2 model, found none"):
        attention([patch, region], root, root.parent / "moved", CONFIG)
    (root.parent / "grids").rename(grids)
    assert not (root.parent / "moved").exists()
    done = CliRunner().invoke(app, ["attention", patch])
    assert done.exit_code == 2 and "expected MODEL [REGION_MODEL] ROOT [OUT]" in done.output
    (root.parent / "slides" / "one.tiff").write_bytes(b"gone")
    assert attention([patch], root, out, CONFIG).exit_code == 2
