"""Tile files: read back as CLAM and TRIDENT document it, against embedding each tile with timm, one at a time."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch
from painted_slide import noise, write_slide
from tiny_models import mean_colour, save_checkpoint
from tiny_runs import TINY
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from dino.api import extracting, info, load_backbone, pretrain
from dino.api.extracting import extract
from dino.api.tiling import tile
from dino.config.load import load_config
from dino.config.schema import ExtractConfig, RegionConfig, TileConfig
from dino.data.bags import open_bag
from dino.data.grids import read_cells, read_grid
from dino.errors import ConfigError, DataError
from dino.extraction import tile_files
from dino.extraction.folders import encoder_name, find_grids
from dino.extraction.regions import count_cells, plan_cells
from dino.slides.lattice import cells_of_region
from dino.slides.reader import SlideReader
from dino.slides.tables import read_regions, read_tiles, read_tiling

S = 32  # px of a cell
TILING = TileConfig(tile_size_px=S, region_size_px=4 * S, tissue_downsample=16, min_tissue=0.0, num_workers=1)
CONFIG = ExtractConfig(device="cpu", precision="fp32", batch_size=7, num_workers=2)
SIZES = {"a_b": (7 * S, 6 * S), "c": (9 * S, 4 * S)}  # 42 cells with one region of 16; 36 cells with two


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


def make_root(folder: Path, tiling: TileConfig = TILING) -> Path:
    for seed, (name, size) in enumerate(SIZES.items()):
        write_slide(folder / "slides" / f"{name}.tiff", [noise(*size, seed)], mpp=0.5)
    assert tile([folder / "slides"], folder / "root", tiling).exit_code == 0
    return folder / "root"


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return str(save_checkpoint(tmp_path / "vit.pt"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch):
    """Replaces the model by the mean colour, which counts the tiles that it sees."""
    loaded = mean_colour()
    monkeypatch.setattr(extracting, "load_backbone_file", lambda *args, **kwargs: loaded)
    return loaded.backbone


def model_of(checkpoint: str) -> torch.nn.Module:
    """timm's own model with the weights of the checkpoint."""
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_small_patch16_224", img_size=S, num_classes=0, **sizes)
    content = torch.load(checkpoint, weights_only=True)["teacher"]
    model.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in content.items()})
    return model.eval()


def tokens(root: Path, checkpoint: str, slide: str, places: np.ndarray) -> torch.Tensor:
    """timm's ``forward_features`` (N, 1 + 4, 16) of tiles cut one by one; the transform is mean = std = 0.5."""
    with SlideReader(root.parent / "slides" / f"{slide}.tiff", read_tiling(root).geometry) as reader:
        pixels = np.stack([reader.read_cell(int(x), int(y)) for x, y in places])
    with torch.inference_mode():
        return model_of(checkpoint).forward_features(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)


def all_files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.suffix in (".h5", ".pt")}


def test_readers_of_clam_and_trident(root: Path, checkpoint: str) -> None:
    summary = extract(checkpoint, root, CONFIG)
    assert (summary.written, summary.embedded, summary.exit_code) == (2 + 3, 42 + 36, 0)
    path = root / "features_vit" / "a_b.h5"

    with h5py.File(path, "r") as hdf5_file:  # CLAM: Generic_MIL_Dataset.__getitem__ with use_h5
        features = torch.from_numpy(hdf5_file["features"][:])
        coords = hdf5_file["coords"][:]
    with h5py.File(path, "r") as f:  # TRIDENT: read_coords, and patch features in extract_slide_features
        attrs = dict(f["coords"].attrs)
        same = f["features"][:]
        patch_size = int(attrs["patch_size_level0"])

    assert features.dtype == torch.float32 and features.shape == (42, 16) and np.array_equal(same, features)
    assert coords.dtype == np.int64 and coords.tolist() == [[t.x, t.y] for t in read_tiles(root) if t.slide_id == "a_b"]
    assert patch_size == S
    wanted = {"patch_size": S, "level0_magnification": 20, "target_magnification": 20, "overlap": 0, "name": "a_b"}
    wanted |= {"level0_width": 7 * S, "level0_height": 6 * S, "spacing_um": 0.5}
    assert {key: attrs[key] for key in wanted} == wanted
    bag = open_bag(path)
    assert bag.attributes["encoder"] == "vit" and len(bag.attributes["fingerprint"]) == 64
    torch.testing.assert_close(features, tokens(root, checkpoint, "a_b", coords)[:, 0], rtol=1e-4, atol=1e-5)


