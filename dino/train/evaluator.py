"""Evaluation of a run: the callback that scores it on labelled images, and the verdict at its end."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino import distributed, progress
from dino.data import Batch
from dino.evaluate.retrieval import effective_rank, mean_pairwise_cosine, self_retrieval_hits
from dino.evaluate.verdict import INITIAL, STUDENT, TEACHER, Score, Signs, Verdict, in_words, paired_error, verdict
from dino.models.backbone import Backbone
from dino.train.callbacks import Checkpoints
from dino.train.checkpoint import BEST
from dino.train.loop import Callback, Crops, StepReport, Trainer

Scores = dict[str, float]
SELF_RETRIEVAL = "self_retrieval_accuracy"
OWN_PLACE = "own_place_"  # of each network's self-retrieval accuracy in status.json, since version 0.1.0
STATE = ("tracked", "rows", "best", "best_step", "misses", "declines", "baselines", "latest")


@dataclass(frozen=True)
class Measure:
    """How a run is scored while it trains.

    Attributes:
        score: Scores of a backbone; called on every process, and returns the same numbers on each.
        tracked: Name of the score that decides, e.g. ``knn_20_accuracy``.
        name: The same in words.
        queries: Number of samples that it is a mean over.
        rows: Identifies the samples: scores over others are not compared.
        tokens: Patch tokens of all the images (or grids) that a backbone embeds for a score.
        labelled: Whether it measures what the features are for, so that the highest score is the best. Self-retrieval
            does not; it only excludes checkpoints that are significantly worse than the initial weights.
    """

    score: Callable[[Backbone], Scores]
    tracked: str
    name: str
    queries: int
    rows: str
    tokens: int = 0
    labelled: bool = True


class Evaluator(Callback):
    """Scores teacher and student, keeps ``best.pt``, and ends a run that no longer improves, or that declines.

    With initial weights from ``model.init``, these are the first ``best.pt``.

    Args:
        measure: How.
        baselines: What the teacher is compared with, by name; first what the run started from. Each returns a backbone.
        every_steps: Steps between evaluations.
        patience: Evaluations without a better score after which the run ends, 0 for never.
        decline_patience: Evaluations in a row that are significantly worse than the start, after which the run ends; 0
            for never.
        checkpoints: Saves ``last.pt``, which ``best.pt`` is a copy of.
    """

    def __init__(
        self,
        measure: Measure,
        baselines: Mapping[str, Callable[[Trainer], Backbone]],
        every_steps: int,
        patience: int,
        decline_patience: int,
        checkpoints: Checkpoints,
    ) -> None:
        self.measure, self.tracked, self.rows = measure, measure.tracked, measure.rows
        self.build_baselines = baselines
        self.every_steps, self.patience, self.decline_patience = every_steps, patience, decline_patience
        self.checkpoints, self.folder = checkpoints, checkpoints.folder
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        self.best_step: int | None = None
        self.misses = self.declines = 0
        self.baselines: dict[str, Scores] = {}
        self.latest: Scores = {}

    def start(self, trainer: Trainer) -> None:
        """Score the baselines of a new run; check ``best.pt`` of one that is resumed."""
        if trainer.step == 0:
            self._reset()  # a run that was killed at its start has a checkpoint of step 0
        if not self.baselines:
            self.baselines = {name: self.measure.score(build(trainer)) for name, build in self.build_baselines.items()}
            for name, scores in self.baselines.items():
                progress.say(f"{in_words(name)}: {_text(scores)}")
        if trainer.step == 0:
            self.folder.log({"step": 0, "evaluation": self.baselines})
            if INITIAL in self.baselines:
                self._keep(trainer, self.baselines[INITIAL][self.tracked], 0)
        elif self.best_step == trainer.step:
            self.checkpoints.name(BEST)  # the process may have been killed after it wrote last.pt and before this
        elif self.best_step is not None and distributed.is_main():
            self._check_best(self.best_step)
        if trainer.schedules.begins_at(trainer.step):
            self.misses = 0  # a run that stopped early is extended
        trainer.stop_early = self._is_out_of_patience()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Evaluate when it is due; save a better checkpoint, or count an evaluation without improvement."""
        if report.step % self.every_steps and report.step != trainer.length.total:
            return
        trainer.settle(report)
        scores = {TEACHER: self.measure.score(trainer.model.teacher.backbone)}
        scores[STUDENT] = self.measure.score(trainer.model.student.backbone)
        self.latest = scores[TEACHER]
        self.folder.log({"step": report.step, "evaluation": scores})
        progress.say(f"step {report.step}: teacher {_text(scores[TEACHER])}; student {_text(scores[STUDENT])}")
        score = self._compare()
        self.declines = self.declines + 1 if score.from_start.is_lower else 0
        if self.best is None or (score.teacher > self.best if self.measure.labelled else not self.declines):
            self._keep(trainer, score.teacher, report.step)
        else:
            self.misses += 1
        trainer.stop_early = self._is_out_of_patience()
        if 0 < self.decline_patience <= self.declines:
            self.folder.warn(
                f"step {report.step}: stopping, because {self.measure.name} has been significantly below that of the "
                f"{in_words(score.from_start.baseline)} in {self.declines} evaluations; for the next run lower optim.lr"
            )

    def comparison(self) -> Score | None:
        """The tracked score of the teacher and of its baselines; None before the first evaluation."""
        return self._compare() if self.latest else None

    def _compare(self) -> Score:
        baselines = {name: scores[self.tracked] for name, scores in self.baselines.items()}
        return Score(self.measure.name, self.latest[self.tracked], baselines, self.measure.queries)

    def _keep(self, trainer: Trainer, score: float, step: int) -> None:
        """Save the state, which is the best so far, as ``last.pt`` and ``best.pt``."""
        before = self.best, self.best_step
        self.misses = 0
        self.best, self.best_step = score, step  # first: the checkpoint contains them
        if not (self.checkpoints.save(trainer) and self.checkpoints.name(BEST)):
            self.best, self.best_step = before

    @property
    def state_name(self) -> str:
        """The key in checkpoints since version 0.1.0, in which this class had another name."""
        return "Judge"

    def state_dict(self) -> dict[str, Any]:
        """Best score and its step, counts of evaluations, scores of the baselines and of the last evaluation."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; from the beginning if its run was not evaluated, or by other rows or scores."""
        if not state:
            return
        if (state.get("tracked"), state.get("rows")) != (self.tracked, self.rows):
            rows = "" if state.get("rows") == self.rows else " on other rows than before"
            progress.warn(
                f"the best checkpoint is now chosen by {self.tracked}{rows}, before by {state.get('tracked')}: "
                "earlier scores are not compared"
            )
            return
        for name in STATE:
            setattr(self, name, state[name])

    def _is_out_of_patience(self) -> bool:
        return 0 < self.patience <= self.misses or 0 < self.decline_patience <= self.declines

    def _check_best(self, step: int) -> None:
        """Warn if ``best.pt`` is not the checkpoint of the best score, as after damage to the disk."""
        found = self.checkpoints.files.step_of(BEST)
        if found != step:
            self.folder.warn(
                f"expected {self.checkpoints.files.folder / BEST} to be of step {step}, the best so far, found "
                f"{'no readable checkpoint' if found is None else f'step {found}'}; "
                "it is written at the next better score"
            )


