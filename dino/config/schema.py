"""Every setting of every command: its type, default, one line of help, and whether it is part of a run's identity.

*Identity* settings determine what a run computes: resuming needs them unchanged. *Runtime* settings (workers, device,
logging, how the global batch is split over processes) may differ each time. Components take their own group of
settings, such as :class:`PatchAugConfig`; this package imports no other.
"""

from dataclasses import dataclass

from dino.config.commands import (  # noqa: F401 -- a part of this module
    DemoConfig,
    ExportConfig,
    ExtractConfig,
    InfoConfig,
    LaunchConfig,
    SlurmConfig,
    TileConfig,
)
from dino.config.declare import group, identity, runtime
from dino.config.evaluators import (  # noqa: F401 -- a part of this module
    EVALUATION_CONFIGS,
    AbmilConfig,
    ClusterConfig,
    CompareConfig,
    EvaluationConfig,
    FewshotConfig,
    HiptConfig,
    KnnConfig,
    LinearConfig,
    MilConfig,
    RetrievalConfig,
    RobustnessConfig,
    SlideConfig,
)
from dino.config.reports import AttentionConfig, FigureConfig, ReportConfig  # noqa: F401 -- a part of this module
from dino.config.viewing import GeojsonConfig, OverlaysConfig, ViewConfig, WordsConfig  # noqa: F401 -- a part of this module


@dataclass
class ModelConfig:
    """Backbone, head and teacher."""

    arch: str = identity("vit_small", "backbone: vit_tiny, vit_small, vit_base, vit_large, hvit_xs, or a timm name")
    patch_size: int = identity(16, "patch size in px (level 2: always one cell)")
    init: str | None = identity(None, "initial weights: null (random), timm:NAME, a checkpoint file or a run folder")
    init_arch: str | None = identity(
        None, "architecture of the checkpoint `init`, if its number of heads is not dim/64"
    )
    pos_resample: str = identity("dino", "interpolation of position embeddings: dino, recomputed or timm")
    drop_path_rate: float = identity(0.1, "stochastic depth rate of the last block; rises linearly from 0 at the first")
    out_dim: int = identity(65536, "number of prototypes K of the head")
    hidden_dim: int = identity(2048, "width of the head's hidden layers")
    bottleneck_dim: int = identity(256, "width of the head's bottleneck")
    norm_last_layer: bool = identity(True, "keep the weight norm of the head's last layer at 1 (more stable)")
    use_bn_in_head: bool = identity(False, "batch normalisation in the head")
    student_temp: float = identity(0.1, "temperature of the student")
    momentum_teacher: float = identity(0.996, "initial EMA momentum of the teacher; rises to 1 on a cosine schedule")
    warmup_teacher_temp: float = identity(0.04, "initial temperature of the teacher")
    teacher_temp: float = identity(0.04, "temperature of the teacher after its warm-up")
    warmup_teacher_temp_epochs: float = identity(0, "epochs over which the teacher temperature rises")
    center_momentum: float = identity(0.9, "momentum of the centre of the teacher outputs")


@dataclass
class ObjectiveConfig:
    """What the network learns: a weight of 0 leaves a part out, at no cost."""

    dino: float = identity(1.0, "weight of DINO: self-distillation of the cls token")
    ibot: float = identity(0.0, "weight of iBOT: self-distillation of masked tokens (DINOv2: 1)")
    regression: float = identity(0.0, "weight of the regression of masked features through a predictor (I-JEPA: 1)")
    koleo: float = identity(0.0, "weight of KoLeo, which spreads the cls tokens of different samples (DINOv2: 0.1)")
    kde: float = identity(0.0, "weight of the kernel density estimator, another spreading term (0.001 to 0.05)")
    targets: str = identity("centring", "targets of dino and ibot: centring (moving average) or sinkhorn")
    ibot_head: str = identity("shared", "head of ibot: shared (that of dino) or separate")
    ibot_out_dim: int | None = identity(None, "number of prototypes of a separate ibot head; null: model.out_dim")
    predictor_width: int | None = identity(None, "width of the predictor of regression; null: the backbone's")
    predictor_depth: int = identity(4, "blocks of the predictor of regression")
    kde_concentration: float = identity(10.0, "concentration of the kernel of kde")
    spread_group: int = identity(
        16, "koleo and kde compare groups of this many consecutive samples; must divide training.batch_size_per_gpu"
    )
    mask_shape: str = identity("blocks", "masks: blocks (as BEiT and DINOv2), squares (four), or random tokens")
    mask_probability: float = identity(0.5, "fraction of the global crops that are masked")
    mask_ratio: list[float] = identity([0.1, 0.5], "range of the masked fraction of a masked crop's tokens", 2)