def test_tiles_and_regions_have_the_same_features_and_each_cell_is_embedded_once(root: Path, counted) -> None:
    summary = extract("RUN", root, CONFIG)
    assert counted.seen == summary.embedded == 42 + 36  # not 58 + 68
    for region in read_regions(root):
        bag = open_bag(root / "features_mean" / f"{region.slide_id}.h5")
        row = {tuple(place): index for index, place in enumerate(bag.coords.tolist())}
        places = cells_of_region(region.x, region.y, region.step_lv0, region.grid).tolist()
        cells = bag.read(np.array([row[tuple(place)] for place in places]))
        np.testing.assert_array_equal(cells, read_cells(root / region.path))
    assert extract("RUN", root, CONFIG).skipped == 5 and counted.seen == 78
    separate = root.parent / "separate"
    root.rename(separate)
    before = all_files(separate)
    for name in before:
        (separate / name).unlink()
    extract("RUN", separate, replace(CONFIG, what="tiles"))
    extract("RUN", separate, replace(CONFIG, what="regions"))
    assert all_files(separate) == before


def test_grids_have_the_same_bits_with_and_without_tiles(root: Path, checkpoint: str) -> None:
    extract(checkpoint, root, replace(CONFIG, encoder="both"))
    extract(checkpoint, root, replace(CONFIG, encoder="regions", what="regions"))
    for region in read_regions(root):
        one, other = (root / f"region_4096_pretraining_{name}" / region.path.name for name in ("both", "regions"))
        assert torch.equal(read_cells(one), read_cells(other))


def test_features_of_regions_that_exist_are_not_computed_again(root: Path, counted) -> None:
    """As in a ROOT of an earlier version, whose record has no entry for the kind of features."""
    extract("RUN", root, replace(CONFIG, what="regions"))
    record = json.loads((root / "extract.json").read_text())
    (root / "extract.json").write_text(json.dumps({k: v for k, v in record.items() if k not in ("features", "source")}))
    assert counted.seen == 3 * 16
    assert extract("RUN", root, replace(CONFIG, what="tiles")).embedded == 26 + 4
    assert counted.seen == 42 + 36
    found = all_files(root)
    for name in found:
        (root / name).unlink()
    extract("RUN", root, CONFIG)
    assert all_files(root) == found


def test_features_of_another_model_or_from_other_pixels_are_not_copied(root: Path, counted) -> None:
    extract("RUN", root, replace(CONFIG, what="regions"))
    assert extract("RUN", root, replace(CONFIG, what="tiles", encoder="b", precision="fp64")).embedded == 78
    assert extract("RUN", root, replace(CONFIG, source="tiles")).embedded == 78
    records = {name: json.loads((root / name).read_text()) for name in ("extract.json", "features_mean/extract.json")}
    assert [set(record["pixels"].values()) for record in records.values()] == [{"slides"}, {"tiles"}]
    (root / read_regions(root)[-1].path).unlink()
    with pytest.raises(DataError, match="from its slides as before"):
        extract("RUN", root, replace(CONFIG, source="tiles"))


