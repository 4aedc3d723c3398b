"""Every setting of every command: its type, default, one line of help, and whether it is part of a run's identity.

*Identity* settings decide what a run computes: resuming needs them unchanged. *Runtime* settings (workers, device,
logging, how the global batch is laid out over processes) may differ each time.
"""

from dataclasses import dataclass, field
from typing import Any


def identity(default: Any, help: str) -> Any:
    """Declare a setting that decides what is computed."""
    return _setting(default, help, True)


def runtime(default: Any, help: str) -> Any:
    """Declare a setting that may change from one start of a run to the next."""
    return _setting(default, help, False)


def _setting(default: Any, help: str, is_identity: bool) -> Any:
    metadata = {"help": help, "identity": is_identity}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(schema: type) -> Any:
    """Declare a nested group of settings."""
    return field(default_factory=schema)


# ---------------------------------------------------------------------------------------------- pretraining


@dataclass
class ModelConfig:
    """Backbone, head and teacher of a run."""

    arch: str = identity("vit_small", "backbone: vit_tiny, vit_small, vit_base, vit_large, hvit_xs, or a timm name")
    patch_size: int = identity(16, "side of a token in px (level 2: always one cell)")
    init: str | None = identity(None, "start weights: nothing, timm:NAME, or a checkpoint file or run folder")
    init_arch: str | None = identity(None, "name of the architecture in `init` when its head count is not dim/64")
    pos_resample: str = identity("dino", "how position tables are resized: dino, recomputed or timm")
    drop_path_rate: float = identity(0.1, "stochastic depth rate of the last block")
    out_dim: int = identity(65536, "number of prototypes K of the head")
    hidden_dim: int = identity(2048, "width of the head's hidden layers")
    bottleneck_dim: int = identity(256, "width of the head's bottleneck")
    norm_last_layer: bool = identity(True, "keep the norm of the head's last layer at 1 (more stable)")
    use_bn_in_head: bool = identity(False, "batch normalisation in the head")
    student_temp: float = identity(0.1, "temperature of the student")
    momentum_teacher: float = identity(0.996, "first momentum of the teacher average; rises to 1 by a cosine")
    warmup_teacher_temp: float = identity(0.04, "first temperature of the teacher")
    teacher_temp: float = identity(0.04, "temperature of the teacher after its warm-up")
    warmup_teacher_temp_epochs: float = identity(0, "epochs over which the teacher temperature rises")
    center_momentum: float = identity(0.9, "momentum of the teacher's centre")


@dataclass
class TrainingConfig:
    """Length, batch and safety of a run."""

    nepochs: float = identity(100, "passes over the data")
    max_steps: int | None = identity(None, "optimizer steps, instead of nepochs")
    warmup_epochs: float = identity(10, "epochs of linear learning-rate warm-up")
    freeze_last_layer: float = identity(1, "epochs during which the head's last layer stays fixed")
    batch_size_per_gpu: int = runtime(64, "images per process and micro-batch (the product below is identity)")
    gradient_accumulation: int = runtime(1, "micro-batches per step; global batch = this x per_gpu x processes")
    clip_grad: float = identity(3.0, "largest gradient norm, 0 for no clipping")
    clip_mode: str = identity("per_parameter", "clip each parameter tensor (DINO) or the `global` norm")
    max_bad_fraction: float = identity(0.01, "stop when more than this share of the files cannot be used")


@dataclass
class LrSchedulerConfig:
    """Cosine schedules of learning rate and weight decay."""

    min_lr: float = identity(1e-6, "learning rate at the end")
    weight_decay: float = identity(0.04, "weight decay at the start")
    weight_decay_end: float = identity(0.4, "weight decay at the end")


@dataclass
class OptimConfig:
    """Optimizer."""

    name: str = identity("adamw", "adamw or sgd")
    lr: float = identity(0.0005, "peak learning rate per 256 images of the global batch (linear scaling)")
    lr_scheduler: LrSchedulerConfig = group(LrSchedulerConfig)