@dataclass
class DistillConfig:
    """What the network learns from the frozen network `teacher`: a weight of 0 leaves a part out."""

    cls: float = identity(1.0, "weight of the distance between the projected cls token and the teacher's")
    patch: float = identity(0.0, "weight of the distance between the projected patch tokens and the teacher's")
    dino: float = identity(
        0.0, "weight of DINO with the teacher's head and prototypes (of a run, or another checkpoint with a head)"
    )
    loss: str = identity("cosine", "distance: cosine, or smooth_l1 to the teacher's layer-normalized features")
    input_size: int | None = identity(
        None, "size in px that the teacher sees the global crops at; null: theirs, or the nearest that it takes"
    )
    arch: str | None = identity(None, "architecture of the checkpoint `teacher`, if its number of heads is not dim/64")
    transform: str = identity("auto", "normalisation of the teacher: auto (recorded), imagenet, hipt or timm")


@dataclass
class TrainingConfig:
    """Length, batch size and gradient clipping."""

    nepochs: float = identity(100, "epochs: passes over the data")
    max_steps: int | None = identity(None, "number of optimizer steps, used instead of nepochs")
    warmup_epochs: float = identity(10, "epochs of linear learning-rate warm-up")
    freeze_last_layer: float = identity(1, "epochs during which the head's last layer is frozen")
    freeze_backbone: float = identity(
        0, "epochs during which the backbone is frozen, so that new heads fit pretrained weights first"
    )
    batch_size_per_gpu: int = runtime(
        64, "samples per process and micro-batch; only the global batch is part of the run's identity"
    )
    gradient_accumulation: int = runtime(
        1, "micro-batches per step; global batch = this x batch_size_per_gpu x processes"
    )
    clip_grad: float = identity(3.0, "maximum gradient norm, 0 for no clipping")
    clip_mode: str = identity(
        "per_parameter", "per_parameter (clip each tensor separately, as DINO does) or global (clip the total norm)"
    )
    max_bad_fraction: float = identity(0.01, "stop when more than this fraction of the files is unusable")


@dataclass
class LrSchedulerConfig:
    """Cosine schedules of learning rate and weight decay."""

    min_lr: float = identity(1e-6, "final learning rate")
    weight_decay: float = identity(0.04, "initial weight decay")
    weight_decay_end: float = identity(0.4, "final weight decay")


@dataclass
class OptimConfig:
    """Optimizer."""

    name: str = identity("adamw", "adamw or sgd")
    lr: float = identity(0.0005, "peak learning rate for a global batch of 256 (lr_scaling=linear) or 1024 (sqrt)")
    lr_scaling: str = identity(
        "linear", "linear: lr x global batch / 256 (DINO); sqrt: lr x sqrt(global batch / 1024) (DINOv2)"
    )
    lr_scheduler: LrSchedulerConfig = group(LrSchedulerConfig)
    layer_decay: float = identity(1.0, "learning rate of a block as a fraction of the next one's (DINOv2: 0.9)")
    patch_embed_lr_factor: float = identity(1.0, "further factor of the patch embedding's learning rate (DINOv2: 0.2)")
    weight_decay_on: str = identity(
        "weights", "weights: all but biases and 1-D parameters (norms, LayerScale); all: every parameter"
    )
    beta2: float = identity(0.999, "AdamW: decay of the average of squared gradients")


