"""From a run, a file, an export or a timm name to a backbone with its weights and its transform.

Files of others load by the names of their tensors: a bare state dict, or ``student`` and ``teacher`` as in the
checkpoints of facebookresearch/dino, with ``module.``, ``backbone.`` or torch.compile's ``_orig_mod.`` before the
names, in one of the layouts of :mod:`dino.models.layouts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dino.errors import CheckpointError, DinoError
from dino.files import read_json
from dino.models.backbone import Backbone, BackboneSpec, init_weights, make_timm
from dino.models.checkpoint import (
    PACKAGE,
    RUN_CHOICES,
    Description,
    fingerprint,
    is_own,
    read_checkpoint,
    readable,
    resolve_run,
)
from dino.models.grid_source import KEY, GridSource
from dino.models.inputs import TILE_SIZE_PX, input_kind
from dino.models.layouts import DINOV2, DINOV3, PLAIN, Published, backbone_tensors
from dino.models.prefixes import HUB, LOCAL, TIMM
from dino.models.recognition import IN_A_RUN, infer_spec, input_of
from dino.models.spec import shape_of
from dino.models.transforms import TRANSFORMS, Transform, choose_transform, timm_transform
from dino.progress import say, table, warn

__all__ = [
    "TRANSFORMS",
    "LoadReport",
    "LoadedBackbone",
    "Transform",
    "expect_level",
    "init_from",
    "load_backbone_file",
    "load_tensors",
    "read_training",
    "report_initial_weights",
]

FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HUB_SECONDS = 5.0  # within which the hub must answer
# Arguments of a timm folder's config that do not change which tensors the model has.
ADAPTABLE = {"img_size", "num_classes", "global_pool", "in_chans", "dynamic_img_size"}


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were loaded.

    Attributes:
        loaded: Number of tensors loaded.
        missing: Names that the backbone has and the source lacks.
        unexpected: Names of the source that the backbone does not have: heads, the mask token.
        layout: Layout of the names in the source, see :mod:`dino.models.layouts`.
    """

    loaded: int
    missing: list[str]
    unexpected: list[str]
    layout: str = PLAIN


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone and what is known about it.

    Attributes:
        backbone: In eval mode, float32, on the CPU.
        transform: None for feature grids.
        level: ``patch`` or ``region``.
        report: Which tensors were loaded.
        source: Path of the file or folder, or ``timm:NAME``.
        spacing_um: µm per px that it was trained at, where known; of several, that of tiling.
        spacings_um: All of them, where known.
        tile_size_px: Size of the tiles that it was trained on, where known.
        region_cells: (height, width) of the grids that a level-2 model was trained on, where known.
        own: Whether this package trained it.
        step: Optimizer steps of training, where known.
        config: Settings of the run, where known.
        fingerprint: SHA-256 of the weights, the number of heads and the position rule.
        details: ``total_steps``, ``versions``, ``training_slides``, ``selection``, ``grids``, where known.
        mask_token: (1, D), for runs that mask, where there is one.
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
    mask_token: Tensor | None = None
    spacings_um: Sequence[float] = ()

    @property
    def grids(self) -> GridSource | None:
        """The level-1 model of the grids that a level-2 model was trained on; None where unknown."""
        return GridSource.from_dict(self.details.get(KEY))


