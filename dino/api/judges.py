"""What judges a run: kNN on labelled images while it trains, and one verdict at its end."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dino import distributed, progress
from dino.api.run import Run
from dino.data.grids import read_grid
from dino.data.images import decode
from dino.data.loader import DrawnBatches
from dino.errors import DataError
from dino.evaluate.knn import knn_scores
from dino.evaluate.labels import LabelTable, check_leakage, read_labels
from dino.evaluate.verdict import Score, difference_error
from dino.extraction.embed import batches, embed, identity, normaliser, read_ahead
from dino.models.backbone import Backbone
from dino.models.weights import load_backbone_file
from dino.train.callbacks import Checkpoints
from dino.train.checkpoint import START
from dino.train.floor import judge_run, paired_features
from dino.train.judge import Judge, Scores
from dino.train.loop import Trainer
from dino.train.run_folder import RunFolder

JUDGED = 256  # samples whose two views must find each other
BATCH = 64
JUDGED_BATCH = 16


def build_judge(run: Run, folder: RunFolder, checkpoints: Checkpoints) -> Judge | None:
    """The callback that scores a run on ``evaluate.labels``; None without labels.

    Raises:
        DataError: If the labels are damaged, name missing files, or share slides or patients with the training data.
    """
    settings = run.config.evaluate
    if settings.labels is None:
        return None
    table = read_labels(Path(settings.labels))
    facts = check_leakage(table, run.level.slides, settings.allow_leakage)
    progress.say(f"{settings.labels}: compared with the training data: {facts['compared']}")
    scorer = _KnnScorer(run, table)
    return Judge(
        scorer,
        f"knn_{settings.k[0]}_accuracy",
        settings.every_steps or run.length.steps(1) or 1,
        settings.early_stopping_patience,
        folder,
        checkpoints,
    )


class _KnnScorer:
    """Embeds the labelled images, each on one process only, and scores them on all."""

    def __init__(self, run: Run, table: LabelTable) -> None:
        self.run, self.table = run, table
        transform, spec = run.level.transform, run.level.spec
        self.normalise = normaliser(transform.mean, transform.std, spec.patch_size) if transform else identity

    def __call__(self, backbone: Backbone) -> Scores:
        table, settings = self.table, self.run.config.evaluate
        features = self._features(backbone)
        train, test = table.rows("train"), table.rows("test")
        labels = table.labels
        return knn_scores(  # type: ignore[return-value]
            features[train],
            [labels[i] for i in train],
            features[test],
            [labels[i] for i in test],
            settings.k,
            settings.temperature,
        )

    def _features(self, backbone: Backbone) -> Tensor:
        """``(N, D)`` features of the table's rows, on every process."""
        shares = distributed.gather(self._own_features(backbone))
        features = [share for share in shares if isinstance(share, Tensor)]
        for share in shares:
            if isinstance(share, DataError):
                raise share  # on every process: none waits for the one that could not read its share
        everything = features[0].new_empty(len(self.table.paths), features[0].shape[1])
        for process, share in enumerate(features):
            everything[process :: distributed.world_size()] = share
        return everything

    def _own_features(self, backbone: Backbone) -> Tensor | DataError:
        """Features of the rows that are this process's, or why there are none."""
        mine = range(distributed.rank(), len(self.table.paths), distributed.world_size())
        pixels = read_ahead(self._read, [self.table.paths[i] for i in mine], workers=2)
        try:
            return embed(
                backbone, batches(pixels, BATCH), self.normalise, self.run.device, self.run.config.speed.precision
            )
        except DataError as error:
            return error

    def _read(self, path: Path) -> Tensor:
        if self.run.level.name == "patch":
            return decode(path)
        return read_grid(path, getattr(self.run.config, "grid_order", "yx"))


def final_verdict(run: Run, trainer: Trainer, folder: RunFolder, judge: Judge | None) -> dict[str, Any]:
    """Judge a finished run against the network it started from.

    Every process computes the same, so that nothing has to be exchanged.

    Returns:
        ``verdict`` (word and text) and ``floor`` (the numbers it rests on), for ``status.json``.
    """
    untrained = load_backbone_file(str(folder.checkpoints / START)).backbone
    untrained.to(run.device, next(trainer.model.teacher.parameters()).dtype)
    features = [_paired(run, backbone) for backbone in (trainer.model.teacher.backbone, untrained)]
    last = folder.last_metrics()
    judged, numbers = judge_run(
        *features,
        entropy=last.get("teacher_entropy_relative"),
        loss=last.get("loss_relative"),
        labelled=_labelled_score(judge),
    )
    return {"verdict": judged.to_dict(), "floor": numbers, "last_metrics": last}


def _paired(run: Run, backbone: Backbone) -> Tensor:
    level = run.level
    count, seed = min(JUDGED, len(level.dataset)), run.config.seed + 1
    size = min(JUDGED_BATCH, count)
    drawn = DrawnBatches(level.dataset, level.sampler(seed), level.crops.draw, None, size, seed)
    batches_of_pairs = (drawn[first] for first in range(0, count - size + 1, size))
    return paired_features(backbone, batches_of_pairs, level.crops, run.device)


def _labelled_score(judge: Judge | None) -> Score | None:
    if judge is None or not judge.latest or not judge.untrained:
        return None
    teacher, untrained = judge.latest[judge.tracked], judge.untrained[judge.tracked]
    queries = len(judge.score.table.rows("test")) if isinstance(judge.score, _KnnScorer) else 0
    return Score(
        f"{judge.tracked.split('_')[1]}-NN accuracy",
        teacher,
        untrained,
        difference_error(teacher, untrained, max(1, queries)),
    )
