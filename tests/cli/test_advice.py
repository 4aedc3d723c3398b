"""Advice in errors works: it is followed here, and every setting that it names exists for the command."""

import ast
import csv
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import typer
from painted_slide import coordinates, write_slide
from safetensors.torch import save_file
from tiny_models import save_checkpoint
from tiny_runs import TINY_PATCH, make_tiles
from typer.core import TyperGroup
from typer.testing import CliRunner

from dino.cli.main import app
from dino.config import schema
from dino.config.load import RECIPES, REPLACED, settings
from dino.models import weights
from dino.slides import reader

DINO = Path(__file__).parents[2] / "dino"
GRID = ["tile_size_px=32", "region_size_px=128", "region_overlap_cells=3"]
TILE = [*GRID, "tissue_downsample=16", "min_tissue=0", "num_workers=1", "previews=false"]
EXTRACT = ["device=cpu", "precision=fp32"]
SHORT = [
    *(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in TINY_PATCH.items()),
    "training.max_steps=2",
]


def dino(*words: object) -> tuple[int, str]:
    """Exit code and output of a command, the output as one line."""
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def refused(*words: object) -> str:
    code, said = dino(*words)
    assert code == 2, said
    return said


def accepted(*words: object) -> str:
    code, said = dino(*words)
    assert code == 0, said
    return said


def write_list(path: Path, **columns: object) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), list(columns.values())])
    return path


def slide(path: Path, mpp: float | str | None = 0.5) -> Path:
    return write_slide(path, [coordinates(7 * 32, 6 * 32, 32)], mpp=mpp)


# ------------------------------------------------------------------------------------------- the advice is followed


def test_a_slide_without_spacing(tmp_path: Path) -> None:
    bare = slide(tmp_path / "bare.tiff", mpp=None)
    said = refused("tile", bare, tmp_path / "root", *TILE)
    assert "slide list" in said
    (advised,) = set(re.findall(r"spacing_at_level_0=[\d.]+", said))
    assert "(1 ok;" in accepted("tile", bare, tmp_path / "root", *TILE, advised)
    listed = write_list(tmp_path / "slides.csv", sample_id="bare", image_path=bare, spacing_at_level_0=0.25)
    accepted("tile", listed, tmp_path / "other", *TILE)


def test_a_slide_without_spacing_among_others(tmp_path: Path) -> None:
    """The others are not tiled again; another value is then another geometry."""
    slide(tmp_path / "slides" / "good.tiff")
    slide(tmp_path / "slides" / "bare.tiff", mpp=None)
    root = tmp_path / "root"
    refused("tile", tmp_path / "slides", root, *TILE)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("good*.jpg")}
    said = accepted("tile", tmp_path / "slides", root, *TILE, "spacing_at_level_0=0.5")
    assert "(2 ok; 1 done before)" in said
    assert before and before == {path: path.stat().st_mtime_ns for path in root.rglob("good*.jpg")}
    said = refused("tile", tmp_path / "slides", root, *TILE, "spacing_at_level_0=0.25")
    assert "was tiled with spacing_at_level_0=0.5 (now 0.25)" in said
    assert "was tiled with" in refused("tile", tmp_path / "slides", root, *TILE)


def test_a_slide_with_pixels_that_are_not_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd, read = slide(tmp_path / "odd.tiff"), reader._properties
    monkeypatch.setattr(reader, "_properties", lambda *paths: {**read(*paths), "openslide.mpp-y": "0.7"})
    said = refused("tile", odd, tmp_path / "root", *TILE)
    assert "set spacing_at_level_0 in the column of that name of the slide list" in said
    listed = write_list(tmp_path / "slides.csv", sample_id="odd", image_path=odd, spacing_at_level_0=0.5)
    assert "(1 ok;" in accepted("tile", listed, tmp_path / "root", *TILE)


def test_slides_that_are_too_coarse(tmp_path: Path) -> None:
    coarse = slide(tmp_path / "coarse.tiff", mpp=2.0)
    said = refused("tile", coarse, tmp_path / "root", *TILE)
    (advised,) = set(re.findall(r"spacing_um=[\d.]+", said))
    accepted("tile", coarse, tmp_path / "root", *TILE, advised)  # no tile of another spacing is there
    assert "another ROOT" in refused("tile", coarse, tmp_path / "root", *TILE)
    listed = write_list(tmp_path / "slides.csv", sample_id="coarse", image_path=coarse, spacing_at_level_0=0.5)
    accepted("tile", listed, tmp_path / "other", *TILE)