@dataclass
class PatchAugConfig:
    """Crops and augmentations of tiles (level 1)."""

    global_crops_size: int = identity(224, "side of the two global crops in px")
    global_crops_scale: list[float] = identity([0.4, 1.0], "share of the tile's area that a global crop covers")
    local_crops_number: int = identity(8, "number of local crops, 0 for none")
    local_crops_size: int = identity(96, "side of the local crops in px")
    local_crops_scale: list[float] = identity([0.05, 0.4], "share of the tile's area that a local crop covers")
    horizontal_flip: float = identity(0.5, "probability of a left-right flip")
    vertical_flip: float = identity(0.0, "probability of an up-down flip")
    quarter_turns: bool = identity(False, "turn by 0, 90, 180 or 270 degrees, each as likely")
    hed_jitter: float = identity(0.0, "probability of stain jitter in HED space")
    hed_strength: float = identity(0.05, "stain jitter: scale in 1 +- this, shift in +- this")
    color_jitter: float = identity(0.8, "probability of colour jitter")
    brightness: float = identity(0.4, "colour jitter: brightness factor in 1 +- this")
    contrast: float = identity(0.4, "colour jitter: contrast factor in 1 +- this")
    saturation: float = identity(0.2, "colour jitter: saturation factor in 1 +- this")
    hue: float = identity(0.1, "colour jitter: hue shift in +- this (turns)")
    grayscale: float = identity(0.2, "probability of a grey crop")
    blur_global: list[float] = identity([1.0, 0.1], "probability of blur for the first and the second global crop")
    blur_local: float = identity(0.5, "probability of blur for local crops")
    blur_sigma: list[float] = identity([0.1, 2.0], "range of the blur's standard deviation in px")
    solarize: float = identity(0.2, "probability of solarizing the second global crop")


@dataclass
class RegionAugConfig:
    """Crops of feature grids (level 2)."""

    global_crops_scale: float = identity(0.875, "side of a global crop as a share of the grid's")
    local_crops_number: int = identity(8, "number of local crops, 0 for none")
    local_crops_scale: float = identity(0.375, "side of a local crop as a share of the grid's")
    horizontal_flip: float = identity(0.5, "probability of a left-right flip")
    vertical_flip: float = identity(0.5, "probability of an up-down flip")
    quarter_turns: bool = identity(False, "turn the grid (moves tokens, but not what is in them)")
    min_tissue: float = identity(0.25, "share of a global crop's cells that must hold tissue")
    redraws: int = identity(10, "how often a global crop with less tissue is drawn again")


@dataclass
class SpeedConfig:
    """Where and how fast; nothing here changes which crops are seen."""

    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
    precision: str = identity("bf16", "bf16 autocast, or plain fp32 or fp64")
    num_workers: int = runtime(4, "processes that decode tiles and draw crops")
    prefetch: int = runtime(2, "batches that each worker prepares ahead")
    compile: str = runtime("auto", "compile the blocks for speed: true, false, or auto (on a GPU); rounds differently")
    checkpointing: bool = runtime(False, "compute blocks again in the backward pass: less memory, more time, same bits")
    timeout_minutes: float = runtime(30.0, "minutes that a process waits for the others before it ends with an error")


@dataclass
class PatchSpeedConfig(SpeedConfig):
    """The same, and what level 1 keeps of its tiles."""

    ram_cache: float = runtime(0.0, "GB of memory for decoded tiles, shared by a process's workers; 0 for none")


@dataclass
class RegionSpeedConfig(SpeedConfig):
    """The same, and where level 2 keeps its feature grids."""

    cache_dir: str = runtime("auto", "where grids are packed into one file: auto (beside them), a folder, or none")
    gpu_cache: float | None = runtime(None, "GB of GPU memory for grids; null: up to a quarter of what is free")


@dataclass
class EvaluateConfig:
    """Judging while training."""

    labels: str | None = runtime(None, "CSV with image_path,label,partition for kNN while training")
    every_steps: int = runtime(0, "steps between kNN evaluations, 0 for once an epoch")
    k: list[int] = runtime([20], "numbers of neighbours; the first one picks best.pt")
    temperature: float = runtime(0.07, "temperature of the neighbours' votes")
    early_stopping_patience: int = runtime(0, "evaluations without a better score before stopping, 0 for never")
    allow_leakage: bool = runtime(False, "accept test slides or patients that are pretrained on")