def _text(scores: Scores) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if value is not None)


@dataclass(frozen=True)
class PairedFeatures:
    """Features of the two global views of samples, in rounds: each of R rounds has N samples, with other crops.

    Attributes:
        features: ``(R, 2, N, D)`` float32 on the CPU.
        samples: ``(R, N)`` int64, the samples' indices in the dataset.
    """

    features: Tensor
    samples: Tensor

    def hits(self) -> Tensor:
        """Of each query, in [0, 1]: whether the nearest of the N second views is of its sample. (R, N)."""
        return torch.stack([self_retrieval_hits(*views) for views in self.features])

    def error_of_difference(self, other: "PairedFeatures") -> float:
        """Standard error of the difference of two networks' self-retrieval accuracies, for the same views.

        The queries of one sample are no independent observations: their differences are averaged first.
        """
        differences = (self.hits() - other.hits()).flatten()
        samples, which, counts = self.samples.flatten().unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(samples), dtype=torch.float64).index_add_(0, which, differences)
        return paired_error((sums / counts).tolist())


@torch.no_grad()
def paired_features(
    backbones: Mapping[str, Backbone],
    batches: Iterable[Batch],
    crops: Crops,
    device: torch.device,
    rounds: int,
    count: int,
) -> dict[str, PairedFeatures]:
    """Features of the two global views of every sample by each of several networks; the views are made once.

    Args:
        backbones: By name, each in either mode, which is restored afterwards.
        batches: Samples with drawn crops, ``rounds`` times ``count`` or more.
        crops: Applies them.
        device: Device of the backbones.
        rounds: Number R of rounds.
        count: Number N of samples in a round.

    Returns:
        The features of the first ``rounds * count`` samples, by the networks' names.
    """
    modes = {name: backbone.training for name, backbone in backbones.items()}
    features: dict[str, list[Tensor]] = {name: [] for name in backbones}
    samples: list[int] = []
    for backbone in backbones.values():
        backbone.eval()
    for batch in batches:
        samples += batch.indices
        views = crops.apply(batch.inputs.to(device), batch.parameters)[0][:2]  # (2, B, C, h, w)
        for name, backbone in backbones.items():
            dtype = next(backbone.parameters()).dtype
            tokens = backbone(views.flatten(0, 1).to(dtype), cls_only=True)
            features[name].append(tokens.cls.unflatten(0, views.shape[:2]).float().cpu())  # (2, B, D)
    for name, backbone in backbones.items():
        backbone.train(modes[name])
    order = torch.tensor(samples[: rounds * count]).view(rounds, count)

    def in_rounds(found: Sequence[Tensor]) -> Tensor:
        drawn = torch.cat(list(found), dim=1)[:, : rounds * count]  # (2, R N, D)
        return drawn.unflatten(1, (rounds, count)).transpose(0, 1)

    return {name: PairedFeatures(in_rounds(found), order) for name, found in features.items()}


