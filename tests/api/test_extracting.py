"""Extraction end to end: from a synthetic slide whose pixels encode their coordinates to feature files."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from painted_slide import coordinates, noise, write_slide
from PIL import Image
from tiny_models import mean_colour, save_checkpoint

from dino.api import extracting
from dino.api.extracting import extract
from dino.api.tiling import tile
from dino.config.schema import ExtractConfig, TileConfig
from dino.data.grids import read_grid
from dino.errors import CheckpointError, ConfigError, DataError
from dino.lock import RunLock
from dino.slides.tables import read_regions

S = 32  # px of a cell
TILING = TileConfig(
    tile_size_px=S, region_size_px=4 * S, region_overlap_cells=3, tissue_downsample=16, min_tissue=0.0, num_workers=1
)
CONFIG = ExtractConfig(what="regions", device="cpu", precision="fp32", batch_size=7, num_workers=2)


def make_root(folder: Path, slides: dict[str, np.ndarray], tiling: TileConfig = TILING) -> Path:
    for name, pixels in slides.items():
        write_slide(folder / "slides" / f"{name}.tiff", [pixels], mpp=0.5)
    summary = tile([folder / "slides"], folder / "root", tiling)
    assert summary.exit_code == 0 and summary.regions
    return folder / "root"


@pytest.fixture
def root(tmp_path):
    """7 x 6 cells that encode their coordinates; 4 x 3 regions of 4 x 4 cells, one at every possible cell."""
    return make_root(tmp_path, {"a_b": coordinates(7 * S, 6 * S, S)})


@pytest.fixture
def model(monkeypatch):
    """Replaces the model of the extraction by the mean colour."""
    loaded = mean_colour()
    monkeypatch.setattr(extracting, "load_backbone_file", lambda *args, **kwargs: loaded)
    return loaded


def features(root: Path) -> dict[str, torch.Tensor]:
    return {path.name: torch.load(path) for path in sorted((root / "region_4096_pretraining").glob("*.pt"))}


def check_coordinates(root: Path) -> None:
    regions = read_regions(root)
    assert len(regions) == 12
    for region in regions:
        grid = torch.load(root / region.path).reshape(4, 4, 3)
        x, y = region.x // S, region.y // S
        torch.testing.assert_close(grid[..., 0], torch.arange(x, x + 4.0).expand(4, 4))  # red: x grows along a row
        torch.testing.assert_close(grid[..., 1], torch.arange(y, y + 4.0)[:, None].expand(4, 4))
        torch.testing.assert_close(read_grid(root / region.path)[0, 0], torch.arange(x, x + 4.0))


def test_rows_are_row_major_and_each_cell_is_embedded_once(root, model):
    summary = extract("RUN", root, CONFIG)
    check_coordinates(root)
    assert model.backbone.seen == summary.embedded == 7 * 6  # not 12 x 16
    assert (summary.written, summary.skipped, summary.exit_code) == (12, 0, 0)
    assert summary.pixels == {"slides": 1}


def test_files_contain_only_the_features_of_their_region(root, model):
    extract("RUN", root, CONFIG)
    for path in (root / "region_4096_pretraining").iterdir():
        tensor = torch.load(path, weights_only=True)
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.shape == (16, 3)
        assert tensor.untyped_storage().nbytes() == 16 * 3 * 4
    assert {p.name for p in (root / "region_4096_pretraining").iterdir()} == {r.path.name for r in read_regions(root)}


def test_the_record_contains_model_and_settings(root, model):
    extract("RUN", root, CONFIG)
    record = json.loads((root / "extract.json").read_text())
    assert record["fingerprint"] == "mean colour" and record["precision"] == "fp32"
    assert record["transform"]["name"] == "none" and record["geometry"]["tile_size_px"] == S
    assert record["pixels"] == {"a_b": "slides"} and record["backend"] == "openslide"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]


def test_written_files_are_skipped_and_damaged_ones_are_written_again(root, model):
    extract("RUN", root, CONFIG)
    model.backbone.seen = 0
    again = extract("RUN", root, CONFIG)
    assert (again.written, again.skipped, model.backbone.seen) == (0, 12, 0)
    first, second = sorted((root / "region_4096_pretraining").glob("*.pt"))[:2]
    first.write_bytes(first.read_bytes()[:100])
    second.unlink()
    assert extract("RUN", root, CONFIG).written == 2
    check_coordinates(root)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fingerprint": "another"}, "mean colou.*another"),
        ({"precision": "fp64"}, 'precision "fp32", now "fp64"'),
        ({"transform": (0.5, 0.5, 0.5)}, "transform"),
    ],
)
def test_models_precisions_and_transforms_are_not_mixed(root, model, monkeypatch, changed, message):
    extract("RUN", root, CONFIG)
    before = features(root)
    config = replace(CONFIG, precision=changed.get("precision", "fp32"))
    loaded = replace(model, fingerprint=changed.get("fingerprint", model.fingerprint))
    if "transform" in changed:
        loaded = replace(loaded, transform=replace(model.transform, mean=changed["transform"]))
    monkeypatch.setattr(extracting, "load_backbone_file", lambda *args, **kwargs: loaded)
    with pytest.raises(DataError, match=message) as caught:
        extract("RUN", root, config)
    assert "delete" in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(a, before[name]) for name, a in features(root).items())


def test_a_model_of_another_spacing_is_rejected(root, model, monkeypatch):
    monkeypatch.setattr(extracting, "load_backbone_file", lambda *a, **k: replace(model, spacing_um=0.25))
    with pytest.raises(DataError, match=r"0\.25 .*found 0\.5"):
        extract("RUN", root, CONFIG)


def test_features_without_a_record_are_not_mixed_with_new_ones(root, model):
    folder = root / "region_4096_pretraining"
    folder.mkdir()
    torch.save(torch.zeros(16, 3), folder / "other_0_0.pt")
    with pytest.raises(DataError, match="extract.json"):
        extract("RUN", root, CONFIG)


def test_a_killed_extraction_leaves_complete_files_and_resumes(root, model, monkeypatch):
    class KilledError(BaseException):
        pass

    forward = model.backbone.forward

    def die(x, **options):
        if model.backbone.seen >= 28:
            raise KilledError
        return forward(x, **options)

    monkeypatch.setattr(model.backbone, "forward", die)
    with pytest.raises(KilledError):
        extract("RUN", root, CONFIG)
    found = features(root)
    assert 0 < len(found) < 12 and all(f.shape == (16, 3) for f in found.values())
    assert all(p.suffix == ".pt" and p.name[0] != "." for p in (root / "region_4096_pretraining").iterdir())
    monkeypatch.setattr(model.backbone, "forward", forward)
    summary = extract("RUN", root, CONFIG)
    assert summary.skipped == len(found) and summary.written == 12 - len(found)
    check_coordinates(root)


def test_features_from_tiles_equal_those_from_the_slide(tmp_path, model):
    root = make_root(tmp_path, {"a_b": coordinates(7 * S, 6 * S, S)}, replace(TILING, jpeg_quality=100))
    (tmp_path / "slides" / "a_b.tiff").rename(tmp_path / "moved.tiff")
    summary = extract("RUN", root, CONFIG)
    assert summary.pixels == {"tiles": 1} and summary.exit_code == 0
    for region in read_regions(root):
        grid = torch.load(root / region.path).reshape(4, 4, 3)
        assert (grid[..., 0] - torch.arange(region.x // S, region.x // S + 4)).abs().max() < 3  # JPEG


def test_the_error_for_a_cell_without_a_tile_suggests_to_read_slides(root, model):
    missing = root / "patch_256_pretraining" / "imgs" / "a_b" / f"a_b_{2 * S}_{S}.jpg"
    missing.unlink()
    summary = extract("RUN", root, replace(CONFIG, source="tiles"))
    assert summary.exit_code == 2
    assert f"({2 * S}, {S})" in summary.failures["a_b"] and "source=slides" in summary.failures["a_b"]


def test_moved_slides_are_found(root, tmp_path, model):
    (tmp_path / "slides").rename(tmp_path / "elsewhere")
    summary = extract("RUN", root, replace(CONFIG, slides=str(tmp_path / "elsewhere")))
    assert summary.pixels == {"slides": 1}
    check_coordinates(root)


def test_a_slide_is_completed_from_the_same_source_of_pixels(root, model):
    extract("RUN", root, CONFIG)
    next((root / "region_4096_pretraining").glob("*.pt")).unlink()
    with pytest.raises(DataError, match="from its slides"):
        extract("RUN", root, replace(CONFIG, source="tiles"))


def test_an_unreadable_slide_is_reported_and_does_not_stop_the_others(tmp_path, model):
    slides = {name: coordinates(5 * S, 4 * S, S) for name in ("a", "b")}
    root = make_root(tmp_path, slides)
    (tmp_path / "slides" / "a.tiff").write_bytes(b"no slide")
    summary = extract("RUN", root, CONFIG)
    assert summary.exit_code == 2 and list(summary.failures) == ["a"]
    assert {name[0] for name in features(root)} == {"b"}


def test_another_slide_with_the_same_name_is_rejected(root, tmp_path, model):
    write_slide(tmp_path / "slides" / "a_b.tiff", [coordinates(9 * S, 6 * S, S)], mpp=0.5)
    assert "tile it again" in extract("RUN", root, CONFIG).failures["a_b"]


def test_a_plain_folder_of_region_images(tmp_path, model, monkeypatch):
    monkeypatch.setattr(extracting, "load_backbone_file", lambda *a, **k: replace(model, tile_size_px=S))
    pixels = coordinates(6 * S, 4 * S, S)
    (tmp_path / "nested").mkdir()
    Image.fromarray(pixels).save(tmp_path / "nested" / "s_1_640_0.png")
    summary = extract("RUN", tmp_path, CONFIG)
    assert summary.pixels == {"regions": 1}
    grid = read_grid(tmp_path / "region_4096_pretraining" / "s_1_640_0.pt", shape=(4, 6))
    assert grid[0].tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    assert grid[1].tolist() == [[y] * 6 for y in range(4)]
    (region,) = read_regions(tmp_path)
    assert (region.slide_id, region.x, region.grid) == ("s_1", 640, (4, 6))
    assert extract("RUN", tmp_path, CONFIG).skipped == 1


def test_region_images_of_a_tiled_root(root, model):
    extract("RUN", root, CONFIG)
    wanted = features(root)
    for path in (root / "region_4096_pretraining").iterdir():
        path.unlink()
    pixels = coordinates(7 * S, 6 * S, S)
    (root / "region_images").mkdir()
    for r in read_regions(root):
        crop = pixels[r.y : r.y + 4 * S, r.x : r.x + 4 * S]
        Image.fromarray(crop).save(root / "region_images" / f"{r.path.stem}.png")
    extract("RUN", root, replace(CONFIG, source="regions"))
    found = features(root)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


def test_dry_run_writes_nothing(root, model):
    before = set(root.rglob("*"))
    summary = extract("RUN", root, replace(CONFIG, dry_run=True))
    assert (summary.written, summary.embedded) == (12, 42) and summary.gigabytes == 12 * 16 * 3 * 4 / 1e9
    assert set(root.rglob("*")) == before


@pytest.mark.parametrize("wrong", [{"source": "tile"}, {"precision": "fp16"}, {"batch_size": 0}])
def test_wrong_settings_are_rejected(root, model, wrong):
    with pytest.raises(ConfigError):
        extract("RUN", root, replace(CONFIG, **wrong))


def test_two_processes_write_the_same_files_as_one(tmp_path):
    slides = {name: noise(6 * S, 5 * S, seed) for seed, name in enumerate("abc")}
    root = make_root(tmp_path, slides, replace(TILING, region_overlap_cells=0))
    checkpoint = save_checkpoint(tmp_path / "last.pt")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("regions.csv", "tiling.json", "slides_status.csv"):
        (other / name).write_bytes((root / name).read_bytes())
    extract(str(checkpoint), root, CONFIG)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from dino.api.extracting import extract\n"
        "from dino.config.schema import ExtractConfig\n"
        "config = ExtractConfig(what='regions', device='cpu', precision='fp32', batch_size=7, num_workers=2)\n"
        "summary = extract(sys.argv[1], sys.argv[2], config)\n"
        "assert summary.written == 3, summary\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(extracting.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, script, checkpoint, other], check=True, env=environment, timeout=120)
    one, two = features(root), features(other)
    assert one.keys() == two.keys() and len(one) == 3
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)


@pytest.fixture
def grids(tmp_path):
    """A tiled root with level-1 features of D=16, and a level-2 checkpoint."""
    root = make_root(tmp_path, {"a": noise(7 * S, 6 * S), "b": noise(5 * S, 4 * S, 1)})
    extract(str(save_checkpoint(tmp_path / "patch.pt")), root, CONFIG)
    return root, str(save_checkpoint(tmp_path / "region.pt", "region", 16))


def test_slide_files_have_the_layout_of_clam_and_trident(grids):
    root, model = grids
    summary = extract(model, root, CONFIG)
    assert (summary.written, summary.exit_code) == (2, 0)
    with h5py.File(root / "slide_features" / "a.h5", "r") as file:
        found, coords = file["features"][:], file["coords"][:]
        attributes = dict(file["coords"].attrs)
        mean = file["slide_embedding"][:]
    assert torch.from_numpy(found).shape == (12, 16) and found.dtype == np.float32
    assert coords.dtype == np.int64
    assert coords.tolist() == [[r.x, r.y] for r in read_regions(root) if r.slide_id == "a"]
    np.testing.assert_allclose(mean, found.mean(0), atol=1e-6)
    wanted = {"patch_size": 128, "patch_size_level0": 128, "level0_magnification": 20, "target_magnification": 20}
    assert {key: attributes[key] for key in wanted} == wanted
    assert (attributes["level0_width"], attributes["level0_height"], attributes["name"]) == (7 * S, 6 * S, "a")
    assert extract(model, root, CONFIG).skipped == 2


def test_level_2_is_not_mixed_with_other_grids(grids, tmp_path):
    root, model = grids
    extract(model, root, CONFIG)
    for path in (root / "region_4096_pretraining").iterdir():
        path.unlink()
    extract(str(save_checkpoint(tmp_path / "second.pt", seed=1)), root, CONFIG)
    with pytest.raises(DataError, match="grids"):
        extract(model, root, CONFIG)


def test_folders_of_grids_without_tables(tmp_path):
    model = str(save_checkpoint(tmp_path / "region.pt", "region", 8))
    folder = tmp_path / "grids"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(16, 8, generator=generator)
    torch.save(one, folder / "s_1_128_0.pt")
    torch.save(torch.randn(16, 8, generator=generator), folder / "s_1_0_0.pt")
    torch.save(torch.stack([one, one + 1, one + 2]), folder / "hipt.pt")  # (M, T, D)
    summary = extract(model, folder, CONFIG)
    assert summary.written == 2
    with h5py.File(folder / "slide_features" / "s_1.h5") as file:
        assert file["coords"][:].tolist() == [[0, 0], [128, 0]]
        first = file["features"][1]
    with h5py.File(folder / "slide_features" / "hipt.h5") as file:
        assert file["features"].shape == (3, 16)
        np.testing.assert_allclose(file["features"][0], first, atol=1e-6)


def test_grids_of_another_dimension_are_rejected(grids, tmp_path):
    root, _ = grids
    with pytest.raises(DataError, match=r"D=8.*D=16"):
        extract(str(save_checkpoint(tmp_path / "other.pt", "region", 8)), root, CONFIG)


def test_the_error_for_an_incomplete_slide_names_it(grids):
    root, model = grids
    next((root / "region_4096_pretraining").glob("b_*.pt")).unlink()
    summary = extract(model, root, CONFIG)
    assert summary.exit_code == 2 and list(summary.failures) == ["b"] and summary.written == 1
    assert not (root / "slide_features" / "b.h5").exists()


def test_a_wrong_folder_is_rejected(tmp_path):
    region, patch = save_checkpoint(tmp_path / "r.pt", "region", 8), save_checkpoint(tmp_path / "p.pt")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="with a level-1 model"):
        extract(str(region), empty, CONFIG)
    with pytest.raises(DataError, match="images"):
        extract(str(patch), empty, CONFIG)
    with pytest.raises(DataError, match="found nothing"):
        extract(str(patch), tmp_path / "gone", CONFIG)
    with pytest.raises((CheckpointError, DataError)):
        extract(str(tmp_path / "gone.pt"), empty, CONFIG)


def test_a_root_in_use_is_rejected(root, model):
    with RunLock(root, name="extract_patch.lock.json").held():
        with pytest.raises(ConfigError, match="is in use by PID"):
            extract("RUN", root, CONFIG)
        extract("RUN", root, replace(CONFIG, dry_run=True))
        assert not (root / "region_4096_pretraining").exists()
    assert extract("RUN", root, CONFIG).written == 12
