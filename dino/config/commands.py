"""Settings of the commands other than pretraining and evaluation; part of :mod:`dino.config.schema`."""

from dataclasses import dataclass

from dino.config.declare import group, identity, runtime


@dataclass
class TileConfig:
    """`dino tile`."""

    spacing_um: float = identity(0.5, "spacing of the tiles in µm per px")
    tile_size_px: int = identity(256, "tile size in px at that spacing")
    overlap: float = identity(0.0, "overlap of neighbouring tiles as a fraction of their side: 0, 1/2, 2/3, 3/4, ...")
    region_size_px: int = identity(4096, "region size in px: a multiple of tile_size_px")
    region_overlap_cells: int = identity(0, "overlap of neighbouring regions in cells")
    min_tissue: float = identity(0.25, "minimum tissue fraction of a tile")
    min_tissue_region: float = identity(0.25, "minimum tissue fraction of a region")
    tolerance: float = identity(0.05, "relative spacing difference up to which pixels are not resampled")
    tissue_method: str = identity("hsv", "tissue segmentation by hs2p where no mask is given: hsv, otsu or threshold")
    tissue_downsample: int = identity(64, "downsample at which tissue is segmented or the mask is read")
    qc: bool = identity(False, "drop white, black, grey and blurred tiles with hs2p's pixel QC")
    roi_include: list[str] = identity(
        [], "classes of annotations inside which tiles and regions are cut (patterns such as Tumor*; empty: anywhere)"
    )
    roi_exclude: list[str] = identity([], "classes of annotations inside which none are cut, also of included ones")
    min_roi: float = identity(0.5, "minimum fraction of a tile or region inside roi_include and outside roi_exclude")
    reader: str = identity(
        "openslide",
        "library that decodes tiles: openslide, or fastslide (faster, other pixels; not for damaged slides)",
    )
    storage: str = identity("jpeg", "jpeg (a file per tile), tar or parquet (per slide), or none (coordinates only)")
    jpeg_quality: int = identity(90, "JPEG quality of the tiles")
    max_tiles_per_slide: int = identity(0, "keep a random subset of this many tiles per slide, 0 for all")
    seed: int = identity(0, "seed of the random subset")
    spacing_at_level_0: float | None = identity(None, "µm per px of level 0, for slides whose metadata has no spacing")
    previews: bool = runtime(True, "write preview images of tissue, tiles and regions")
    num_workers: int = runtime(2, "slides processed in parallel")
    slide_cache: str | None = runtime(
        None, "local folder that keeps slides of object stores (null: histodino/slides in the user's cache folder)"
    )
    slide_cache_gb: float | None = runtime(
        None,
        "its largest size in GB; slides that were not used for longest are removed (null: as last given, else 100)",
    )
    dry_run: bool = runtime(False, "print the expected number of tiles and files, GB and hours, and stop")


@dataclass
class ExtractConfig:
    """`dino extract`."""

    what: str = runtime("both", "level 1: both, tiles (one .h5 per slide) or regions (one .pt grid per region)")
    encoder: str | None = runtime(
        None, "name of the folders of features, for several models in one ROOT (null: tiles get the model's own name)"
    )
    grids: str | None = runtime(
        None, "level 2: encoder whose grids are read (null: the one that the model was trained on, or the only one)"
    )
    features: str = identity(
        "cls",
        "level 1: cls, cls+mean (and the mean of the patch tokens) or patches (and all patch tokens; needs what=tiles)",
    )
    storage: str = identity("fp32", "numbers in the .h5 files of tiles: fp32 or fp16")
    source: str = identity("auto", "source of the pixels: auto (slides, else tiles), slides, tiles or regions (images)")
    arch: str | None = identity(None, "architecture of an external checkpoint, if its number of heads is not dim/64")
    transform: str = identity("auto", "normalisation: auto (recorded in the checkpoint), imagenet, hipt or timm")
    input_size: int | None = identity(
        None, "px that models with an input size of their own (timm models) resize tiles to (null: that size)"
    )
    pretrained: bool = identity(True, "for timm:NAME: load timm's weights (false: random initialisation)")
    slides: str | None = runtime(None, "folder or slides.csv of the slides, if they were moved after tiling")
    grid_order: str = identity("yx", "order of the rows in .pt files without regions.csv: yx (row-major) or xy")
    precision: str = identity("bf16", "bf16 (autocast; fp32 on a CPU without it), fp32 or fp64")
    batch_size: int = runtime(64, "tiles (level 2: regions) per forward pass")
    num_workers: int = runtime(2, "threads that read and decode pixels")
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
    slide_cache: str | None = runtime(
        None, "local folder that keeps slides of object stores (null: histodino/slides in the user's cache folder)"
    )
    slide_cache_gb: float | None = runtime(
        None,
        "its largest size in GB; slides that were not used for longest are removed (null: as last given, else 100)",
    )
    dry_run: bool = runtime(False, "print what would be done, and stop")


@dataclass
class SlurmConfig:
    """The SLURM job; for other options use sbatch's SBATCH_* environment variables."""

    nodes: int = runtime(1, "number of nodes")
    gpus_per_node: int = runtime(1, "GPUs per node, with one process each; 0 for one process per node on the CPU")
    cpus_per_gpu: int = runtime(8, "CPU cores per process; should be a few more than num_workers")
    mem_gb: float | None = runtime(None, "memory per node in GB (null: the cluster's default)")
    timeout_hours: float = runtime(24.0, "time limit of the job in hours; it is requeued until the work is done")
    warn_seconds: int = runtime(300, "seconds before the time limit at which the run is saved and the job requeued")
    max_restarts: int = runtime(100, "maximum number of requeues after the time limit")
    partition: str | None = runtime(None, "SLURM's --partition")
    account: str | None = runtime(None, "SLURM's --account")
    qos: str | None = runtime(None, "SLURM's --qos")
    constraint: str | None = runtime(None, "SLURM's --constraint")
    setup: list[str] = runtime([], "shell commands to run first, such as 'module load cuda'")
    name: str = runtime("dino", "name of the job")
    folder: str | None = runtime(
        None, "folder for the job's output (null: RUN_slurm next to RUN, or ROOT_slurm for tile and extract)"
    )
    cluster: str = runtime("slurm", "slurm, or local to run the job on this machine")


@dataclass
class LaunchConfig:
    """`dino launch slurm`."""

    slurm: SlurmConfig = group(SlurmConfig)


@dataclass
class ExportConfig:
    """`dino export`."""

    arch: str | None = runtime(None, "architecture of an external checkpoint, if its number of heads is not dim/64")
    transform: str = runtime("auto", "normalisation recorded in the export: auto, imagenet, hipt or timm")
    tile_size_px: int | None = runtime(
        None,
        "tile size in px that the position table is resized to; null: 256 or the multiple of the patch size below",
    )
    ids: bool = runtime(False, "write ids of the slides and patients of the pretraining (false: salted hashes)")


@dataclass
class InfoConfig:
    """`dino info`."""

    arch: str | None = runtime(None, "architecture of an external checkpoint, if its number of heads is not dim/64")


@dataclass
class DemoConfig:
    """`dino demo`."""

    seed: int = runtime(0, "random seed")
    patch_steps: int = runtime(800, "level-1 training steps")
    region_steps: int = runtime(200, "level-2 training steps")
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
    num_workers: int = runtime(1, "worker processes that load samples and draw crop parameters")