def load_backbone_file(
    path: str | Path,
    arch: str | None = None,
    transform: str = "auto",
    which: str = "teacher",
    pretrained: bool = True,
    verbose: bool = True,
) -> LoadedBackbone:
    """Load a backbone by the names of its tensors.

    Args:
        path: A run folder, a checkpoint of this package, an export, a folder of timm (also as ``local-dir:FOLDER``) or
            of transformers, a repository of such a folder (``hf-hub:OWNER/NAME``, also after ``timm:``), an external
            checkpoint, or ``timm:NAME``.
        arch: Architecture of an external checkpoint, where its tensors do not determine it.
        transform: ``auto`` (the checkpoint's own, else imagenet, as Meta's DINOv2 and DINOv3 have it, and with a
            warning for other files), ``imagenet``, ``hipt`` or ``timm``.
        which: ``teacher`` or ``student``.
        pretrained: For ``timm:NAME``: load timm's weights, or make new ones.
        verbose: Print which tensors were loaded, unexpected keys, and the warning.

    Raises:
        CheckpointError: The source is missing, damaged, unsafe, or any of its backbone's tensors does not fit.
        ConfigError: ``arch`` or ``transform`` is unknown or does not fit.
    """
    source = str(path)
    path = Path(source.removeprefix(LOCAL))
    if source.removeprefix(TIMM).startswith(HUB):
        loaded = replace(_from_folder(_download(source), arch), source=source)
    elif source.startswith(TIMM):
        loaded = _from_timm(source.removeprefix(TIMM), pretrained)
    elif (Path(path) / "config.json").is_file():
        with readable(source):
            loaded = _from_folder(Path(path), arch)
    else:
        file = resolve_run(Path(path)) if Path(path).is_dir() else Path(path)
        content = read_checkpoint(file, mmap=True)
        description = Description.from_dict(content, str(file)) if is_own(content) else None
        published = backbone_tensors(content, which, str(file))
        if description is None:
            loaded = _load(infer_spec(published, arch, str(file), "dino"), published, str(file))
        else:
            with readable(source):
                loaded = _load(description.spec, published, str(file))
            loaded = _described(loaded, description, own=True)
    if input_kind(loaded.level).normalized:
        of_meta = TRANSFORMS["imagenet"] if loaded.report.layout in (DINOV2, DINOV3) else None
        chosen = choose_transform(transform, loaded.transform or of_meta, source, verbose)
        loaded = replace(loaded, transform=chosen)
    loaded.backbone.eval()
    if verbose:
        _print_summary(loaded)
    return loaded


def read_training(source: str | Path) -> Mapping[str, Any]:
    """What a model of this package records of its training (:attr:`LoadedBackbone.details`), without building it.

    Empty for any other source. Nothing is printed.

    Args:
        source: A run folder, a checkpoint, an export, or anything else that names a model.

    Raises:
        CheckpointError: A file is damaged or unsafe.
    """
    path = Path(source)
    config = path / "config.json"
    if config.is_file():
        with readable(str(path)):
            content = read_json(config).get(PACKAGE) or {}
    else:
        candidates = [path, *(path / "checkpoints" / name for name in RUN_CHOICES)]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        content = read_checkpoint(file, mmap=True) if file else {}
    return Description.from_dict(content, str(path)).training if is_own(content) else {}


def init_from(backbone: Backbone, source: str | Path, arch: str | None = None) -> LoadedBackbone:
    """Initialize a backbone with the weights of another; nothing changes when any of them does not fit.

    The source's position table is kept at its size: the backbone's table, and ``img_size`` in its spec, become those of
    the source. Call it before optimizers and wrappers see the parameters.

    Args:
        backbone: What to initialize; its rule for resizing positions stays.
        source: As in ``load_backbone_file``.
        arch: Architecture of an external source, where its tensors do not determine it.

    Raises:
        CheckpointError: The source cannot be read, is of another level, or its tensors do not fit.
    """
    loaded = load_backbone_file(source, arch, verbose=False)
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
    fresh = _build(spec, tensors, str(source))
    backbone.vit, backbone.spec = fresh.vit.train(backbone.training), spec
    return loaded


def settings_that_fit(
    loaded: LoadedBackbone, arch: str, patch_size: int, pos_resample: str, sizes: Mapping[str, int]
) -> list[str]:
    """Settings that a run has to change to start from these weights, as ``key=value``; empty if the run's own fit.

    Args:
        loaded: The initial weights.
        arch: The run's ``model.arch``; a timm name is not checked here.
        patch_size: Its ``model.patch_size``.
        pos_resample: Its ``model.pos_resample``; named only where something else has to change too.
        sizes: Size in px of its crops, by setting.
    """
    backbone, spec = loaded.backbone, loaded.backbone.spec
    wanted, words = shape_of(arch), []
    scaled = any(".ls1." in name or ".gamma_1" in name for name, _ in backbone.vit.named_parameters())
    found = (backbone.embed_dim, backbone.depth, backbone.num_heads, backbone.vit.num_prefix_tokens - 1, scaled)
    if wanted and found != (wanted.dim, wanted.depth, wanted.heads, wanted.registers, wanted.layer_scale > 0):
        words.append(f"model.arch={spec.arch}")
    if patch_size != spec.patch_size:
        words.append(f"model.patch_size={spec.patch_size}")
    words += [
        f"{name}={max(1, round(size / spec.patch_size)) * spec.patch_size}"
        for name, size in sizes.items()
        if size % spec.patch_size
    ]
    if words and pos_resample != spec.pos_resample:
        words.append(f"model.pos_resample={spec.pos_resample}")
    return words