def test_killed_and_resumed(root: Path, counted, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    forward = counted.forward

    def die(x, **options):
        if counted.seen >= 28:
            raise KilledError
        return forward(x, **options)

    monkeypatch.setattr(counted, "forward", die)
    with pytest.raises(KilledError):
        extract("RUN", root, CONFIG)
    assert [Path(name).suffix for name in all_files(root)] == [".pt"]  # the region of the first slide
    assert not list(root.rglob(".*.tmp"))
    monkeypatch.setattr(counted, "forward", forward)
    counted.seen = 0
    assert extract("RUN", root, CONFIG).embedded == counted.seen == 26 + 36
    found = all_files(root)
    for name in found:
        (root / name).unlink()
    extract("RUN", root, CONFIG)
    assert len(found) == 5 and all_files(root) == found


def test_two_processes_write_the_same_files_as_one(root: Path, checkpoint: str) -> None:
    extract(checkpoint, root, CONFIG)
    one = {path.name: open_bag(path) for path in (root / "features_vit").glob("*.h5")}
    for name in all_files(root):
        (root / name).unlink()
    script = root.parent / "script.py"
    script.write_text(
        "import sys\n"
        "from dino.api.extracting import extract\n"
        "from dino.config.schema import ExtractConfig\n"
        "config = ExtractConfig(device='cpu', precision='fp32', batch_size=7, num_workers=2)\n"
        "assert extract(sys.argv[1], sys.argv[2], config).written == 5\n"
    )
    features = {name: bag.coords for name, bag in one.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(extracting.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, script, checkpoint, root], check=True, env=environment, timeout=120)
    assert {path.name for path in (root / "features_vit").glob("*.h5")} == features.keys() == {"a_b.h5", "c.h5"}
    for name, coords in features.items():
        bag = open_bag(root / "features_vit" / name)
        np.testing.assert_array_equal(bag.coords, coords)
        wanted = tokens(root, checkpoint, Path(name).stem, coords)[:, 0].numpy()
        np.testing.assert_allclose(bag.read(), wanted, rtol=1e-4, atol=1e-5)


def test_the_mean_of_the_patch_tokens(root: Path, checkpoint: str) -> None:
    """Virchow (arXiv 2309.07778): cls token and mean of the patch tokens, concatenated."""
    extract(checkpoint, root, replace(CONFIG, features="cls+mean"))
    bag = open_bag(root / "features_vit" / "c.h5")
    found = tokens(root, checkpoint, "c", bag.coords)
    wanted = torch.cat([found[:, 0], found[:, 1:].mean(1)], 1).numpy()
    np.testing.assert_allclose(bag.read(), wanted, rtol=1e-4, atol=1e-5)
    region = next(region for region in read_regions(root) if region.slide_id == "c")
    assert read_cells(root / region.path).shape == (16, 32)
    with pytest.raises(DataError, match='features "cls\\+mean", now "cls"'):
        extract(checkpoint, root, CONFIG)


def test_patch_tokens(root: Path, checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="add what=tiles"):
        extract(checkpoint, root, replace(CONFIG, features="patches"))
    extract(checkpoint, root, replace(CONFIG, features="patches", what="tiles"))
    with h5py.File(root / "features_vit" / "a_b.h5") as file:
        features, patches = file["features"][:], file["patches"]
        assert patches.shape == (42, 2, 2, 16) and patches.dtype == np.float16
        found = tokens(root, checkpoint, "a_b", file["coords"][:]).numpy()
        np.testing.assert_allclose(features, found[:, 0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(patches[:].reshape(42, 4, 16), found[:, 1:], rtol=2e-3, atol=1e-3)
    assert extract(checkpoint, root, replace(CONFIG, features="patches", what="tiles")).skipped == 2


def test_memory_does_not_grow_with_the_tiles_of_a_slide(tmp_path: Path) -> None:
    """Patch tokens of 4,000 tiles (131 MB) are written with less than 20 MB; a tile lies in one piece in the file."""
    coords, layout = np.arange(8000).reshape(-1, 2), tile_files.Layout(64, "fp32", (16, 16, 64))
    rows = torch.arange(32.0)[:, None, None].expand(32, 257, 64).contiguous()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tile_files.create(tmp_path / "s.h5", coords, layout, {}, {}) as file:
        for start in range(0, 4000, 32):
            file.write(np.arange(start, start + 32), rows)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000  # KiB
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["patches"].chunks is None and file["patches"].id.get_storage_size() == 4000 * 16 * 16 * 64 * 2
        assert (file["patches"][33] == 1).all() and (file["features"][-1] == 31).all()


def test_storage_in_half_precision(root: Path, checkpoint: str) -> None:
    extract(checkpoint, root, replace(CONFIG, what="tiles", encoder="whole"))
    extract(checkpoint, root, replace(CONFIG, what="tiles", encoder="half", storage="fp16"))
    whole, half = (open_bag(root / f"features_{name}" / "c.h5") for name in ("whole", "half"))
    assert half.features[:1].dtype == np.float16
    np.testing.assert_array_equal(half.features[:], whole.features[:].astype(np.float16))
    with pytest.raises(DataError, match='storage "fp16", now "fp32"'):
        extract(checkpoint, root, replace(CONFIG, what="tiles", encoder="half"))


def test_values_too_large_for_half_precision(tmp_path: Path) -> None:
    path, layout = tmp_path / "s.h5", tile_files.Layout(2, "fp16")
    with (
        pytest.raises(DataError, match=r"fp16.*7e\+04"),
        tile_files.create(path, np.zeros((1, 2), np.int64), layout, {}, {}) as file,
    ):
        file.write(np.array([0]), torch.tensor([[1.0, 7e4]]))
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_finite_fail_their_slide_only(root: Path, counted, monkeypatch) -> None:
    forward = counted.forward
    monkeypatch.setattr(counted, "forward", lambda x, **o: forward(x * (1 if counted.seen >= 7 else np.nan), **o))
    summary = extract("RUN", root, CONFIG)
    assert summary.exit_code == 2 and "finite" in summary.failures["a_b"]
    assert {Path(name).name[0] for name in all_files(root)} == {"c"}


def test_two_encoders_side_by_side(root: Path, tmp_path: Path) -> None:
    first, second = (str(save_checkpoint(tmp_path / name / "model.pt", seed=i)) for i, name in enumerate("xy"))
    extract(first, root, replace(CONFIG, encoder="x"))
    extract(second, root, replace(CONFIG, encoder="y"))
    folders = {path.name for path in root.iterdir() if path.is_dir()} - {"coordinates", "patch_256_pretraining"}
    assert folders == {f"{kind}_{name}" for kind in ("features", "region_4096_pretraining") for name in "xy"}
    assert not (root / "extract.json").exists()
    with pytest.raises(DataError, match="encoder=NAME") as caught:
        extract(second, root, replace(CONFIG, encoder="x"))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="grids of .* found those of x, y; name one encoder"):
        find_grids(root)
    with pytest.raises(DataError, match="'z'.*encoders in .*: x, y"):
        find_grids(root, "z")
    extract(first, root, CONFIG)  # also without a name, as in earlier versions
    assert {"features_model", "region_4096_pretraining"} <= {path.name for path in root.iterdir()}
    with pytest.raises(DataError, match="features_model.*different settings"):  # of another file with the same name
        extract(second, root, replace(CONFIG, what="tiles"))


def test_level_2_is_trained_on_and_reads_the_grids_of_a_named_encoder(root: Path, tmp_path: Path) -> None:
    for seed, name in enumerate("xy"):
        extract(str(save_checkpoint(tmp_path / name / "model.pt", seed=seed)), root, replace(CONFIG, encoder=name))
    words = {**TINY, "training.max_steps": 2, "training.batch_size_per_gpu": 2, "data_dir": str(root)}
    words |= {"output_dir": str(tmp_path / "run"), "model.arch": "vit:dim=8,depth=1,heads=2"}
    with pytest.raises(DataError, match="name one encoder"):
        pretrain(load_config(RegionConfig, overrides=words))
    pretrain(load_config(RegionConfig, overrides={**words, "encoder": "y"}))
    assert info(str(tmp_path / "run"))["grids"]["model"].endswith("y/model.pt")

    summary = extract(str(tmp_path / "run"), root, replace(CONFIG, encoder="z"))  # finds the grids that it is made for
    assert (summary.written, summary.embedded) == (4, 3)
    regions = {name: root / f"region_features_z/{name}.h5" for name in SIZES}
    for name, path in regions.items():
        bag, slide = open_bag(path), open_bag(root / f"slide_features_z/{name}.h5")
        assert bag.coords.tolist() == [[r.x, r.y] for r in read_regions(root) if r.slide_id == name]
        assert bag.attributes["patch_size"] == 4 * S and bag.attributes["encoder"] == "z"
        np.testing.assert_allclose(slide.read()[0], bag.read().mean(0), rtol=1e-5, atol=1e-6)
        with h5py.File(slide.path) as file:  # TRIDENT: one vector
            assert file["features"].shape == (8,) and "name" in file["features"].attrs
    grid = read_grid(root / "region_4096_pretraining_y" / read_regions(root)[0].path.name)
    with torch.inference_mode():
        vector = load_backbone(str(tmp_path / "run"))(grid[None])
    np.testing.assert_allclose(vector.numpy(), open_bag(regions["a_b"]).read()[:1], rtol=1e-4, atol=1e-5)
    assert extract(str(tmp_path / "run"), root, replace(CONFIG, encoder="z")).skipped == 4
    with pytest.raises(DataError, match="y/model.pt.*x/model.pt"):
        extract(str(tmp_path / "run"), root, replace(CONFIG, encoder="z", grids="x"))
    with pytest.raises(DataError, match="'w'"):
        extract(str(tmp_path / "run"), root, replace(CONFIG, encoder="z", grids="w"))


def test_tiles_without_slides(root: Path, counted) -> None:
    for path in (root.parent / "slides").iterdir():
        path.unlink()
    cut = root / "patch_256_pretraining" / "imgs" / "a_b"
    next(cut.iterdir()).unlink()
    failed = extract("RUN", root, CONFIG)
    assert list(failed.failures) == ["a_b"] and "what=tiles for the tiles alone" in failed.failures["a_b"]
    again = make_root(root.parent / "sparse", replace(TILING, max_tiles_per_slide=5))
    for path in (again.parent / "slides").iterdir():
        path.unlink()
    summary = extract("RUN", again, replace(CONFIG, what="tiles"))
    assert (summary.pixels, summary.written, summary.embedded) == ({"tiles": 2}, 2, 10)


def test_a_root_without_regions(tmp_path: Path, counted, capsys: pytest.CaptureFixture) -> None:
    root = make_root(tmp_path, replace(TILING, region_size_px=16 * S))
    summary = extract("RUN", root, CONFIG)
    assert summary.written == 2 and "no regions in regions.csv" in capsys.readouterr().out
    assert not (root / "region_4096_pretraining").exists() and not (root / "extract.json").exists()
    with pytest.raises(DataError, match="expected regions"):
        extract("RUN", root, replace(CONFIG, what="regions"))


def test_tiles_that_overlap(tmp_path: Path, counted) -> None:
    root = make_root(tmp_path, replace(TILING, overlap=0.5))
    summary = extract("RUN", root, CONFIG)
    bag = open_bag(root / "features_mean" / "c.h5")
    assert len(bag) == 17 * 7 and bag.attributes["overlap"] == S // 2
    assert counted.seen == summary.embedded == 17 * 7 + 13 * 11


def test_damaged_or_outdated_files_are_written_again(root: Path, counted) -> None:
    extract("RUN", root, CONFIG)
    before = all_files(root)
    path = root / "features_mean" / "c.h5"
    path.write_bytes(path.read_bytes()[:3000])
    assert extract("RUN", root, CONFIG).written == 1 and all_files(root) == before
    rows = (root / "tiles.csv").read_text().splitlines()
    (root / "tiles.csv").write_text("\n".join(row for row in rows if row != rows[-1]) + "\n")
    assert extract("RUN", root, CONFIG).written == 1 and len(open_bag(path)) == 35


def test_dry_run(root: Path, counted) -> None:
    before = set(root.rglob("*"))
    summary = extract("RUN", root, replace(CONFIG, dry_run=True))
    assert (summary.written, summary.embedded) == (5, 78)
    assert summary.gigabytes == pytest.approx((48 * 12 + 78 * (12 + 16)) / 1e9)
    assert set(root.rglob("*")) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"what": "tile"},
        {"features": "mean"},
        {"storage": "fp8"},
        {"encoder": "../x"},
        {"encoder": ""},
        {"what": "tiles", "source": "regions"},
    ],
)
def test_wrong_settings_are_rejected(root: Path, counted, wrong: dict[str, str]) -> None:
    before = set(root.rglob("*"))
    with pytest.raises(ConfigError):
        extract("RUN", root, replace(CONFIG, **wrong))
    assert set(root.rglob("*")) == before


