"""From a run, a file, an export or a timm name to a backbone with its weights and its transform."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.errors import CheckpointError, DinoError
from dino.files import read_json
from dino.models.backbone import Backbone, BackboneSpec, init_weights, make_timm
from dino.models.foreign import backbone_tensors, infer_spec
from dino.models.reading import fingerprint, read_checkpoint, read_safetensors, resolve_run
from dino.models.transforms import TRANSFORMS, Transform, choose_transform, timm_transform
from dino.progress import say

FORMAT = "histodino/1"
TIMM = "timm:"
DETAILS = ("total_steps", "versions", "training_slides")
SECTION = "histodino"  # of an export's config.json
__all__ = [
    "TRANSFORMS",
    "LoadReport",
    "LoadedBackbone",
    "Transform",
    "expect_level",
    "init_from",
    "load_backbone_file",
    "load_tensors",
    "read_checkpoint",
    "resolve_run",
]

ADAPTABLE = {"img_size", "num_classes", "global_pool", "in_chans", "dynamic_img_size"}


@dataclass(frozen=True)
class LoadReport:
    """What happened to each tensor's name; ``unexpected`` are those left over, the heads."""

    loaded: int
    missing: list[str]
    unexpected: list[str]


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone and what is known about it.

    Attributes:
        backbone: In eval mode, float32, on the CPU.
        transform: None for level 2.
        level: ``patch`` or ``region``.
        report: What was loaded and what was left over.
        source: Path of the file or folder, or ``timm:NAME``.
        spacing_um: µm per px that it was trained at, where known.
        tile_size_px: Side of the tiles that it was trained on, where known.
        region_cells: (h, w) of the grids that a level-2 model was trained on, where known.
        own: Whether this package trained it.
        step: Optimizer steps of training, where known.
        config: Settings of the run, where known.
        fingerprint: SHA-256 of the weights, the head count and the position rule.
        details: The rest that a checkpoint of this package says: total_steps, versions, training_slides.
    """

    backbone: Backbone
    transform: Transform | None
    level: str
    report: LoadReport
    source: str
    spacing_um: float | None = None
    tile_size_px: int | None = None
    region_cells: tuple[int, int] | list[int] | None = None
    own: bool = False
    step: int | None = None
    config: dict | None = None
    fingerprint: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def load_backbone_file(
    path: str | Path, arch: str | None = None, transform: str = "auto", which: str = "teacher", pretrained: bool = True
) -> LoadedBackbone:
    """Load a backbone by the names of its tensors; print what was loaded and left over.

    Args:
        path: A run folder, a checkpoint of this package, an export, a foreign checkpoint, or ``timm:NAME``.
        arch: Architecture of a foreign checkpoint, where its tensors do not tell.
        transform: ``auto`` (the checkpoint's own, else imagenet with a warning), ``imagenet``, ``hipt`` or ``timm``.
        which: ``teacher`` or ``student``.
        pretrained: For ``timm:NAME``: load timm's weights, or start new ones.

    Raises:
        CheckpointError: The source is missing, damaged, unsafe, or any of its backbone's tensors does not fit.
        ConfigError: ``arch`` or ``transform`` is unknown or does not fit.
    """
    source = str(path)
    if source.startswith(TIMM):
        loaded = _from_timm(source.removeprefix(TIMM), pretrained)
    elif (Path(path) / "config.json").is_file():
        with _readable(source):
            loaded = _from_folder(Path(path), arch)
    else:
        file = resolve_run(Path(path)) if Path(path).is_dir() else Path(path)
        content = read_checkpoint(file, mmap=True)
        if str(content.get("format", "")).startswith(f"{SECTION}/"):
            with _readable(source):
                loaded = _from_own(content, str(file), which)
        else:
            tensors, left_over = backbone_tensors(content, which, str(file))
            loaded = _load(infer_spec(tensors, arch, str(file), "dino"), tensors, left_over, str(file))
    if loaded.level == "patch":
        loaded = replace(loaded, transform=choose_transform(transform, loaded.transform, source))
    loaded.backbone.eval()
    _announce(loaded)
    return loaded


def init_from(backbone: Backbone, source: str | Path, arch: str | None = None) -> LoadedBackbone:
    """Give a backbone the weights of another as its start; nothing changes when any of them does not fit.

    The source's position table is taken as it is: the backbone's table, and ``img_size`` in its spec, become those of
    the source. Call it before optimizers and wrappers see the parameters.

    Args:
        backbone: What to start; its rule for resizing positions stays.
        source: As in ``load_backbone_file``.
        arch: Architecture of a foreign source, where its tensors do not tell.

    Raises:
        CheckpointError: The source cannot be read, is of another level, or its tensors do not fit.
    """
    loaded = load_backbone_file(source, arch)
    expect_level(loaded, backbone.spec.level)
    spec = replace(backbone.spec, img_size=loaded.backbone.spec.img_size)
    if loaded.backbone.num_heads != backbone.num_heads:
        raise CheckpointError(
            f"{source}: expected {backbone.num_heads} heads as in model.arch={spec.arch}, found "
            f"{loaded.backbone.num_heads}: choose another model.arch, or give model.init_arch"
        )
    tensors = loaded.backbone.vit.state_dict()
    if tensors["patch_embed.proj.weight"].shape != backbone.vit.patch_embed.proj.weight.shape:
        found, own = loaded.backbone.spec, backbone.spec
        raise CheckpointError(
            f"{source}: expected input dim {own.input_dim} and patch size {own.patch_size}, "
            f"found {found.input_dim} and {found.patch_size}"
        )
    fresh = _load(spec, tensors, [], str(source)).backbone
    backbone.vit, backbone.spec = fresh.vit.train(backbone.training), spec
    return loaded


def expect_level(loaded: LoadedBackbone, level: str) -> None:
    """Raise CheckpointError unless the backbone is of ``level``."""
    if loaded.level != level:
        takes = {"patch": "images (level 1)", "region": "feature grids (level 2)"}
        raise CheckpointError(
            f"{loaded.source}: expected a model of {takes[level]}, found one of {takes[loaded.level]}: "
            f"give a {level} model"
        )


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load by name; everything must be there and of its shape, else CheckpointError and ``module`` stays as it was."""
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    for name in own.keys() & tensors.keys():
        if own[name].shape != tensors[name].shape:
            wrong.append(f"{name}: expected {tuple(own[name].shape)}, found {tuple(tensors[name].shape)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{source}: its tensors do not fit the model: {'; '.join(sorted(wrong)[:5])}{more}")
    module.load_state_dict(dict(tensors))


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Refuse a file whose description of its model holds values of another kind than this package writes."""
    try:
        yield
    except DinoError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{source}: expected a description of the model as this package writes it, found values of another kind "
            f"({type(error).__name__}: {' '.join(str(error).split())[:120]}): copy or export it again"
        ) from error


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table of keys in a description; empty where there is none."""
    value = content.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{key} is {type(value).__name__}")
    return value or {}


def _load(spec: BackboneSpec, tensors: Mapping[str, Tensor], left_over: list[str], source: str) -> LoadedBackbone:
    with torch.random.fork_rng(devices=[]):  # making a model draws numbers
        backbone = Backbone(spec)
    load_tensors(backbone.vit, tensors, source)
    return _described(backbone, LoadReport(len(tensors), [], left_over), source)


def _described(backbone: Backbone, report: LoadReport, source: str) -> LoadedBackbone:
    mark = fingerprint(backbone, f"heads={backbone.num_heads} pos_resample={backbone.spec.pos_resample}")
    return LoadedBackbone(backbone, None, backbone.spec.level, report, source, fingerprint=mark)


def _from_own(content: Mapping[str, Any], source: str, which: str) -> LoadedBackbone:
    if content["format"] != FORMAT:
        raise CheckpointError(f"{source}: expected format {FORMAT}, found {content['format']}: update this package")
    tensors, left_over = backbone_tensors(content, which, source)
    loaded = _load(BackboneSpec.from_dict(dict(_table(content, "spec"))), tensors, left_over, source)
    return _with_history(loaded, content)


def _with_history(loaded: LoadedBackbone, content: Mapping[str, Any]) -> LoadedBackbone:
    geometry, stored = _table(content, "geometry"), _table(content, "transform")
    for key, ids in _table(content, "training_slides").items():
        if not isinstance(ids, list):
            raise TypeError(f"training_slides.{key} is {type(ids).__name__}")
    return replace(
        loaded,
        transform=Transform.from_dict(stored) if stored else None,
        spacing_um=geometry.get("spacing_um"),
        tile_size_px=geometry.get("tile_size_px"),
        region_cells=geometry.get("region_cells"),
        own=bool(content.get("own", True)),
        step=content.get("step"),
        config=dict(_table(content, "config")) or None,
        details={key: content[key] for key in DETAILS if key in content},
    )


def _from_folder(folder: Path, arch: str | None) -> LoadedBackbone:
    """A timm folder: an export of this package, or any other of a supported architecture."""
    try:
        config = read_json(folder / "config.json")
        content, name = config.get(SECTION), config["architecture"]
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json: not a timm config ({error!r})") from error
    tensors, left_over = backbone_tensors(read_safetensors(folder / "model.safetensors"), "teacher", str(folder))
    if content:
        loaded = _load(BackboneSpec.from_dict(dict(_table(content, "spec"))), tensors, left_over, str(folder))
        return _with_history(loaded, content)
    special = sorted(set(config.get("model_args") or {}) - ADAPTABLE)
    if special and arch is None:
        raise CheckpointError(f"{folder}: {name} with its own {', '.join(special)} cannot be rebuilt: give arch=")
    loaded = _load(infer_spec(tensors, arch or name, str(folder), "timm"), tensors, left_over, str(folder))
    return replace(loaded, transform=timm_transform(config.get("pretrained_cfg") or config))


def _from_timm(name: str, pretrained: bool) -> LoadedBackbone:
    try:
        with torch.random.fork_rng(devices=[]):
            vit = make_timm(name, pretrained=pretrained)
    except DinoError:
        raise
    except Exception as error:  # the hub, the network, the disk and timm each have their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(
            f"{TIMM}{name}: timm could not load its weights ({reason}): without a network, give a local file, "
            "or pretrained=false for new weights"
        ) from error
    if not pretrained:
        init_weights(vit, torch.Generator().manual_seed(0))
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size[0]
    spec = BackboneSpec(name.split(".", maxsplit=1)[0], "patch", vit.in_chans, (size[0], size[1]), patch, "timm")
    report = LoadReport(len(vit.state_dict()) if pretrained else 0, [], [])
    loaded = _described(Backbone(spec, vit), report, f"{TIMM}{name}")
    return replace(loaded, transform=timm_transform(vit.pretrained_cfg))


def _announce(loaded: LoadedBackbone) -> None:
    report, spec = loaded.report, loaded.backbone.spec
    heads = sorted({".".join(name.split(".")[:-1]) or name for name in report.unexpected})
    left = f"{len(report.unexpected)} left over ({', '.join(heads[:4])}{', ...' if len(heads) > 4 else ''})"
    transform = f"transform {loaded.transform.name}" if loaded.transform else "no transform"
    say(
        f"{loaded.source}: {spec.arch} ({loaded.level}), {report.loaded} backbone tensors loaded, none missing, "
        f"{left if heads else 'none left over'}; {transform}"
    )