def test_a_second_model(tmp_path: Path) -> None:
    slides, root = slide(tmp_path / "slides" / "a.tiff"), tmp_path / "root"
    first, second = (save_checkpoint(tmp_path / f"{name}.pt", seed=seed) for seed, name in enumerate("ab"))
    accepted("tile", slides, root, *TILE)
    accepted("extract", first, root, *EXTRACT)
    kept = {path: path.read_bytes() for path in root.rglob("*.pt")}
    said = refused("extract", second, root, *EXTRACT)
    assert "give a name to its folders: encoder=NAME" in said
    accepted("extract", second, root, *EXTRACT, "encoder=b")
    assert len(list(root.rglob("*.pt"))) == 2 * len(kept) == 24
    assert kept == {path: path.read_bytes() for path in kept}
    (folder,) = re.findall(r"or delete (\S+) to compute them again", said)
    for path in Path(folder).iterdir():
        path.unlink()
    Path(folder).rmdir()
    accepted("extract", second, root, *EXTRACT)


def test_tiles_that_are_not_stored(tmp_path: Path) -> None:
    slides, root = slide(tmp_path / "a.tiff"), tmp_path / "root"
    accepted("tile", slides, root, *TILE, "storage=none")
    said = refused("pretrain", "patch", root, tmp_path / "run", *SHORT, "source=files")
    assert "(source=slides), or tile them with storage=jpeg into another ROOT" in said
    accepted("pretrain", "patch", root, tmp_path / "run", *SHORT, "dry_run=true", "source=slides")
    accepted("tile", slides, tmp_path / "other", *TILE, "storage=jpeg")
    accepted("pretrain", "patch", tmp_path / "other", tmp_path / "run", *SHORT, "dry_run=true")


def test_regions_that_do_not_fit(tmp_path: Path) -> None:
    slides, root = slide(tmp_path / "a.tiff"), tmp_path / "root"
    large = [word.replace("region_size_px=128", "region_size_px=1024") for word in TILE]
    assert "a smaller region_size_px (now 1024) and another ROOT give regions" in accepted("tile", slides, root, *large)
    model = save_checkpoint(tmp_path / "m.pt")
    assert "no regions in regions.csv" in accepted("extract", model, root, *EXTRACT)
    said = refused("extract", model, root, *EXTRACT, "what=regions")
    assert "smaller region_size_px into another ROOT" in said and "what=tiles" in said
    accepted("extract", model, root, *EXTRACT, "what=tiles")
    accepted("tile", slides, tmp_path / "other", *TILE)
    accepted("extract", model, tmp_path / "other", *EXTRACT)


def test_only_slides_that_are_held_out(tmp_path: Path) -> None:
    image, root = slide(tmp_path / "a.tiff"), tmp_path / "root"
    accepted(
        "tile", write_list(tmp_path / "slides.csv", sample_id="a", image_path=image, partition="test"), root, *TILE
    )
    said = refused("pretrain", "patch", root, tmp_path / "run", *SHORT)
    assert "change partition in slides.csv and run `dino tile` again, which cuts nothing twice" in said
    listed = write_list(tmp_path / "slides.csv", sample_id="a", image_path=image, partition="pretrain")
    assert "1 done before" in accepted("tile", listed, root, *TILE)
    accepted("pretrain", "patch", root, tmp_path / "run", *SHORT, "dry_run=true")


def commands_with_a_model(model: object, tmp_path: Path) -> dict[type, list[object]]:
    """Every command that loads a model, by the class of its settings."""
    tiles, labels = tmp_path / "tiles", tmp_path / "labels.csv"
    if not tiles.exists():
        names = [str(path) for path in sorted(make_tiles(tiles).iterdir())]
        rows = [f"{name},{i // 2 % 2},{('train', 'test')[i % 2]}" for i, name in enumerate(names)]
        labels.write_text("\n".join(["image_path,label,partition", *rows]))
        accepted("tile", slide(tmp_path / "a.tiff"), tmp_path / "root", *TILE)
    run = ["pretrain", "patch", tiles, tmp_path / "run", *SHORT, f"model.init={model}", "dry_run=true"]
    return {
        schema.ExtractConfig: ["extract", model, tmp_path / "root", *EXTRACT, "dry_run=true"],
        schema.KnnConfig: ["evaluate", "knn", model, labels, *EXTRACT, "k=1"],
        schema.ExportConfig: ["export", model, tmp_path / "export"],
        schema.InfoConfig: ["info", model],
        schema.PatchConfig: run,
    }