def test_names_of_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "my patch"
    (run / "checkpoints").mkdir(parents=True)
    (run / "backbone").mkdir()
    for name in (run, run / "checkpoints" / "best.pt", run / "backbone", f"local-dir:{run}", f"{run}/"):
        assert encoder_name(str(name)) == "my_patch"
    monkeypatch.chdir(run)
    assert encoder_name(".") == "my_patch"
    assert encoder_name("models/hipt.v2.pth") == "hipt.v2"
    assert encoder_name("timm:vit_small_patch16_224.dino") == "vit_small_patch16_224.dino"
    assert encoder_name("timm:hf-hub:MahmoodLab/uni") == encoder_name("hf-hub:MahmoodLab/uni") == "MahmoodLab_uni"
    assert encoder_name("/") == encoder_name("...") == "encoder"


def test_cells_are_counted_as_they_are_planned(root: Path) -> None:
    regions = [region for region in read_regions(root) if region.slide_id == "c"]
    coords = np.array([[t.x, t.y] for t in read_tiles(root) if t.slide_id == "c"][3:])
    for records, places, done in ((regions, None, []), (regions[:1], coords, regions[1:]), ([], coords, regions)):
        plan = plan_cells(records, places, done)
        assert plan.cells == len(plan.units) == count_cells(records, places, done)
    with pytest.raises(DataError, match="once in tiles.csv, found 1 twice"):
        plan_cells([], coords[[0, 1, 1]])