def label_free_scores(found: PairedFeatures) -> Scores:
    """Self-retrieval accuracy over all rounds; effective rank and mean cosine of the first views of the first round."""
    first = found.features[0, 0]
    return {
        SELF_RETRIEVAL: float(found.hits().mean()),
        "effective_rank": effective_rank(first),
        "mean_cosine": mean_pairwise_cosine(first),
    }


def evaluate_run(
    teacher: PairedFeatures,
    baselines: Mapping[str, PairedFeatures],
    *,
    entropy: float | None,
    loss: float | None,
    evaluator: Evaluator | None,
) -> tuple[Verdict, dict[str, Any]]:
    """The verdict on a finished run, and the numbers it is based on.

    Args:
        teacher: Features of pairs of views by the trained teacher.
        baselines: The same by what the teacher is compared with, by name; first what the run started from.
        entropy: Teacher entropy as a fraction of ln K.
        loss: Loss as a fraction of ln K.
        evaluator: What scored the run while it trained; without labels, self-retrieval decides.
    """
    own = label_free_scores(teacher)
    others = {name: label_free_scores(features) for name, features in baselines.items()}
    retrieval = {name: scores[SELF_RETRIEVAL] for name, scores in others.items()}
    score = evaluator.comparison() if evaluator and evaluator.measure.labelled else None
    if score is None:
        (rounds, count), queries = teacher.samples.shape, teacher.samples.numel()
        errors = {name: teacher.error_of_difference(features) for name, features in baselines.items()}
        samples = count if rounds > 1 else None
        score = Score("self-retrieval accuracy", own[SELF_RETRIEVAL], retrieval, queries, samples, errors)
    signs = Signs(
        entropy,
        loss,
        own["effective_rank"],
        own["mean_cosine"],
        teacher.features.shape[-1],
        score,
        evaluator.best_step if evaluator else None,
    )
    numbers = {
        f"{OWN_PLACE}{TEACHER}": own[SELF_RETRIEVAL],
        **{f"{OWN_PLACE}{name}": accuracy for name, accuracy in retrieval.items()},
        "effective_rank": own["effective_rank"],
        "mean_cosine": own["mean_cosine"],
        "comparison": score.to_dict(),
    }
    return verdict(signs), numbers