@dataclass
class PatchAugConfig:
    """Crops and augmentations of tiles (level 1)."""

    global_crops_size: int = identity(224, "size of the two global crops in px")
    global_crops_scale: list[float] = identity(
        [0.4, 1.0], "range of a global crop's area as a fraction of the tile's", 2
    )
    local_crops_number: int = identity(8, "number of local crops, 0 for none")
    local_crops_size: int = identity(96, "size of the local crops in px")
    local_crops_scale: list[float] = identity(
        [0.05, 0.4], "range of a local crop's area as a fraction of the tile's", 2
    )
    global_spacing_um: float | None = identity(
        None, "spacing in µm per px that global crops are read from slides at (null: that of tiling)"
    )
    local_spacing_um: float | None = identity(
        None, "the same for local crops: where the two differ, both are cut about the centre of one tile"
    )
    horizontal_flip: float = identity(0.5, "probability of a horizontal flip")
    vertical_flip: float = identity(0.0, "probability of a vertical flip")
    quarter_turns: bool = identity(False, "rotate by 0°, 90°, 180° or 270°, each equally likely")
    hed_jitter: float = identity(0.0, "probability of stain jitter in HED space")
    hed_strength: float = identity(
        0.05, "stain jitter: each stain is scaled by 1 ± this and shifted by ± this (optical density)"
    )
    color_jitter: float = identity(0.8, "probability of colour jitter")
    brightness: float = identity(0.4, "colour jitter: brightness factor in 1 ± this")
    contrast: float = identity(0.4, "colour jitter: contrast factor in 1 ± this")
    saturation: float = identity(0.2, "colour jitter: saturation factor in 1 ± this")
    hue: float = identity(0.1, "colour jitter: hue shift in ± this, as a fraction of the hue circle (at most 0.5)")
    grayscale: float = identity(0.2, "probability of conversion to grey")
    blur_global: list[float] = identity(
        [1.0, 0.1], "probability of Gaussian blur for the first and the second global crop", 2
    )
    blur_local: float = identity(0.5, "probability of Gaussian blur for local crops")
    blur_sigma: list[float] = identity([0.1, 2.0], "range of the blur's standard deviation in px", 2)
    solarize: float = identity(0.2, "probability of solarizing the second global crop")


@dataclass
class RegionAugConfig:
    """Crops of feature grids (level 2)."""

    global_crops_scale: float = identity(0.875, "side of a global crop as a fraction of the grid's")
    local_crops_number: int = identity(8, "number of local crops, 0 for none")
    local_crops_scale: float = identity(0.375, "side of a local crop as a fraction of the grid's")
    horizontal_flip: float = identity(0.5, "probability of a horizontal flip")
    vertical_flip: float = identity(0.5, "probability of a vertical flip")
    quarter_turns: bool = identity(
        False, "rotate the grid by 0°, 90°, 180° or 270° (moves the cells, but does not rotate their content)"
    )
    min_tissue: float = identity(0.25, "minimum fraction of a global crop's cells with tissue")
    redraws: int = identity(10, "maximum number of redraws of a global crop with less tissue")


@dataclass
class SamplingConfig:
    """Which tiles are drawn, and where on a slide they lie."""

    jitter_px: int = identity(
        0, "shift each tile by up to this many px along x and y, within its slide's tiles; at most half its side"
    )
    spacing_um: list[float] = identity(
        [], "spacings in µm per px at which tiles are read, one drawn for each sample (empty: that of tiling)"
    )
    spacing_shares: list[float] = identity([], "share of each of these spacings (empty: equal shares)")
    balance: list[str] = identity(
        [],
        "columns of slides.csv, or of tiles (annotation), whose values get equal shares, each within those before",
    )
    temperature: float = identity(0.0, "shares of balance: 0 equal, 1 in proportion to tiles, or between")
    weights: str | None = runtime(None, "CSV with a column of slides.csv or of tiles and weight, of shares")
    max_tiles_per_slide: int = identity(0, "train on a random subset of this many tiles per slide, 0 for all")