def test_tiles_are_resized_to_the_size_that_is_asked_for(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A timm model of 512 px and 16 px patches: its features are timm's own at the other size, and never mixed."""
    folder = tmp_path / "large"
    vit = timm.create_model("test_vit", img_size=512, num_classes=0, dynamic_img_size=True).eval()
    timm.models.save_for_hf(vit, folder, model_args={"img_size": 512, "num_classes": 0, "dynamic_img_size": True})
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 512, 512]
    (folder / "config.json").write_text(json.dumps(config))

    plan = extract(str(folder), root, replace(CONFIG, what="tiles", dry_run=True))
    assert plan.embedded == 78
    said = " ".join(capsys.readouterr().out.split())
    assert "resizes tiles to 512 px: 1,024 tokens each (input_size=256: 256 tokens, and other features)" in said

    with pytest.raises(ConfigError, match="at least one patch of 16 px, found 5"):
        extract(str(folder), root, replace(CONFIG, what="tiles", input_size=5))
    extract(str(folder), root, replace(CONFIG, what="tiles", input_size=50))  # the nearest multiple of 16 is 48
    assert "tokens" not in capsys.readouterr().out
    with h5py.File(root / "features_large" / "c.h5") as file:
        found, coords = torch.from_numpy(file["features"][:]), file["coords"][:]
    with SlideReader(root.parent / "slides" / "c.tiff", read_tiling(root).geometry) as reader:
        pixels = torch.stack([torch.from_numpy(reader.read_cell(x, y).copy()) for x, y in coords[:5].tolist()])
    resized = resize(pixels.permute(0, 3, 1, 2).float() / 255, [48, 48], InterpolationMode.BICUBIC, antialias=True)
    mean, std = (torch.tensor(config["pretrained_cfg"][name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        wanted = vit.forward_features((resized.clamp(0, 1) - mean) / std)[:, 0]
    torch.testing.assert_close(found[:5], wanted, rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="transform"):
        extract(str(folder), root, replace(CONFIG, what="tiles", input_size=64))
