"""Exports read back by timm in a fresh process and by this package; the description of checkpoints."""

import csv
import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from painted_slide import halved, noise, write_slide
from safetensors.torch import load_file
from tiny_runs import config as run_config
from tiny_runs import negative

import dino
from dino import api
from dino.api.exporting import export, info, load_backbone
from dino.config.schema import ExportConfig, KnnConfig, TileConfig
from dino.errors import ConfigError, DataError
from dino.models.backbone import Backbone, BackboneSpec, build_backbone

# Level 1 must load where this package was never imported; level 2 once it is, although timm came before it.
FRESH = """
import sys, timm, torch
from pathlib import Path

def run(folder):
    model = timm.create_model(f"local-dir:{folder / 'out'}", pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        found = model(torch.load(folder / "x.pt"))
    torch.save((found, model.pretrained_cfg["mean"], model.pretrained_cfg["input_size"]), folder / "y.pt")

root = Path(sys.argv[1])
[run(folder) for folder in sorted(root.glob("patch*"))]
assert "dino" not in sys.modules
import dino
[run(folder) for folder in sorted(root.glob("region*"))]
"""

CASES = {
    "patch": (BackboneSpec("vit_tiny", "patch", 3, (224, 224), 16), (256, 256)),
    "patch, registers": (
        BackboneSpec(
            "vit:dim=24,depth=2,heads=2,registers=3,layer_scale=0.3,no_embed_class=1",
            "patch",
            3,
            (96, 96),
            16,
            "recomputed",
        ),
        (256, 256),
    ),
    "region": (BackboneSpec("hvit_xs", "region", 384, (14, 14), 1), (16, 16)),
    "region, rectangular": (BackboneSpec("vit:dim=24,depth=2,heads=3", "region", 7, (7, 7), 1), (8, 6)),
}


def checkpoint(model: Backbone, path: Path, cells: list[int] | None = None) -> Path:
    """A checkpoint of this package, with weights that make positions matter."""
    with torch.no_grad():
        for parameter in (model.vit.pos_embed, model.vit.cls_token):
            parameter.mul_(20)
    spec = model.spec
    transform = {"name": "hipt", "mean": [0.5] * 3, "std": [0.5] * 3} if spec.level == "patch" else None
    content = {
        "format": "histodino/1",
        "level": spec.level,
        "step": 7,
        "total_steps": 9,
        "spec": spec.to_dict(),
        "transform": transform,
        "geometry": {"spacing_um": 0.5, "tile_size_px": 256, **({"region_cells": cells} if cells else {})},
        "teacher": {f"backbone.{name}": tensor for name, tensor in model.vit.state_dict().items()},
        "config": {"seed": 3},
        "training_slides": {"slide_ids": ["a", "b"], "patient_ids": []},
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per case: the export, an input, our features, and timm's from a fresh process."""
    root = tmp_path_factory.mktemp("exports")
    for name, (spec, size) in CASES.items():
        (root / name).mkdir()
        model = build_backbone(spec, 0)
        source = checkpoint(model, root / name / "last.pt", list(size) if spec.level == "region" else None)
        export(str(source), root / name / "out", ExportConfig())
        x = torch.randn(2, spec.input_dim, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.save(model(x).cls, root / name / "expected.pt")
        torch.save(x, root / name / "x.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(root)], check=True)
    return root


@pytest.mark.parametrize("case", CASES)
def test_timm_gives_our_features_from_an_export(case: str, exported: Path) -> None:
    spec, size = CASES[case]
    found, mean, input_size = torch.load(exported / case / "y.pt")
    torch.testing.assert_close(found, torch.load(exported / case / "expected.pt"), rtol=0, atol=1e-5)
    assert tuple(input_size) == (spec.input_dim, *size)
    if spec.level == "patch":
        assert tuple(mean) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("case", CASES)
def test_an_export_loads_here_too(case: str, exported: Path) -> None:
    spec, _ = CASES[case]
    model = load_backbone(exported / case / "out")
    with torch.no_grad():
        found = model(torch.load(exported / case / "x.pt"))
    torch.testing.assert_close(found, torch.load(exported / case / "expected.pt"), rtol=0, atol=1e-5)
    assert (model.transform.name if model.transform else None) == ("hipt" if spec.level == "patch" else None)
    assert model.spec.pos_resample == spec.pos_resample and not model.training


def test_external_checkpoints_and_timm_models_are_exported_too(tmp_path: Path) -> None:
    model = build_backbone(CASES["patch"][0], 0)
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in model.vit.state_dict().items()}}, tmp_path / "f.pth")
    export(str(tmp_path / "f.pth"), tmp_path / "out", ExportConfig(transform="hipt", tile_size_px=96))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3 and config["model_args"]["img_size"] == [96, 96]
    assert info(str(tmp_path / "out"))["kind"] == "external"
    assert load_file(tmp_path / "out" / "model.safetensors")["pos_embed"].shape == (1, 37, 192)
    with pytest.raises(ConfigError, match="multiple of the patch size 16, found 100: choose 96 or 112"):
        export(str(tmp_path / "f.pth"), tmp_path / "out", ExportConfig(tile_size_px=100))