def named_settings(text: str) -> set[str]:
    """Settings that a text gives a value: words before an equals sign, but not in an architecture (vit:dim=...)."""
    return set(re.findall(r"(?<![-\w:.,=/])([a-z][a-z_0-9]*(?:\.[a-z_0-9]+)*)=", text))


def test_timm_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit = timm.create_model("test_vit", num_classes=5)
    folder = tmp_path / "downloaded"
    folder.mkdir()
    save_file(vit.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 160, 160]}}')

    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    with monkeypatch.context() as patched:
        patched.setattr(weights, "make_timm", fail)
        for kind, words in commands_with_a_model("timm:test_vit", tmp_path).items():
            said = refused(*words)
            advice = said[said.index("could not load its weights") :]
            assert "give a local folder with its config.json and model.safetensors" in advice
            assert named_settings(advice) <= {item.key for item in settings(kind)}
    for words in commands_with_a_model(folder, tmp_path).values():
        shape = "model.arch=test_vit model.patch_size=16 aug.global_crops_size=160 aug.local_crops_size=64"
        accepted(*words, *(shape.split() if words[0] == "pretrain" else []))


def test_a_checkpoint_whose_heads_are_unknown(tmp_path: Path) -> None:
    """Of 16 features: the number of heads is not a 64th of them."""
    content = torch.load(save_checkpoint(tmp_path / "own.pt"), weights_only=True)
    torch.save(content["teacher"], tmp_path / "external.pt")
    arch = "vit:dim=16,depth=1,heads=2"
    for kind, words in commands_with_a_model(tmp_path / "external.pt", tmp_path).items():
        said = refused(*words)
        assert "as arch=vit:dim=16,depth=1,heads=... (with model.init it is model.init_arch=...)" in said
        run = kind is schema.PatchConfig
        accepted(*words, *([f"model.init_arch={arch}", f"model.arch={arch}"] if run else [f"arch={arch}"]))


def test_normalization_that_is_not_recorded(tmp_path: Path) -> None:
    arch = "vit:dim=64,depth=1,heads=1"
    model = timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=1, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "external.pt")
    words = ["pretrain", "patch", make_tiles(tmp_path / "tiles"), tmp_path / "run", *SHORT, f"model.arch={arch}"]
    said = accepted(*words, f"model.init={tmp_path / 'external.pt'}", "dry_run=true")
    (command,) = set(re.findall(r"first `dino (export [^`]+)`", said))
    accepted(*shlex.split(command.replace("DIR", str(tmp_path / "hipt"))), "tile_size_px=32")
    said = accepted(*words, f"model.init={tmp_path / 'hipt'}", "dry_run=true")
    assert "transform hipt" in said and "no recorded normalization" not in said


def test_leakage_while_training(tmp_path: Path) -> None:
    """The setting has another name than that of `dino evaluate knn`."""
    slides, root = slide(tmp_path / "a.tiff"), tmp_path / "root"
    accepted("tile", slides, root, *TILE)
    tiles = sorted(root.rglob("imgs/*/*.jpg"))[:8]
    rows = [f"{path},{i % 2},{('train', 'val')[i // 4]}" for i, path in enumerate(tiles)]
    (tmp_path / "labels.csv").write_text("\n".join(["image_path,label,partition", *rows]))
    words = ["pretrain", "patch", root, tmp_path / "run", *SHORT, f"evaluate.labels={tmp_path / 'labels.csv'}"]
    said = refused(*words, "evaluate.k=1")
    (advised,) = set(re.findall(r"[\w.]*allow_leakage=true", said))
    accepted(*words, "evaluate.k=1", advised)


def test_a_longer_run_of_steps(tmp_path: Path) -> None:
    words = ["pretrain", "patch", make_tiles(tmp_path / "tiles"), *SHORT, "training.warmup_epochs=1"]
    said = accepted(*words, tmp_path / "run")
    assert "training.warmup_epochs=1 is not shorter" in said and "or raise training.max_steps" in said
    assert "is not shorter" not in accepted(*words, tmp_path / "new", "training.max_steps=6", "dry_run=true")


