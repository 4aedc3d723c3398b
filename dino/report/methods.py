"""The methods paragraph of a report, for use in a paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dino.slides.partitions import Split
from dino.train.optimizer import LR_SCALINGS

Settings = Mapping[str, Any]

PARTS = {  # of the objective, besides DINO
    "ibot": "iBOT on masked tokens (Zhou et al. 2022",
    "regression": "regression of masked features (Assran et al. 2023",
    "koleo": "KoLeo (Sablayrolles et al. 2019",
    "kde": "a kernel density term that spreads the features (Wang & Isola 2020",
}


@dataclass(frozen=True)
class Tiling:
    """Tiles and regions.

    Attributes:
        slides: Number of slides to pretrain on.
        tiles: Number of their tiles.
        regions: Number of their regions.
        geometry: Settings of ``tiling.json``: spacing_um, tile_size_px, overlap, region_size_px, min_tissue, ...
        held_out: Number of further slides, which are held out.
    """

    slides: int
    tiles: int
    regions: int
    geometry: Settings
    held_out: int = 0


@dataclass(frozen=True)
class Run:
    """Training of one network.

    Attributes:
        config: The run's resolved settings, nested as in ``config.yaml``.
        steps: Optimizer steps taken.
        global_batch: Samples per step.
        embed_dim: Width of its features.
        depth: Number of blocks.
        num_heads: Attention heads.
        split: Number of samples that it was trained on; None where that is not recorded.
        segments: Those by which it was extended, see :class:`dino.train.optimizer.Segment`.
        precision: That it was computed in; None for that of the settings.
    """

    config: Settings
    steps: int
    global_batch: int
    embed_dim: int
    depth: int
    num_heads: int
    split: Split | None = None
    segments: Sequence[Settings] = ()
    precision: str | None = None


@dataclass(frozen=True)
class Facts:
    """Contents of the paragraph.

    Attributes:
        tiling: None for data that were not tiled with this package.
        patch: The level-1 run, or None.
        region: The level-2 run, or None.
        versions: Version of each package by name.
        device: Hardware that was used.
    """

    tiling: Tiling | None
    patch: Run | None
    region: Run | None
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""


def split_of(status: Settings) -> Split | None:
    """What a run was trained on, from its ``status.json``; None in runs of earlier versions."""
    return Split.from_dict(status["data"]) if status.get("data") else None


def methods(facts: Facts) -> str:
    """Write the paragraph.

    Args:
        facts: Contents; a part that is None is omitted.

    Returns:
        Plain text, one paragraph.
    """
    sentences = [
        *(_tiling(facts.tiling, facts.versions) if facts.tiling else ()),
        *(_patch(facts.patch) if facts.patch else ()),
        *(_region(facts.region) if facts.region else ()),
        _software(facts),
    ]
    return " ".join(sentence[:1].upper() + sentence[1:] for sentence in sentences)


def _tiling(tiling: Tiling, versions: Mapping[str, str]) -> list[str]:
    g = tiling.geometry
    tool = f"hs2p {versions['hs2p']}" if "hs2p" in versions else "hs2p"
    size = g.get("tile_size_px", 256)
    overlap = g.get("overlap", 0.0)
    cut = (
        f"{_count(tiling.slides, 'whole-slide image')} {'was' if tiling.slides == 1 else 'were'} read with {tool} at "
        f"{g.get('spacing_um', 0.5):g} µm per pixel and cut into {_count(tiling.tiles, 'tile')} of {size} x {size} px"
    )
    cut += f" that overlap by {overlap:.0%} of their side" if overlap else ""
    if "min_tissue" in g:
        cut += f", keeping those with at least {g['min_tissue']:.0%} tissue"
        cut += f" ({g['tissue_method']} segmentation)" if g.get("tissue_method") else ""
    sentences = [f"{cut}."]
    if tiling.regions:
        side = g.get("region_size_px", 4096)
        cells = f"{side // size} x {side // size} tiles of the same lattice"
        sentences.append(f"{_count(tiling.regions, 'region')} of {side} x {side} px were formed from {cells}.")
    if tiling.held_out:
        were = "was" if tiling.held_out == 1 else "were"
        sentences.append(f"{_count(tiling.held_out, 'further slide')} {were} held out from pretraining.")
    return sentences


def _patch(run: Run) -> list[str]:
    c, aug = run.config, run.config.get("aug", {})
    start = c["model"].get("init")
    initial = f"from {start}" if start else "from random weights"
    crops = (
        f"Each tile gave two global crops ({_range(aug['global_crops_scale'])} of its area, resized to "
        f"{aug['global_crops_size']} px) and {aug['local_crops_number']} local crops "
        f"({_range(aug['local_crops_scale'])}, {aug['local_crops_size']} px), {_augmentations(aug)}."
    )
    return [
        f"A vision transformer ({c['model']['arch']}, patch size {c['model']['patch_size']} px, {_shape(run)}) was "
        f"pretrained {initial}{_on(run)} {_method(c)} {_training(run)}",
        crops,
        "Tiles are represented by the cls token of the teacher after its final layer norm.",
    ]


def _region(run: Run) -> list[str]:
    aug = run.config.get("aug", {})
    return [
        f"A second transformer ({run.config['model']['arch']}, {_shape(run)}) was pretrained{_on(run)} "
        f"{_method(run.config)} on the grids of tile features of regions, as in HIPT (Chen et al. 2022), "
        f"{_training(run)}",
        f"Its global crops take {aug['global_crops_scale']:g} and its {aug['local_crops_number']} local crops "
        f"{aug['local_crops_scale']:g} of a grid's side.",
    ]


def _on(run: Run) -> str:
    """What the run was trained on."""
    if run.split is None:
        return ""
    slides = f" of {_count(run.split.slides, 'slide')}" if run.split.slides else ""
    return f" on {_count(run.split.samples, run.split.items.removesuffix('s'))}{slides}"


def _training(run: Run) -> str:
    model, training, optim = run.config["model"], run.config["training"], run.config["optim"]
    schedule = optim["lr_scheduler"]
    peak = optim["lr"] * LR_SCALINGS[optim.get("lr_scaling", "linear")](run.global_batch)
    prototypes = (
        f"{model['out_dim']:,} prototypes, student temperature {model['student_temp']:g}, teacher temperature "
        f"{_from_to(model['warmup_teacher_temp'], model['teacher_temp'])}, "
    )
    targets = run.config.get("objective", {}).get("targets", "centring")
    prototypes += "Sinkhorn-Knopp targets, " if targets == "sinkhorn" else ""
    distilled = any(_weight(run.config, "objective", name, default) for name, default in (("dino", 1.0), ("ibot", 0.0)))
    prototypes = prototypes if distilled else ""
    return (
        f"for {run.steps:,} steps at a global batch of {run.global_batch} (seed {run.config.get('seed', 0)}): "
        f"{prototypes}teacher momentum {model['momentum_teacher']:g} to 1 by a cosine, {_optimizer(optim['name'])} "
        f"with a peak learning rate of {peak:.3g} ({_epochs(training['warmup_epochs'])} of linear warm-up, cosine to "
        f"{schedule['min_lr']:g}{_layers(optim)}), "
        f"weight decay {_from_to(schedule['weight_decay'], schedule['weight_decay_end'])}, gradient clipping at "
        f"{training['clip_grad']:g}, drop-path rate {model['drop_path_rate']:g}, "
        f"{run.precision or run.config.get('speed', {}).get('precision', 'fp32')} precision."
        f"{''.join(map(_segment, run.segments))}"
    )


def _epochs(count: float) -> str:
    return f"{count:g} epoch{'' if count == 1 else 's'}"


def _layers(optim: Settings) -> str:
    """How the learning rate depends on the layer."""
    decay, embedding = optim.get("layer_decay", 1.0), optim.get("patch_embed_lr_factor", 1.0)
    found = f", layer-wise decay {decay:g}" if decay != 1 else ""
    return found + (f", factor {embedding:g} for the patch embedding" if embedding != 1 else "")


def _segment(segment: Settings) -> str:
    """A sentence about training that went on after the end of the schedule before it."""
    warmup = f"{segment['warmup_steps']:,} steps of linear warm-up, " if segment["warmup_steps"] else ""
    return (
        f" Training was then continued from step {segment['start']:,} to {segment['end']:,}, with all state kept, on a "
        f"new schedule: a peak learning rate of {segment['lr']:.3g} ({warmup}cosine to {segment['min_lr']:g}) and a "
        f"teacher momentum of {segment['momentum_teacher']:g} to 1 by a cosine."
    )


def _method(config: Settings) -> str:
    """What a network learned from."""
    parts = ["with DINO (Caron et al. 2021)"] if _weight(config, "objective", "dino", 1.0) else []
    for name, words in PARTS.items():
        weight = _weight(config, "objective", name, 0.0)
        parts += [f"with {words}; weight {weight:g})"] if weight else []
    if config.get("teacher"):
        tokens = [name for name, default in (("cls", 1.0), ("patch", 0.0)) if _weight(config, "distill", name, default)]
        distance = config.get("distill", {}).get("loss", "cosine").replace("_", " ")
        if tokens:
            parts.append(
                f"by distilling the features of {config['teacher']} ({distance} distance between its "
                f"{' and '.join(tokens)} tokens and a linear projection of the network's)"
            )
        if _weight(config, "distill", "dino", 0.0):
            parts.append(f"with DINO (Caron et al. 2021) against the prototypes of {config['teacher']}")
    first, *others = parts
    return " and ".join(
        [first, *(part.removeprefix("with ") if first.startswith("with ") else part for part in others)]
    )


def _weight(config: Settings, group: str, name: str, default: float) -> float:
    """Weight of an objective; the default in settings of versions that did not have it."""
    return config.get(group, {}).get(name, default)


def _augmentations(aug: Settings) -> str:
    parts = []
    if aug.get("horizontal_flip"):
        parts.append("horizontal and vertical flips" if aug.get("vertical_flip") else "horizontal flips")
    if aug.get("quarter_turns"):
        parts.append("90° rotations")
    if aug.get("hed_jitter"):
        parts.append(f"HED stain jitter (±{aug['hed_strength']:g}, p {aug['hed_jitter']:g})")
    if aug.get("color_jitter"):
        strength = "/".join(f"{aug[name]:g}" for name in ("brightness", "contrast", "saturation", "hue"))
        parts.append(f"colour jitter ({strength}, p {aug['color_jitter']:g})")
    if aug.get("grayscale"):
        parts.append(f"greyscale (p {aug['grayscale']:g})")
    if any(aug.get("blur_global", ())) or aug.get("blur_local"):
        chances = "/".join(f"{p:g}" for p in (*aug.get("blur_global", ()), aug.get("blur_local", 0)))
        parts.append(f"Gaussian blur (p {chances})")
    if aug.get("solarize"):
        parts.append(f"solarization (p {aug['solarize']:g})")
    return f"augmented by {', '.join(parts)}" if parts else "without further augmentation"


def _software(facts: Facts) -> str:
    named = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    on = f" on {facts.device}" if facts.device else ""
    return f"Computed{on} with {named}."


def _shape(run: Run) -> str:
    return f"{run.depth} blocks, width {run.embed_dim}, {run.num_heads} heads"


def _optimizer(name: str) -> str:
    return {"adamw": "AdamW", "sgd": "SGD"}.get(name, name)


def _from_to(first: float, last: float) -> str:
    return f"{first:g}" if first == last else f"{first:g} to {last:g}"


def _range(pair: Any) -> str:
    return f"{pair[0]:.0%} to {pair[1]:.0%}"


def _count(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number:,} {noun}s"
