"""Own and external checkpoints, built here with the names that their authors use."""

import argparse
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch

from dino.errors import CheckpointError, ConfigError
from dino.models import weights
from dino.models.backbone import Backbone, BackboneSpec, build_backbone
from dino.models.checkpoint import Description, read_checkpoint, resolve_run
from dino.models.head import DINOHead
from dino.models.transforms import TRANSFORMS
from dino.models.weights import expect_level, init_from, load_backbone_file

NARROW = BackboneSpec("vit:dim=24,depth=2,heads=2", "patch", 3, (16, 16), 4)
ARCH = NARROW.arch
State = dict[str, torch.Tensor]


def tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.05 for name, shape in shapes.items()}


def block_shapes(depth: int, dim: int) -> dict[str, tuple[int, ...]]:
    layers = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,)}
    layers |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    shapes = {}
    for index in range(depth):
        for layer, shape in layers.items():
            shapes[f"blocks.{index}.{layer}.weight"] = shape
            shapes[f"blocks.{index}.{layer}.bias"] = shape[:1]
    return {**shapes, "norm.weight": (dim,), "norm.bias": (dim,)}


def vit_small_16() -> State:
    """Names and shapes of facebookresearch/dino's ViT-S/16."""
    first = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384)}
    first |= {"patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,)}
    return tensors({**first, **block_shapes(12, 384)})


def hipt_region() -> State:
    """Names and shapes of HIPT's VisionTransformer4K."""
    first = {"cls_token": (1, 1, 192), "pos_embed": (1, 197, 192), "phi.0.weight": (192, 384), "phi.0.bias": (192,)}
    return tensors({**first, **block_shapes(6, 192)})


def legacy_head(dim: int) -> State:
    shapes = {"head.mlp.0.weight": (8, dim), "head.mlp.0.bias": (8,), "head.last_layer.weight_g": (9, 1)}
    return tensors({**shapes, "head.last_layer.weight_v": (9, 8)})


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def dino_checkpoint(state: State, dim: int) -> dict:
    """The layout of main_dino.py: student under DDP, teacher bare, and the arguments of the run."""
    teacher = {**prefixed(state, "backbone."), **legacy_head(dim)}
    student = prefixed({name: tensor + 1 for name, tensor in teacher.items()}, "module.")
    arguments = argparse.Namespace(arch="vit_small", patch_size=16, lr=0.0005)
    return {"student": student, "teacher": teacher, "optimizer": {}, "epoch": 3, "args": arguments, "fp16_scaler": None}


LAYOUTS: dict[str, Callable[[State], dict]] = {
    "bare": lambda state: state,
    "main_dino": lambda state: dino_checkpoint(state, 64),
    "module": lambda state: {"teacher": prefixed(state, "module.backbone.")},
    "state_dict": lambda state: {"state_dict": prefixed(state, "module.")},
    "compiled": lambda state: {"teacher": prefixed(state, "_orig_mod.backbone.")},
    "compiled inside": lambda state: {"teacher": prefixed(state, "backbone._orig_mod.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_external_layouts_load_by_name(layout: str, tmp_path: Path) -> None:
    spec = BackboneSpec("vit:dim=64,depth=2,heads=1", "patch", 3, (16, 16), 4)
    state = build_backbone(spec, 0).vit.state_dict()
    torch.save(LAYOUTS[layout](state), tmp_path / "external.pth")
    loaded = load_backbone_file(tmp_path / "external.pth")
    assert loaded.backbone.spec == spec
    for name, tensor in loaded.backbone.vit.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert (loaded.report.loaded, loaded.report.missing) == (len(state), [])
    assert sorted(loaded.report.unexpected) == (sorted(legacy_head(64)) if layout == "main_dino" else [])


def test_facebookresearch_dino_vit_small_loads_by_name(tmp_path: Path) -> None:
    small = vit_small_16()
    torch.save(dino_checkpoint(small, 384), tmp_path / "external.pth")
    loaded = load_backbone_file(tmp_path / "external.pth")
    assert loaded.backbone.spec == BackboneSpec("vit_small", "patch", 3, (224, 224), 16, "dino")
    assert loaded.backbone.num_heads == 6
    assert torch.equal(loaded.backbone.vit.pos_embed, small["pos_embed"])  # kept as it is
    assert not loaded.own and loaded.transform is not None and loaded.transform.name == "imagenet"
    reference = timm.create_model("vit_small_patch16_224", num_classes=0).eval()
    reference.load_state_dict(small, strict=True)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(loaded.backbone(x).cls, reference(x), rtol=0, atol=2e-5)


def test_the_student_can_be_loaded(tmp_path: Path) -> None:
    state = build_backbone(NARROW, 0).vit.state_dict()
    torch.save(dino_checkpoint(state, 24), tmp_path / "external.pth")
    loaded = load_backbone_file(tmp_path / "external.pth", arch=ARCH, which="student")
    assert torch.equal(loaded.backbone.vit.cls_token, state["cls_token"] + 1)
    torch.save({"teacher": state}, tmp_path / "external.pth")
    with pytest.raises(CheckpointError, match="student"):
        load_backbone_file(tmp_path / "external.pth", arch=ARCH, which="student")


def test_hipt_level_2_loads_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = hipt_region()
    torch.save(dino_checkpoint(state, 192), tmp_path / "region.pth")
    loaded = load_backbone_file(tmp_path / "region.pth")
    assert loaded.backbone.spec == BackboneSpec("hvit_xs", "region", 384, (14, 14), 1, "dino")
    assert loaded.backbone.num_heads == 6 and loaded.transform is None
    assert torch.equal(loaded.backbone.vit.patch_embed.proj.weight, state["phi.0.weight"])
    assert loaded.backbone(torch.randn(1, 384, 16, 16)).cls.shape == (1, 192)
    printed = capsys.readouterr().out
    assert "no missing keys" in printed and "4 unexpected keys (head." in printed


def test_transforms(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "external.pth"
    torch.save(build_backbone(NARROW, 0).vit.state_dict(), file)
    assert load_backbone_file(file, ARCH).transform.mean == (0.485, 0.456, 0.406)  # type: ignore[union-attr]
    assert "HIPT itself used" in capsys.readouterr().out
    hipt = load_backbone_file(file, ARCH, "hipt").transform
    assert hipt is not None and (hipt.name, hipt.mean, hipt.std) == ("hipt", (0.5,) * 3, (0.5,) * 3)
    for wrong in ("timm", "macenko"):
        with pytest.raises(ConfigError, match="transform"):
            load_backbone_file(file, ARCH, wrong)


def damage(state: State, how: str) -> State:
    state = dict(state)
    if how == "missing":
        del state["blocks.1.norm2.bias"]
    elif how == "unexpected":
        state["blocks.1.extra.weight"] = torch.zeros(3)
    else:
        state["blocks.1.mlp.fc2.weight"] = torch.zeros(24, 95)
    return state


@pytest.mark.parametrize("how", ["missing", "unexpected", "expected"])
def test_any_mismatch_fails_and_names_the_tensor(how: str, tmp_path: Path) -> None:
    torch.save(damage(build_backbone(NARROW, 0).vit.state_dict(), how), tmp_path / "external.pth")
    with pytest.raises(CheckpointError, match=f"{how}.*blocks.1|blocks.1.*{how}") as caught:
        load_backbone_file(tmp_path / "external.pth", arch=ARCH)
    assert "\n" not in str(caught.value)


def test_what_tensors_do_not_determine_must_be_given(tmp_path: Path) -> None:
    file = tmp_path / "external.pth"
    state = build_backbone(NARROW, 0).vit.state_dict()
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"heads.*arch=vit:dim=24,depth=2,heads="):
        load_backbone_file(file)
    assert load_backbone_file(file, arch=ARCH).backbone.num_heads == 2
    torch.save({**state, "pos_embed": torch.zeros(1, 16, 24)}, file)
    with pytest.raises(CheckpointError, match="16 rows does not fit"):
        load_backbone_file(file, arch=ARCH)
    torch.save({**state, "pos_embed": torch.zeros(1, 14, 24)}, file)
    with pytest.raises(CheckpointError, match="square"):
        load_backbone_file(file, arch=ARCH)
    torch.save({"fc.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match="not a supported ViT"):
        load_backbone_file(file)


def test_registers_and_layer_scale_are_inferred(tmp_path: Path) -> None:
    for extra in ("registers=4", "registers=4,no_embed_class=1", "layer_scale=1e-05,mlp_ratio=2.0"):
        spec = replace(NARROW, arch=f"vit:dim=128,depth=1,heads=2,{extra}")
        model = build_backbone(spec, 0)
        torch.save(model.vit.state_dict(), tmp_path / "external.pth")
        loaded = load_backbone_file(tmp_path / "external.pth")
        assert loaded.backbone.spec.arch == build_arch(extra)
        x = torch.randn(1, 3, 16, 16)
        assert torch.equal(loaded.backbone(x).cls, model(x).cls)


def build_arch(extra: str) -> str:
    return f"vit:dim=128,depth=1,heads=2,{extra}"


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, (BOMB,)


BOMB = "exploded"


def test_pickled_code_is_rejected_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": {}, "args": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in ("bomb.pth", "bomb.pkl"):
        with pytest.raises(CheckpointError, match=r"would run code \(\w+\.mkdir\)") as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / BOMB).exists()
    torch.save({"args": argparse.Namespace(path=Path("x"))}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"would run code \(pathlib"):
        read_checkpoint(tmp_path / "other.pth")


def test_damaged_files_are_rejected(tmp_path: Path) -> None:
    file = tmp_path / "whole.pth"
    torch.save({"a": torch.arange(1000.0)}, file)
    whole = file.read_bytes()
    assert torch.equal(read_checkpoint(file, mmap=True)["a"], torch.arange(1000.0))
    place = whole.index(torch.arange(1000.0).numpy().tobytes()[400:800])
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    bad = {
        "cut": whole[: len(whole) // 2],
        "flipped": flipped,
        "text": b"hello",
        "empty": b"",
        "html": b"<html></html>",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00\x00")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (("cut.safetensors", "safetensors"), ("list.pth", "dictionary"), ("none.pth", "no such")):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / name)


def own_checkpoint(model: Backbone, step: int = 7) -> dict:
    head = DINOHead(model.embed_dim, 9, 8, 8)
    teacher = {**prefixed(model.vit.state_dict(), "backbone."), **prefixed(head.state_dict(), "head.")}
    transform = {"name": "hipt", "mean": [0.5] * 3, "std": [0.5] * 3}
    return {
        "format": "histodino/1",
        "level": model.spec.level,
        "step": step,
        "total_steps": 9,
        "spec": model.spec.to_dict(),
        "transform": None if model.spec.level == "region" else transform,
        "geometry": {"spacing_um": 0.5, "tile_size_px": 256},
        "teacher": teacher,
        "config": {"seed": 3},
        "versions": {"torch": "2"},
        "training_slides": {"slide_ids": ["a", "b"], "patient_ids": ["p"]},
    }


def test_a_run_means_its_best_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="neither"):
        resolve_run(tmp_path / "run")
    model = build_backbone(NARROW, 4)
    torch.save(own_checkpoint(model, 7), folder / "last.pt")
    loaded = load_backbone_file(tmp_path / "run")
    assert (loaded.own, loaded.step, loaded.spacing_um, loaded.tile_size_px) == (True, 7, 0.5, 256)
    assert loaded.config == {"seed": 3} and loaded.details["training_slides"]["slide_ids"] == ["a", "b"]
    assert loaded.transform is not None and loaded.transform.name == "hipt"
    assert loaded.backbone.spec == NARROW and not loaded.backbone.training
    x = torch.randn(2, 3, 24, 16)
    assert torch.equal(loaded.backbone(x).cls, model(x).cls)
    torch.save(own_checkpoint(model, 5), folder / "best.pt")
    assert load_backbone_file(tmp_path / "run").step == 5
    assert "using checkpoints/best.pt" in capsys.readouterr().out
    torch.save({**own_checkpoint(model), "format": "histodino/2"}, folder / "best.pt")
    with pytest.raises(CheckpointError, match="histodino/2"):
        load_backbone_file(tmp_path / "run")


def test_levels_are_not_mixed_up(tmp_path: Path) -> None:
    region = build_backbone(BackboneSpec(ARCH, "region", 5, (4, 4), 1), 0)
    torch.save(own_checkpoint(region), tmp_path / "region.pt")
    loaded = load_backbone_file(tmp_path / "region.pt")
    expect_level(loaded, "region")
    with pytest.raises(CheckpointError, match="expected a model of images"):
        expect_level(loaded, "patch")


def test_fingerprint_follows_the_weights_and_what_they_compute(tmp_path: Path) -> None:
    seen = set()
    for name, spec, seed in [
        ("a", NARROW, 0),
        ("seed", NARROW, 1),
        ("rule", replace(NARROW, pos_resample="timm"), 0),
        ("heads", replace(NARROW, arch="vit:dim=24,depth=2,heads=4"), 0),
    ]:
        torch.save(own_checkpoint(build_backbone(spec, seed)), tmp_path / name)
        seen.add(load_backbone_file(tmp_path / name).fingerprint)
    assert len(seen) == 4
    torch.save(own_checkpoint(build_backbone(NARROW, 0), step=99), tmp_path / "b")
    assert load_backbone_file(tmp_path / "b").fingerprint in seen


def test_initializing_from_a_file_takes_its_position_table(tmp_path: Path) -> None:
    source = build_backbone(NARROW, 1)
    torch.save(own_checkpoint(source), tmp_path / "start.pt")
    model = build_backbone(replace(NARROW, img_size=(24, 24), pos_resample="recomputed"), 0)
    init_from(model, tmp_path / "start.pt")
    assert model.spec == replace(NARROW, pos_resample="recomputed") and model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(x).cls, source(x).cls)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(NARROW, arch="vit:dim=24,depth=3,heads=2"), "blocks.2"),
        (replace(NARROW, arch="vit:dim=24,depth=2,heads=4"), "4 heads"),
        (replace(NARROW, patch_size=8), "patch size 8"),
        (BackboneSpec(ARCH, "region", 3, (4, 4), 1), "level 2"),
    ],
)
def test_initial_weights_that_do_not_fit_change_nothing(spec: BackboneSpec, message: str, tmp_path: Path) -> None:
    torch.save(own_checkpoint(build_backbone(NARROW, 1)), tmp_path / "start.pt")
    model = build_backbone(spec, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        init_from(model, tmp_path / "start.pt")
    assert model.spec == spec
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_timm_models_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_backbone_file("timm:test_vit", pretrained=False)
    assert loaded.backbone.spec == BackboneSpec("test_vit", "patch", 3, (160, 160), 16, "timm")
    assert loaded.transform is not None and (loaded.transform.name, loaded.transform.input_size_px) == ("timm", 160)
    assert loaded.fingerprint == load_backbone_file("timm:test_vit", pretrained=False).fingerprint
    with pytest.raises(ConfigError, match="timm name"):
        load_backbone_file("timm:vit_smal")

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("network is unreachable\nsecond line")

    monkeypatch.setattr(weights, "_ask_hub", lambda: None)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"unreachable.*local folder") as caught:
        load_backbone_file("timm:test_vit")
    assert "\n" not in str(caught.value)


def test_timm_weights_that_cannot_be_downloaded_fail_without_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: asked.append("download"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match=r"timm:test_vit\.r160_in1k: timm could not.*local folder") as caught:
        load_backbone_file("timm:test_vit.r160_in1k")
    assert asked == [] and "\n" not in str(caught.value)


def test_repositories_of_hugging_face_are_loaded_as_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As timm writes them: its config with mean and std, and the weights; no network is used here."""
    folder, asked = tmp_path / "snapshot", []
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    timm.models.save_for_hf(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.7, 0.6, 0.5]
    (folder / "config.json").write_text(json.dumps(config))

    def download(repository: str, **options: object) -> str:
        asked.append((repository, options["revision"], options["local_files_only"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(folder / "model.safetensors"))
    for source in ("hf-hub:lab/model", "timm:hf-hub:lab/model@v2"):
        loaded = load_backbone_file(source)
        assert loaded.source == source and loaded.transform is not None and loaded.transform.mean == (0.7, 0.6, 0.5)
        assert torch.equal(loaded.backbone.vit.norm.weight, model.norm.weight)
    assert asked == [("lab/model", None, True), ("lab/model", "v2", True)]

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(CheckpointError, match=r"hf-hub:lab/model: .*local folder") as caught:
        load_backbone_file("hf-hub:lab/model")
    assert len(asked) == 2 and "\n" not in str(caught.value)


def test_a_description_survives_plain_values() -> None:
    transform, slides = TRANSFORMS["hipt"], {"training_slides": {"slide_ids": ["a"], "patient_ids": []}}
    description = Description(NARROW, transform, 7, {"spacing_um": 0.5}, {"seed": 3}, {"total_steps": 9, **slides})
    content = json.loads(json.dumps(description.to_dict()))
    assert Description.from_dict(content, "x.pt") == description
    for key, value in (("geometry", [1]), ("training_slides", {"slide_ids": "a"}), ("transform", {"name": "hipt"})):
        with pytest.raises(CheckpointError, match="x.pt: expected a description"):
            Description.from_dict({**content, key: value}, "x.pt")
    with pytest.raises(CheckpointError, match=r"expected format histodino/1, found histodino/2"):
        Description.from_dict({**content, "format": "histodino/2"}, "x.pt")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_dinov3_qkvb", "vit_small_patch14_reg4_dinov2"])
def test_tensors_of_other_timm_models_load_with_their_name(name: str, tmp_path: Path) -> None:
    vit = timm.create_model(name, num_classes=0, img_size=224).eval()
    torch.save(vit.state_dict(), tmp_path / "external.pth")
    loaded = load_backbone_file(tmp_path / "external.pth", arch=name)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(x).cls, vit.forward_features(x)[:, 0], rtol=0, atol=1e-5)