@dataclass
class SpeedConfig:
    """Device, precision and data loading; nothing here changes which crops are drawn."""

    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
    precision: str = identity("bf16", "bf16 (autocast; fp32 on a CPU without it), fp32 or fp64")
    num_workers: int = runtime(4, "worker processes that load samples and draw crop parameters")
    prefetch: int = runtime(2, "batches that each worker prepares in advance")
    compile: str = runtime("auto", "torch.compile of the blocks: true, false, or auto (on a GPU); changes rounding")
    checkpointing: bool = runtime(False, "activation checkpointing: less memory, more time, identical results")
    timeout_minutes: float = runtime(30.0, "minutes that a process waits for the other processes before it fails")


@dataclass
class PatchSpeedConfig(SpeedConfig):
    """Device, precision and data loading; nothing here changes which crops are drawn."""

    ram_cache: float = runtime(0.0, "GB of memory for decoded tiles, shared by the workers of a process; 0 for none")
    open_slides: int = runtime(64, "slides that each worker keeps open where tiles are read from slides")
    slide_cache: str | None = runtime(
        None, "local folder that keeps slides of object stores (null: histodino/slides in the user's cache folder)"
    )
    slide_cache_gb: float | None = runtime(
        None,
        "its largest size in GB; slides that were not used for longest are removed (null: as last given, else 100)",
    )
    cache_dir: str = runtime("auto", "where the index of shards is kept: auto (beside them), a folder, or none")


@dataclass
class RegionSpeedConfig(SpeedConfig):
    """Device, precision and data loading; nothing here changes which crops are drawn."""

    cache_dir: str = runtime("auto", "where grids are packed into one file: auto (in their folder), a folder, or none")
    gpu_cache: float | None = runtime(None, "GB of GPU memory for grids; null: up to a quarter of the free memory")


@dataclass
class EvaluateConfig:
    """Evaluation during training."""

    labels: str | None = runtime(
        None, "CSV with image_path,label,partition (train, val) for kNN evaluation during training"
    )
    robustness: str | None = runtime(
        None,
        "CSV with image_path,label and the column robustness_by (rows of partition val, else train; never test) for "
        "robustness during training",
    )
    robustness_by: str = runtime("centre", "column that the features should not follow: centre, scanner, stain, ...")
    select: str = runtime(
        "knn",
        "score that selects best.pt: knn, linear (a linear probe of the same rows), robustness (the robustness index), "
        "or mean (of those that there are labels for)",
    )
    every_steps: int = runtime(
        0, "steps between evaluations, 0 for one per epoch, or fewer where they would take over 5 % of the operations"
    )
    k: list[int] = runtime(
        [20], "numbers of neighbours; the score for the first one selects best.pt, and robustness counts as many"
    )
    temperature: float = runtime(0.07, "temperature of the neighbours' weights exp(cosine / temperature)")
    early_stopping_patience: int = runtime(0, "stop after this many evaluations without a better score, 0 for never")
    decline_patience: int | None = runtime(
        None,
        "stop after this many evaluations in a row with a score significantly below that of the initial weights, 0 for "
        "never; null: 3 with model.init and labels, else 0",
    )
    allow_leakage: bool = runtime(False, "accept val or test slides or patients that were used for pretraining")


@dataclass
class LoggingConfig:
    """Logs and checkpoints."""

    every_steps: int = runtime(10, "steps between lines of metrics.jsonl")
    save_every_steps: int = runtime(1000, "steps between checkpoints, 0 for by time only")
    save_every_minutes: float = runtime(10.0, "minutes between checkpoints, 0 for by steps only")
    keep_every_steps: int = runtime(0, "steps between checkpoints that are kept as checkpoints/step_*.pt, 0 for none")
    report: bool = runtime(True, "write RUN/report.html at the end of the run (needs matplotlib and jinja2)")
    tensorboard: bool = runtime(True, "write TensorBoard event files")
    wandb: bool = runtime(False, "log to Weights & Biases (pip install 'histodino[wandb]')")
    wandb_mode: str = runtime(
        "online", "online, or offline (into RUN/wandb, for `wandb sync`): needs no key or network"
    )
    wandb_project: str | None = runtime(None, "project in W&B (null: W&B's default)")
    wandb_name: str | None = runtime(None, "name of the run in W&B (null: that of the run folder)")
    wandb_group: str | None = runtime(None, "group of runs in W&B")
    mlflow: bool = runtime(False, "log to MLflow (pip install 'histodino[mlflow]')")