def test_a_timm_folder_of_others_loads(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    vit = timm.create_model("test_vit", num_classes=5).eval()
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "num_classes": 5, "pretrained_cfg": {"input_size": [3, 160, 160]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": {"num_classes": 5}}))
    model = load_backbone(tmp_path)
    x = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(model(x), vit.forward_features(x)[:, 0], rtol=0, atol=1e-5)
    assert model.transform is not None and model.transform.input_size_px == 160


def test_info_says_what_a_checkpoint_is(tmp_path: Path) -> None:
    model = build_backbone(CASES["region, rectangular"][0], 0)
    said = info(str(checkpoint(model, tmp_path / "last.pt", [8, 6])))
    expected = {"kind": "trained by histodino", "level": "region", "input_dim": 7, "embed_dim": 24, "depth": 2}
    expected |= {"num_heads": 3, "patch_size": 1, "position_table": [7, 7], "pos_resample": "dino", "transform": None}
    expected |= {"spacing_um": 0.5, "tile_size_px": 256, "region_cells": [8, 6], "step": 7, "total_steps": 9}
    expected |= {"training_slides": 2, "config": {"seed": 3}, "left_over": []}
    assert {key: said[key] for key in expected} == expected
    assert said["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def private_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two slides of a patient each, in a folder with a name in it; ``run/`` has ``labels.csv`` beside it."""
    folder = tmp_path_factory.mktemp("home") / "annasmith"
    folder.mkdir()
    rows = [("sample_id", "image_path", "patient_id")]
    for seed, (slide, patient) in enumerate([("S19-4711", "P-1961"), ("S20-0815", "P-1984")]):
        write_slide(folder / f"{slide}.tiff", [noise(517, 391, seed), halved(noise(517, 391, seed))])
        rows.append((slide, f"{slide}.tiff", patient))
    with (folder / "slides.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    settings = TileConfig(tile_size_px=64, region_size_px=256, num_workers=1)
    assert api.tile([folder / "slides.csv"], folder / "root", settings).exit_code == 0
    cut = sorted((folder / "root").glob("patch_*/imgs/*/*.jpg"))[:6]
    tiles = [negative(path, folder / "labelled") for path in cut]
    parts = ("train", "train", "val", "val", "test", "test")
    lines = [f"{path},{i % 2},{parts[i]},new{i}" for i, path in enumerate(tiles)]
    (folder / "labels.csv").write_text("\n".join(["image_path,label,partition,slide_id", *lines]))
    init = checkpoint(
        build_backbone(BackboneSpec("vit:dim=32,depth=2,heads=2", "patch", 3, (32, 32), 16), 0), folder / "i.pt"
    )
    changes = {"training.max_steps": 2, "evaluate.labels": str(folder / "labels.csv"), "evaluate.k": [1]}
    api.pretrain(run_config(folder / "root", folder / "run", **{"model.init": str(init), **changes}))
    return folder / "run"


IDS = {"S19-4711", "S20-0815", "P-1961", "P-1984"}


def test_an_export_names_neither_slides_nor_patients_nor_folders(private_run: Path, tmp_path: Path) -> None:
    export(str(private_run), tmp_path / "shared", ExportConfig())
    export(str(tmp_path / "shared"), tmp_path / "again", ExportConfig())
    for folder in (private_run / "backbone", tmp_path / "shared", tmp_path / "again"):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert files.keys() == {"config.json", "model.safetensors"}
        for private in (*IDS, "annasmith", str(tmp_path), f"{getpass.getuser()}/", f'"{platform.node()}'):
            assert not [name for name, content in files.items() if private.encode() in content], private
    said = info(str(tmp_path / "shared"))
    contained = {"slides": "2 salted hashes", "patients": "2 salted hashes", "folders": "none"}
    assert said["contains"] == {**contained, "labels": "4 salted hashes of the files that chose the checkpoint"}
    assert said["training_slides"] == 2 and said["config"]["optim"]["lr"] == 0.05
    assert said["config"]["model"]["init"] == "i.pt"
    plain = info(str(private_run))["contains"]
    assert plain["slides"] == "2 ids" and {"data_dir", "output_dir", "model.init"} <= set(plain["folders"].split(", "))


def test_an_export_has_ids_if_asked_and_no_folders(private_run: Path, tmp_path: Path) -> None:
    export(str(private_run), tmp_path / "out", ExportConfig(ids=True))
    text = (tmp_path / "out" / "config.json").read_text()
    assert "annasmith" not in text and {name for name in IDS if name in text} == IDS
    with pytest.raises(ConfigError, match="found only hashes; export the run itself"):
        export(str(private_run / "backbone"), tmp_path / "out", ExportConfig(ids=True))


def test_leakage_is_found_with_an_export(private_run: Path) -> None:
    config = KnnConfig(k=[1], device="cpu", precision="fp32")
    rows = (private_run.parent / "labels.csv").read_text().splitlines()[1:]
    for slide, patient, seen in [("S19-4711", "new", "S19-4711"), ("new", "P-1984", "P-1984"), ("new", "new", "")]:
        lines = [f"{row.rsplit(',', 1)[0]},{slide},{patient}" for row in rows]
        table = private_run.parent / f"{slide}-{patient}.csv"
        table.write_text("\n".join(["image_path,label,partition,slide_id,patient_id", *lines]))
        if seen:
            with pytest.raises(DataError, match=rf"not been pretrained on, found 1 that it has \({seen}\)"):
                api.evaluate_knn(str(private_run / "backbone"), table, config)
        else:
            leakage = api.evaluate_knn(str(private_run / "backbone"), table, config)["about"]["leakage"]
            assert leakage["compared"] == "slides by slide_id and patients by patient_id"


@pytest.mark.parametrize("order", ["import dino, timm", "import timm, dino"])
def test_importing_the_package_registers_region_architectures(order: str) -> None:
    code = f"""
import sys
before = list(sys.meta_path)
{order}
assert timm.is_model("hvit_xs") and timm.create_model("hvit_xs").embed_dim == 192
assert not any(type(finder).__module__.startswith("dino") for finder in sys.meta_path)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("argv", "orig_argv", "command"),
    [
        (["/venv/bin/dino", "info"], ["python", "/venv/bin/dino", "info"], True),
        (["-m", "info"], ["python", "-u", "-m", "dino", "info"], True),
        (["/venv/bin/dino"], ["python", "-c", "from multiprocessing.spawn import spawn_main", "x"], True),
        (["-c"], ["python", "-c", "from multiprocessing.forkserver import main"], True),
        (["-m"], ["python", "-m", "pytest", "dino"], False),
        (["-c"], ["python", "-c", "import dino"], False),
        (["train.py", "dino"], ["python", "train.py", "dino"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_commands_and_workers_start_without_timm(argv: list[str], orig_argv: list[str], command: bool) -> None:
    assert dino._is_command(argv, orig_argv) is command
