"""The commands ``dino evaluate ...``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dino.cli.command import ConfigFile, with_settings
from dino.cli.grammar import UsageError, expect_many, split
from dino.config.load import load_config
from dino.config.schema import EVALUATION_CONFIGS

if TYPE_CHECKING:
    from dino.evaluate.results import Result

ModelArguments = Annotated[list[str] | None, typer.Argument(metavar="MODEL... LABELS [KEY=VALUE]...", hidden=True)]
FeatureArguments = Annotated[list[str] | None, typer.Argument(metavar="FEATURES... LABELS [KEY=VALUE]...", hidden=True)]
ResultArguments = Annotated[list[str] | None, typer.Argument(metavar="RESULT... [KEY=VALUE]...", hidden=True)]


def knn(arguments: ModelArguments = None, config: ConfigFile = None) -> None:
    """Classify test images by their nearest training images (weighted kNN on frozen features).

    MODEL is a run folder, a checkpoint file, an export, timm:NAME, or a folder of features that `dino extract` wrote;
    several are compared with the first one. LABELS is a CSV (commas, semicolons or tabs) with the columns image_path,
    label and partition (train, val or test), and optionally slide_id and patient_id: test rows are classified by train
    rows. Without a partition column the rows are cross-validated, with no patient on both sides. Paths are relative to
    the folder of the CSV. For folders of features, slide_id, x and y (as in tiles.csv) do instead of image_path.

    Each score has a 95 % interval from a bootstrap over patients. Beside the models, a random initialization, 8 x 8
    pixels and chance are scored. It is an error if a model was pretrained on test slides or patients, or if test rows
    chose its checkpoint (evaluate.labels). The result of a run is written to RUN/knn_LABELS.json, named after the CSV,
    with a table (.csv) and a figure (.png) beside it; output=FILE writes them elsewhere.

    For example:

        dino evaluate knn runs/patch labels.csv k=[10,20]
        dino evaluate knn runs/ours timm:vit_small_patch14_dinov2.lvd142m labels.csv output=comparison.json
    """
    _evaluate("knn", arguments, config)


def linear(arguments: ModelArguments = None, config: ConfigFile = None) -> None:
    """Classify test images by a linear probe: L2-regularised logistic regression on standardised features.

    MODEL and LABELS are those of `dino evaluate knn`. The strength of the regularisation is chosen on rows of partition
    val, or where there are none by a cross-validation within the training rows, grouped by patient.

    For example:

        dino evaluate linear runs/patch labels.csv
        dino evaluate linear runs/ours runs/theirs labels.csv folds=10 output=comparison.json
    """
    _evaluate("linear", arguments, config)


def fewshot(arguments: ModelArguments = None, config: ConfigFile = None) -> None:
    """Classify test images by the class means of a few labelled examples (SimpleShot), in the mean over many draws.

    MODEL and LABELS are those of `dino evaluate knn`.

    For example:

        dino evaluate fewshot runs/patch labels.csv shots=[1,4,16] draws=200
    """
    _evaluate("fewshot", arguments, config)


def retrieval(arguments: ModelArguments = None, config: ConfigFile = None) -> None:
    """Retrieve images of the same class from other patients: mean average precision and hits among the first k.

    MODEL and LABELS are those of `dino evaluate knn`. Test rows are the queries, train rows the candidates; without
    partitions, all rows are both. Images of the query's own patient are left out.

    For example:

        dino evaluate retrieval runs/patch labels.csv k=[1,5]
    """
    _evaluate("retrieval", arguments, config)


def cluster(arguments: ModelArguments = None, config: ConfigFile = None) -> None:
    """Cluster test images without labels by k-means, and compare the clusters with the classes (ARI and NMI).

    MODEL and LABELS are those of `dino evaluate knn`. There are as many clusters as classes.

    For example:

        dino evaluate cluster runs/patch labels.csv
    """
    _evaluate("cluster", arguments, config)


def slide(arguments: FeatureArguments = None, config: ConfigFile = None) -> None:
    """Predict slides or patients from features: classes, numbers or survival.

    FEATURES is a folder with one file of feature vectors per slide, of tiles (ROOT/features_ENCODER), of regions
    (ROOT/region_features_ENCODER, ROOT/slide_features) or one vector (ROOT/slide_features_ENCODER); files of CLAM,
    TRIDENT and slide2vec are read too. Several are compared with the first one. LABELS is a CSV (commas, semicolons or
    tabs) with slide_id or patient_id, and label (with task=regression a number) or time and event (1, or 0 for
    censored). The slides of a patient are one bag.

    Each is scored by mean pooling with a linear model (logistic regression, ridge regression, or Cox's model by
    lifelines) and by attention-based multiple-instance learning (ABMIL, gated). With method=hipt it is scored by HIPT's
    slide level, a transformer over all vectors and then gated attention: made for vectors of regions, of which a slide
    has at most a few thousand. Mean pooling is always beside them. A column partition (train, test, val) says how to
    split; without it the rows are cross-validated, with no patient on both sides. Penalties and numbers of epochs are
    chosen within the training rows, or on rows of partition val.

    Each score has a 95 % interval from a bootstrap over patients. AUC, C-index and Pearson's correlation are means over
    folds. output=FILE.json writes the result, with a table (.csv), a figure (.png) and the folds beside it.

    For example:

        dino evaluate slide slides/features_ours slides/features_theirs labels.csv output=subtype.json
        dino evaluate slide slides/features_ours survival.csv unit=patient method=mean
        dino evaluate slide slides/region_features_ours labels.csv method=abmil,hipt
    """
    positional, overrides = split(arguments or [])
    features, labels = expect_many(positional, "FEATURES", "LABELS")
    settings = load_config(EVALUATION_CONFIGS["slide"], file=config, overrides=overrides)
    from dino import api

    _show(api.evaluate_slide(features, Path(labels), settings))


def robustness(arguments: ModelArguments = None, config: ConfigFile = None) -> None:
    """Measure whether features follow the biology, or the centre, scanner or stain.

    MODEL and LABELS are those of `dino evaluate knn`; LABELS has a further column centre (or by=COLUMN), or slides=FILE
    has it for each slide. Test rows are scored; without a column partition all rows are. Rows of one patient are never
    compared with one another.

    Among the nearest neighbours of each row, those of its class from another centre are evidence of biology, and those
    of another class from its centre are evidence of the centre. The columns are the robustness index (ri: 1 biology, 0
    centre), the same weighted by distance (mari), the median margin between both (croma, -1 to 1) and the mean of its
    lowest tenth (croma tail), the average performance drop of a classifier whose training data associate class and
    centre (apd, 0 is best), and the balanced accuracy of linear probes of the class and of the centre. The last one is
    best at chance, which is shown too.

    Every centre needs rows of two classes, and every class rows of two centres. The result is written as that of the
    other evaluations, with a further figure: the neighbours, and the features coloured by class and by centre.

    For example:

        dino evaluate robustness runs/patch labels.csv
        dino evaluate robustness runs/ours runs/theirs labels.csv by=scanner slides=slides.csv output=robustness.json
    """
    positional, overrides = split(arguments or [])
    models, labels = expect_many(positional, "MODEL", "LABELS")
    settings = load_config(EVALUATION_CONFIGS["robustness"], file=config, overrides=overrides)
    from dino import api

    _show(api.evaluate_robustness(models, labels, settings))


def compare(arguments: ResultArguments = None, config: ConfigFile = None) -> None:
    """Show the results of several evaluations as one table and one figure.

    RESULT is a JSON file that an evaluation wrote. With output=FILE the table is written as Markdown (.md), LaTeX
    (.tex) or CSV (.csv), and the figure, scores and differences with their intervals, as .png beside it.

    For example:

        dino evaluate compare runs/patch/*_labels.json output=table.tex
    """
    positional, overrides = split(arguments or [])
    if not positional:
        raise UsageError("expected at least one RESULT, found no arguments")
    settings = load_config(EVALUATION_CONFIGS["compare"], file=config, overrides=overrides)
    from dino import api, progress

    progress.tables(*api.compare([Path(path) for path in positional], settings), names=3)


def _evaluate(name: str, arguments: list[str] | None, config: Path | None) -> None:
    positional, overrides = split(arguments or [])
    models, labels = expect_many(positional, "MODEL", "LABELS")
    settings = load_config(EVALUATION_CONFIGS[name], file=config, overrides=overrides)
    from dino import api

    _show(api.evaluate(name, models, labels, settings))


def _show(result: "Result") -> None:
    from dino import progress
    from dino.evaluate.scores import marks

    progress.tables(*result.table())
    for line in marks(result):
        progress.warn(line)


COMMANDS = {
    function.__name__: (with_settings(EVALUATION_CONFIGS[function.__name__]), function)
    for function in (knn, linear, fewshot, retrieval, cluster, slide, robustness, compare)
}