@dataclass
class PretrainConfig:
    """Settings of both levels."""

    data_dir: str = runtime("", "folder with the training data")
    output_dir: str = runtime("", "run folder")
    seed: int = identity(0, "random seed")
    dry_run: bool = runtime(False, "print what would be done, and stop")
    profile: bool = runtime(False, "train a few steps, print the time of each part, and stop; writes no run")
    profile_steps: int = runtime(20, "steps that profile=true measures, after a warm-up")
    model: ModelConfig = group(ModelConfig)
    objective: ObjectiveConfig = group(ObjectiveConfig)
    training: TrainingConfig = group(TrainingConfig)
    optim: OptimConfig = group(OptimConfig)
    speed: SpeedConfig = group(SpeedConfig)
    evaluate: EvaluateConfig = group(EvaluateConfig)
    logging: LoggingConfig = group(LoggingConfig)


@dataclass
class PatchConfig(PretrainConfig):
    """`dino pretrain patch`."""

    data_dir: str = runtime("", "ROOT that `dino tile` wrote, or a folder of images, tar or parquet files")
    more_data_dirs: list[str] = runtime(
        [], "further data folders, whose tiles are trained on together with the first's"
    )
    source: str = runtime("auto", "what tiles are read from: auto (what data_dir holds), files, tar, parquet or slides")
    slides: str | None = runtime(None, "folder or slides.csv of the slides, if they were moved after tiling")
    teacher: str | None = identity(
        None, "frozen network to distil: timm:NAME, a checkpoint file, a timm folder or a run folder; null: none"
    )
    filter: str | None = identity(None, 'conditions of tiles, on columns of tiles.csv and slides.csv: "tissue > 0.5"')
    distill: DistillConfig = group(DistillConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    speed: PatchSpeedConfig = group(PatchSpeedConfig)
    aug: PatchAugConfig = group(PatchAugConfig)


@dataclass
class RegionConfig(PretrainConfig):
    """`dino pretrain region`."""

    data_dir: str = runtime("", "ROOT that `dino extract` filled, or a folder of .pt grids or of .h5 features of tiles")
    encoder: str | None = runtime(None, "encoder whose grids are read (null: grids without a name, or the only ones)")
    grid_order: str = identity("yx", "order of the rows in .pt files without regions.csv: yx (row-major) or xy")
    region_cells: int = identity(16, "tiles along a side of a region, where regions are cut from .h5 files of tiles")
    speed: RegionSpeedConfig = group(RegionSpeedConfig)
    aug: RegionAugConfig = group(RegionAugConfig)


# Settings of the runs of each level, by the name of the level; the other parts of a level are in dino.api.levels.
LEVEL_CONFIGS: dict[str, type[PatchConfig] | type[RegionConfig]] = {"patch": PatchConfig, "region": RegionConfig}


@dataclass
class ExtendConfig:
    """A further segment of a finished run, on a schedule of its own."""

    epochs: float | None = identity(
        None, "epochs in all beyond the first schedule; training.nepochs=+20 is short for it"
    )
    steps: int | None = identity(None, "the same in steps; training.max_steps=+5000 is short for it")
    lr: float | None = identity(None, "peak learning rate, scaled as optim.lr (null: the run's)")
    min_lr: float | None = identity(None, "final learning rate (null: the run's)")
    warmup_epochs: float | None = identity(
        None, "epochs of linear learning-rate warm-up (null: the run's, at most a tenth of the segment)"
    )
    momentum_teacher: float | None = identity(
        None, "initial EMA momentum of the teacher; rises to 1 on a cosine schedule (null: the run's)"
    )


@dataclass
class ResumeConfig:
    """`dino resume`; runtime settings of the run (data_dir, speed.num_workers, ...) may be given too."""

    extend: ExtendConfig = group(ExtendConfig)