@dataclass
class LoggingConfig:
    """What is written while training."""

    every_steps: int = runtime(10, "steps between lines of metrics.jsonl")
    save_every_steps: int = runtime(1000, "steps between checkpoints, 0 for by time alone")
    save_every_minutes: float = runtime(10.0, "minutes between checkpoints, 0 for by steps alone")
    keep_every_steps: int = runtime(0, "also keep checkpoints/step_*.pt this often, 0 for never")
    tensorboard: bool = runtime(True, "write curves for TensorBoard")
    wandb: bool = runtime(False, "log to Weights & Biases (pip install 'histodino[wandb]')")
    mlflow: bool = runtime(False, "log to MLflow (pip install 'histodino[mlflow]')")


@dataclass
class PretrainConfig:
    """What both levels share."""

    data_dir: str = runtime("", "ROOT that `dino tile` wrote, or a folder of images or of .pt grids")
    output_dir: str = runtime("", "the run folder")
    seed: int = identity(0, "seed of everything random")
    dry_run: bool = runtime(False, "print what would happen, and stop")
    profile: bool = runtime(False, "train some steps, print where their time goes, and stop; no run is written")
    profile_steps: int = runtime(20, "steps that profile=true measures, after a warm-up")
    model: ModelConfig = group(ModelConfig)
    training: TrainingConfig = group(TrainingConfig)
    optim: OptimConfig = group(OptimConfig)
    speed: SpeedConfig = group(SpeedConfig)
    evaluate: EvaluateConfig = group(EvaluateConfig)
    logging: LoggingConfig = group(LoggingConfig)


@dataclass
class PatchConfig(PretrainConfig):
    """`dino pretrain patch`."""

    speed: PatchSpeedConfig = group(PatchSpeedConfig)
    aug: PatchAugConfig = group(PatchAugConfig)


@dataclass
class RegionConfig(PretrainConfig):
    """`dino pretrain region`."""

    grid_order: str = identity("yx", "order of the rows in bare .pt files: yx (row-major) or xy")
    speed: RegionSpeedConfig = group(RegionSpeedConfig)
    aug: RegionAugConfig = group(RegionAugConfig)


# ------------------------------------------------------------------------------------------- other commands


@dataclass
class TileConfig:
    """`dino tile`."""

    spacing_um: float = identity(0.5, "spacing of the tiles in µm per px")
    tile_size_px: int = identity(256, "side of a tile in px at that spacing")
    overlap: float = identity(0.0, "share of its side that a tile shares with the next: 0, 1/2, 2/3, 3/4, ...")
    region_size_px: int = identity(4096, "side of a region in px: a multiple of tile_size_px")
    region_overlap_cells: int = identity(0, "whole cells that neighbouring regions share")
    min_tissue: float = identity(0.25, "least tissue fraction of a tile")
    min_tissue_region: float = identity(0.25, "least tissue fraction of a region")
    tolerance: float = identity(0.05, "relative difference of spacing that is taken as it is")
    tissue_method: str = identity("hsv", "tissue segmentation of hs2p where no mask is given: hsv, otsu, threshold")
    tissue_downsample: int = identity(64, "downsample at which tissue is segmented or the mask is read")
    qc: bool = identity(False, "drop white, black, grey and blurred tiles by hs2p's pixel QC")
    storage: str = identity("jpeg", "jpeg files, hs2p's tar per slide, or none (coordinates only)")
    jpeg_quality: int = identity(90, "JPEG quality of the tiles")
    max_tiles_per_slide: int = identity(0, "keep a random subset of this many tiles per slide, 0 for all")
    seed: int = identity(0, "seed of that subset")
    spacing_at_level_0: float | None = identity(None, "µm per px of every slide's level 0, where its metadata lacks it")
    previews: bool = runtime(True, "write mask and tiling previews")
    num_workers: int = runtime(2, "slides worked on at once")
    dry_run: bool = runtime(False, "print tiles, GB, files and hours, and stop")