def report_initial_weights(loaded: LoadedBackbone, spec: BackboneSpec, masks: bool) -> None:
    """Print what a run starts from: a table of the tensors by part, then the mask token and the heads.

    Args:
        loaded: The source.
        spec: The run's backbone.
        masks: Whether the run masks tokens.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in loaded.backbone.vit.state_dict().items():
        parts.setdefault(name.partition(".")[0], []).append(tensor)
    rows = [(part, f"{len(group)}", f"{sum(map(Tensor.numel, group)):,}") for part, group in parts.items()]
    table(rows, ("initial weights", "tensors", "parameters"))
    kept = loaded.mask_token is not None
    token = f"mask token {'kept' if kept else 'starts at 0, because the source has none'}; " if masks else ""
    heads = any(not name.endswith("mask_token") for name in loaded.report.unexpected)
    say(f"{loaded.source}: {token}heads start anew{', those of the source are not used' if heads else ''}")
    rule = loaded.backbone.spec.pos_resample
    if "pos_embed" in parts and rule != spec.pos_resample:
        warn(
            f"{loaded.source} resizes its position table by the rule {rule}, this run by {spec.pos_resample}: with "
            f"model.pos_resample={rule}, it starts from the features of the source at every size"
        )


def expect_level(loaded: LoadedBackbone, level: str) -> None:
    """Raise CheckpointError unless the backbone is of ``level``."""
    if loaded.level != level:
        raise CheckpointError(
            f"{loaded.source}: expected a model of {input_kind(level).description}, found one of "
            f"{input_kind(loaded.level).description}: give a {level} model"
        )


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load by name; all tensors must be there with their shapes, else CheckpointError and ``module`` is unchanged."""
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


# ------------------------------------------------------------------------------------------------- sources


def _load(spec: BackboneSpec, published: Published, source: str) -> LoadedBackbone:
    backbone = _build(spec, published.tensors, source)
    if published.periods is not None:
        _check_periods(backbone, published.periods, source)
    report = LoadReport(len(published.tensors), [], published.left_over, published.layout)
    return replace(_loaded(backbone, report, source), mask_token=published.mask_token)


def _build(spec: BackboneSpec, tensors: Mapping[str, Tensor], source: str) -> Backbone:
    with torch.random.fork_rng(devices=[]):  # making a model draws numbers
        backbone = Backbone(spec)
    load_tensors(backbone.vit, tensors, source)
    return backbone


def _loaded(backbone: Backbone, report: LoadReport, source: str) -> LoadedBackbone:
    mark = fingerprint(backbone, f"heads={backbone.num_heads} pos_resample={backbone.spec.pos_resample}")
    return LoadedBackbone(backbone, None, backbone.spec.level, report, source, fingerprint=mark)


def _check_periods(backbone: Backbone, periods: Tensor, source: str) -> None:
    """Raise CheckpointError unless the file was made with the rotary periods that are computed here, as in timm.

    The published files have them rounded to bf16, that is by up to 0.4 %.
    """
    own: Tensor = backbone.vit.rope.periods
    if own.shape != periods.shape or not torch.allclose(periods.float(), own.float(), rtol=0.01):
        raise CheckpointError(
            f"{source}: expected rotary positions with periods {own.min():.4g} to {own.max():.4g}, found "
            f"{len(periods)} of {periods.min():.4g} to {periods.max():.4g}: positions of another base are not supported"
        )


def _described(loaded: LoadedBackbone, description: Description, own: bool) -> LoadedBackbone:
    spacing = description.geometry.get("spacing_um")
    return replace(
        loaded,
        transform=description.transform,
        spacing_um=spacing,
        spacings_um=description.geometry.get("spacings_um") or ([spacing] if spacing else []),
        tile_size_px=description.geometry.get("tile_size_px"),
        region_cells=description.geometry.get("region_cells"),
        own=own,
        step=description.step,
        config=description.config,
        details=dict(description.training),
    )