def test_other_settings_for_a_run_that_exists(tmp_path: Path) -> None:
    words = ["pretrain", "patch", make_tiles(tmp_path / "tiles"), *SHORT]
    accepted(*words, tmp_path / "run")
    assert "dino resume" not in refused(*words, tmp_path / "run", "optim.lr=0.01")
    said = refused(*words, tmp_path / "run", "training.max_steps=4")
    (start,) = re.findall(r"model\.init=\S+", said)
    accepted(*words, tmp_path / "new", "training.max_steps=4", "optim.lr=0.01", start, "dry_run=true")
    (command,) = re.findall(r"`dino (resume [^`]+)`", said)
    assert "is extended: steps 2 to 52" in accepted(*shlex.split(command), "dry_run=true")


# ----------------------------------------------------------------------------- settings that are named in messages

RUN = (schema.PatchConfig, schema.RegionConfig)
ANY = tuple(value for name, value in vars(schema).items() if name.endswith("Config") and isinstance(value, type))
# The commands that execute a module. Modules of models, and those of all commands, name settings of several.
COMMANDS: dict[str, tuple[type, ...]] = {
    "slides": (schema.TileConfig,),
    "extraction": (schema.ExtractConfig,),
    "evaluate": (schema.KnnConfig, *RUN),
    "evaluate/confounders.py": (schema.RobustnessConfig,),
    "evaluate/robustness.py": (schema.RobustnessConfig,),
    "evaluate/slides.py": (schema.SlideConfig,),
    "api/features.py": (schema.SlideConfig,),
    "api/evaluating_slides.py": (schema.SlideConfig,),
    "objectives": RUN,
    "crops": RUN,
    "data": RUN,
    "train": (*RUN, schema.ResumeConfig),
    "api/launching.py": (schema.LaunchConfig,),
    "api/pretraining.py": RUN,
    "api/run.py": RUN,
    "api/levels.py": RUN,
    "api/judging.py": RUN,
    "api/measuring.py": RUN,
    "api/sources.py": RUN,
    "api/roots.py": (*RUN, schema.TileConfig, schema.ExtractConfig),
    "api/rehearsal.py": RUN,
    "extraction/prototypes.py": (schema.WordsConfig, schema.ExtractConfig),
    "extraction/words.py": (schema.WordsConfig,),
}
# Of another command, which the message names: `dino tile`, or tiling in words.
OF_OTHERS = {
    "extraction": {"spacing_um", "storage", "region_size_px"},
    "slides": {"slides", "filter"},  # of extraction and training
}


# Of architectures, arguments of timm and torch, and a file.
NOT_SETTINGS = {"dim", "depth", "heads", "num_classes", "weights_only", "key", "model.safetensors"}


def texts(path: Path) -> Iterator[str]:
    """Every text of a module but its docstrings; what is inserted is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        if isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def keys_of(kinds: tuple[type, ...]) -> set[str]:
    """The settings and groups of settings."""
    keys = {item.key for kind in kinds for item in settings(kind)}
    return keys | {key.rsplit(".", 1)[0] for key in keys if "." in key}


def test_settings_in_messages_exist_for_the_command_that_raises_them() -> None:
    groups = {key.split(".")[0] for key in keys_of(ANY) if "." in key}
    found, checked = [], 0
    for path in sorted(DINO.rglob("*.py")):
        name = path.relative_to(DINO).as_posix()
        package = name.split("/")[0]
        allowed = keys_of(COMMANDS.get(name) or COMMANDS.get(package) or ANY)
        allowed |= OF_OTHERS.get(package, set()) | NOT_SETTINGS | (set(REPLACED) if name == "config/load.py" else set())
        for text in texts(path):
            dotted = set(re.findall(r"\b([a-z]+(?:\.[a-z_0-9]+)+)\b", text))
            named = {key for key in dotted if key.split(".")[0] in groups}
            named |= {key for key in named_settings(text) if "." not in key} if " " in text else set()
            checked += len(named)
            found += [f"{name}: {key} in {text!r}" for key in named if key not in allowed]
    assert found == [] and checked > 150


def test_commands_and_recipes_in_messages_exist() -> None:
    said = [text for path in sorted(DINO.rglob("*.py")) for text in texts(path)]
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    commands = {words for text in said for words in re.findall(r"`dino ([a-z]+)\b", text)}
    assert len(commands) >= 6 and commands <= set(group.commands)
    recipes = {name for text in said for name in re.findall(r"--recipe ([a-z_0-9]+)", text)}
    assert recipes and recipes <= {name for names in RECIPES.values() for name in names}
