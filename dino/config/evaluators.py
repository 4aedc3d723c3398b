"""Settings of evaluators with groups of their own; part of :mod:`dino.config.schema`."""

from dataclasses import dataclass

from dino.config.declare import group, runtime


@dataclass
class ScoringConfig:
    """Settings of every evaluation of labels."""

    folds: int = runtime(5, "folds of the cross-validation of a table without partitions, grouped by patient")
    splits: str | None = runtime(None, "CSV of the folds that an earlier evaluation wrote; null: draw them by seed")
    seed: int = runtime(0, "random seed of folds, draws, training and bootstrap samples")
    resamples: int = runtime(1000, "bootstrap samples of patients for the 95 % intervals, 0 for no intervals")
    device: str = runtime("auto", "auto, cpu, cuda or cuda:N")
    output: str | None = runtime(
        None,
        "JSON file for the result, with a CSV, a figure and the folds beside it (null: into the run folder of the "
        "first model, if it is one)",
    )


@dataclass
class EvaluationConfig(ScoringConfig):
    """Settings of every evaluation of labelled tiles (or grids)."""

    label: str = runtime(
        "label", "column of the labels; rows without a value in another one, such as annotation, are left out"
    )
    arch: str | None = runtime(None, "architecture of an external checkpoint, if its number of heads is not dim/64")
    transform: str = runtime("auto", "normalisation: auto (recorded in the checkpoint), imagenet, hipt or timm")
    input_size: int | None = runtime(
        None, "px that models with an input size of their own (timm models) resize tiles to (null: that size)"
    )
    grid_order: str = runtime("yx", "order of the rows in .pt files without regions.csv: yx (row-major) or xy")
    allow_leakage: bool = runtime(
        False,
        "accept test slides or patients that were used for pretraining, and test rows that chose the checkpoint (noted "
        "in every table)",
    )
    precision: str = runtime("bf16", "bf16 (autocast; fp32 on a CPU without it), fp32 or fp64")
    batch_size: int = runtime(64, "images per forward pass")
    num_workers: int = runtime(2, "threads that read and decode images")
    cache: str = runtime("auto", "where features are kept: auto (~/.cache/histodino), none, or a folder")


@dataclass
class KnnConfig(EvaluationConfig):
    """`dino evaluate knn`."""

    k: list[int] = runtime([10, 20, 100, 200], "numbers of neighbours")
    temperature: float = runtime(0.07, "temperature of the neighbours' weights exp(cosine / temperature)")


@dataclass
class LinearConfig(EvaluationConfig):
    """`dino evaluate linear`."""

    strengths: list[float] = runtime(
        [10.0**power for power in range(-6, 3)],
        "values of C (inverse regularisation) to choose from; the first that does not converge ends the search",
    )


@dataclass
class FewshotConfig(EvaluationConfig):
    """`dino evaluate fewshot`."""

    shots: list[int] = runtime([1, 2, 4, 8, 16], "numbers of labelled examples per class")
    draws: int = runtime(100, "draws of the examples; the score is their mean")


@dataclass
class RetrievalConfig(EvaluationConfig):
    """`dino evaluate retrieval`."""

    k: list[int] = runtime([1, 5, 10], "numbers of first hits that are looked at")


@dataclass
class ClusterConfig(EvaluationConfig):
    """`dino evaluate cluster`."""

    repeats: int = runtime(10, "starts of k-means, of which the best is taken")


@dataclass
class CompareConfig:
    """`dino evaluate compare`."""

    output: str | None = runtime(
        None, "file for the table, with the figure as .png beside it: .md (Markdown), .tex (LaTeX) or .csv; null: none"
    )


@dataclass
class MilConfig:
    """Networks that predict from bags of feature vectors."""

    hidden: int = runtime(256, "width of the embedding that each feature vector is mapped to")
    attention: int = runtime(128, "width of the gated attention")
    epochs: int = runtime(30, "maximum number of epochs; inner folds choose how many")
    lr: float = runtime(1e-3, "learning rate of AdamW")
    weight_decay: float = runtime(0.01, "weight decay of AdamW")
    dropout: float = runtime(0.25, "dropout rate")
    batch_size: int = runtime(1, "slides or patients per optimizer step")
    tiles: int | None = runtime(
        None, "feature vectors of a slide or patient that a training step sees, drawn anew in each epoch; null: all"
    )


@dataclass
class AbmilConfig(MilConfig):
    """Attention-based multiple-instance learning."""

    piece: int = runtime(
        8192, "feature vectors in memory at once; a larger bag is read in pieces, with equal gradients"
    )


@dataclass
class HiptConfig(MilConfig):
    """HIPT's transformer over the features of regions."""

    hidden: int = runtime(192, "width of the transformer")
    attention: int = runtime(192, "width of the gated attention")
    lr: float = runtime(2e-4, "learning rate of AdamW")
    layers: int = runtime(2, "transformer layers")
    heads: int = runtime(3, "attention heads of each layer, a divisor of hidden")


@dataclass
class SlideConfig(ScoringConfig):
    """`dino evaluate slide`."""

    encoder: str | None = runtime(None, "each FEATURES is a ROOT, of which features_<encoder> is read")
    task: str | None = runtime(
        None, "classification, regression (of a numeric label) or survival; null: survival without a column label"
    )
    unit: str | None = runtime(
        None, "what is predicted: slide, or patient (of all its slides); null: slide if there is a column slide_id"
    )
    slides: str | None = runtime(
        None, "CSV with slide_id and patient_id, for labels of patients alone (null: slides_status.csv of the ROOT)"
    )
    method: list[str] = runtime(
        ["mean", "abmil"],
        "mean (linear model of the mean feature vector), which is always scored, abmil (gated attention) and hipt (a "
        "transformer over features of regions, then gated attention)",
    )
    inner_folds: int = runtime(3, "folds of the training rows that choose penalties and epochs")
    max_missing: int = runtime(0, "accept this many labelled slides or patients without features, and leave them out")
    allow_leakage: bool = runtime(
        False,
        "accept test slides or patients that the model of the features was pretrained on (recorded in the result)",
    )
    memory_gb: float = runtime(4.0, "GB of features kept in memory; others are read again in each epoch")
    abmil: AbmilConfig = group(AbmilConfig)
    hipt: HiptConfig = group(HiptConfig)


@dataclass
class RobustnessConfig(EvaluationConfig):
    """`dino evaluate robustness`."""

    by: str = runtime("centre", "column that the features should not follow: centre, scanner, stain, ...")
    slides: str | None = runtime(
        None, "ROOT or slides.csv that has this column, joined by slide_id; null: it is a column of the labels"
    )
    k: list[int] = runtime([5, 11, 21], "numbers of neighbours to choose from, by kNN classification of the labels")
    m: int = runtime(5, "neighbours of each kind that CRoMa averages")
    apd: int = runtime(20, "repetitions of APD, 0 to leave it out")
    strengths: list[float] = runtime([0.001, 0.01, 0.1], "values of C (inverse regularisation) of the linear probes")
    folds: int = runtime(5, "folds of the linear probes, grouped by patient; fewer where patients are few")


# Settings of `dino evaluate NAME`.
EVALUATION_CONFIGS: dict[str, type] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "fewshot": FewshotConfig,
    "retrieval": RetrievalConfig,
    "cluster": ClusterConfig,
    "slide": SlideConfig,
    "robustness": RobustnessConfig,
    "compare": CompareConfig,
}