def _from_folder(folder: Path, arch: str | None) -> LoadedBackbone:
    """A folder of timm or of transformers: an export of this package, or any other of a supported architecture."""
    try:
        config = read_json(folder / "config.json")
        section, name = config.get(PACKAGE), config.get("architecture")
        if not name and "model_type" not in config:
            raise KeyError("architecture")
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json: not a config of timm or transformers ({error!r})") from error
    weights = next((folder / file for file in FOLDER_WEIGHTS if (folder / file).is_file()), folder / FOLDER_WEIGHTS[0])
    published = backbone_tensors(read_checkpoint(weights), "teacher", str(folder))
    if not name:  # transformers: the names of the tensors determine the architecture
        return _load(infer_spec(published, arch, str(folder), "dino"), published, str(folder))
    if section:
        description = Description.from_dict(section, str(folder))
        loaded = _load(description.spec, published, str(folder))
        return _described(loaded, description, own=bool(section.get("own", True)))
    special = sorted(set(config.get("model_args") or {}) - ADAPTABLE)
    if special and arch is None:
        raise CheckpointError(
            f"{folder}: {name} with its own {', '.join(special)} cannot be rebuilt: give arch= {IN_A_RUN}"
        )
    transform = timm_transform(config.get("pretrained_cfg") or config)
    spec = infer_spec(published, arch or name, str(folder), "timm", transform.input_size_px or TILE_SIZE_PX)
    loaded = _load(replace(spec, pos_resample="timm"), published, str(folder))
    return replace(loaded, transform=transform)


def _from_timm(name: str, pretrained: bool) -> LoadedBackbone:
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
        repository = getattr(config, "hf_hub_id", None)
        if pretrained and repository and not _is_cached(repository):
            _ask_hub()
        with torch.random.fork_rng(devices=[]):
            vit = make_timm(name, pretrained=pretrained)
    except DinoError:
        raise
    except Exception as error:  # the hub, the network, the disk and timm each have their own
        raise _not_loaded(f"{TIMM}{name}", error) from error
    if not pretrained:
        init_weights(vit, torch.Generator().manual_seed(0))
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size[0]
    arch, level = name.split(".", maxsplit=1)[0], input_of(vit.patch_embed.proj.weight)
    spec = BackboneSpec(arch, level, vit.in_chans, (size[0], size[1]), patch, "timm")
    report = LoadReport(len(vit.state_dict()) if pretrained else 0, [], [])
    transform = timm_transform(vit.pretrained_cfg)
    return replace(_loaded(Backbone(spec, vit), report, f"{TIMM}{name}"), transform=transform)


def _download(source: str) -> Path:
    """The folder of a repository of Hugging Face, ``hf-hub:OWNER/NAME[@REVISION]``, downloaded unless it is cached."""
    from huggingface_hub import snapshot_download

    repository, _, revision = source.removeprefix(TIMM).removeprefix(HUB).partition("@")
    try:
        cached = _is_cached(repository, revision or None)
        if not cached:
            _ask_hub()
        files = ["config.json", *FOLDER_WEIGHTS]
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=files, local_files_only=cached)
        )
    except Exception as error:  # the hub, the network and the disk each have their own
        raise _not_loaded(source, error) from error


def _not_loaded(source: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return CheckpointError(
        f"{source}: timm could not load its weights ({reason}): without a network, give a local folder "
        "with its config.json and model.safetensors"
    )


def _is_cached(repository: str, revision: str | None = None) -> bool:
    """Whether weights of a repository of Hugging Face were downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, file, revision=revision) for file in FOLDER_WEIGHTS)
    return any(isinstance(path, str) for path in found)


def _ask_hub() -> None:
    """Raise an error of the network now if the hub does not answer; a download would try again for most of a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)


def _print_summary(loaded: LoadedBackbone) -> None:
    report, spec = loaded.report, loaded.backbone.spec
    modules = sorted({".".join(name.split(".")[:-1]) or name for name in report.unexpected})
    unexpected = "no unexpected keys"
    if modules and loaded.own:
        unexpected = "heads not used"
    elif modules:
        unexpected = f"{len(report.unexpected)} unexpected keys"
        unexpected += f" ({', '.join(modules[:4])}{', ...' if len(modules) > 4 else ''})"
    transform = f"transform {loaded.transform.name}" if loaded.transform else "no transform"
    say(
        f"{loaded.source}: {spec.arch} ({loaded.level}), {report.loaded} backbone tensors loaded, no missing keys, "
        f"{unexpected}; {transform}"
    )