@dataclass
class ExtractConfig:
    """`dino extract`."""

    source: str = identity("auto", "where pixels come from: auto, slides, tiles or regions (images of regions)")
    arch: str | None = identity(None, "architecture of a foreign checkpoint, where its head count is not dim/64")
    transform: str = identity("auto", "normalisation: auto (the checkpoint's own), imagenet, hipt or timm")
    pretrained: bool = identity(True, "for timm:NAME: load timm's weights (false: as initialised)")
    slides: str | None = runtime(None, "slides.csv or folder, where the slides moved since tiling")
    grid_order: str = identity("yx", "order of the rows in bare .pt files: yx (row-major) or xy")
    precision: str = identity("bf16", "bf16 autocast, fp32 or fp64")
    batch_size: int = runtime(64, "tiles (level 2: regions) per forward pass")
    num_workers: int = runtime(2, "threads that read and decode pixels")
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
    dry_run: bool = runtime(False, "print what would be done, and stop")


@dataclass
class SlurmConfig:
    """What a job asks SLURM for. What is not here: sbatch's own SBATCH_* environment variables."""

    nodes: int = runtime(1, "machines")
    gpus_per_node: int = runtime(1, "GPUs, and so processes, per machine; 0 for one process each on the CPU")
    cpus_per_gpu: int = runtime(8, "CPU cores per process: a few more than num_workers")
    mem_gb: float | None = runtime(None, "memory per machine in GB (default: the cluster's)")
    timeout_hours: float = runtime(24.0, "time limit of the job; it is started again until the work is done")
    warn_seconds: int = runtime(300, "seconds before the limit at which the work is saved and the job starts again")
    max_restarts: int = runtime(100, "how often the job is started again after its time limit")
    partition: str | None = runtime(None, "SLURM's --partition")
    account: str | None = runtime(None, "SLURM's --account")
    qos: str | None = runtime(None, "SLURM's --qos")
    constraint: str | None = runtime(None, "SLURM's --constraint")
    setup: list[str] = runtime([], "shell lines before the start, such as 'module load cuda'")
    name: str = runtime("dino", "name of the job")
    folder: str | None = runtime(None, "for the job's output (default: RUN_slurm beside RUN, for extract ROOT_slurm)")
    cluster: str = runtime("slurm", "slurm, or local to try it on this machine")


@dataclass
class LaunchConfig:
    """`dino launch slurm`."""

    slurm: SlurmConfig = group(SlurmConfig)


@dataclass
class KnnConfig:
    """`dino evaluate knn`."""

    k: list[int] = runtime([10, 20, 100, 200], "numbers of neighbours")
    temperature: float = runtime(0.07, "temperature of the neighbours' votes")
    arch: str | None = runtime(None, "architecture of a foreign checkpoint, where its head count is not dim/64")
    transform: str = runtime("auto", "normalisation: auto (the checkpoint's own), imagenet, hipt or timm")
    grid_order: str = runtime("yx", "order of the rows in bare .pt files: yx (row-major) or xy")
    allow_leakage: bool = runtime(False, "accept test slides or patients that are pretrained on (the report says so)")
    precision: str = runtime("bf16", "bf16 autocast, fp32 or fp64")
    batch_size: int = runtime(64, "images per forward pass")
    num_workers: int = runtime(2, "threads that read and decode images")
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
    output: str | None = runtime(None, "JSON file for the scores (default: RUN/knn.json for a run)")


@dataclass
class ExportConfig:
    """`dino export`."""

    arch: str | None = runtime(None, "architecture of a foreign checkpoint, where its head count is not dim/64")
    transform: str = runtime("auto", "normalisation written to the export: auto, imagenet, hipt or timm")
    tile_size_px: int = runtime(256, "tile side that the position table is baked for")


@dataclass
class InfoConfig:
    """`dino info`."""

    arch: str | None = runtime(None, "architecture of a foreign checkpoint, where its head count is not dim/64")


@dataclass
class DemoConfig:
    """`dino demo`."""

    seed: int = runtime(0, "seed of everything random")
    patch_steps: int = runtime(240, "level-1 training steps")
    region_steps: int = runtime(200, "level-2 training steps")
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
    num_workers: int = runtime(1, "processes that decode tiles and draw crops")
