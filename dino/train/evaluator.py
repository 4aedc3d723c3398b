"""Evaluation of a run: the callback that scores it on labelled images, and the verdict at its end."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dino import distributed, progress
from dino.data import Batch
from dino.evaluate.retrieval import effective_rank, mean_pairwise_cosine, self_retrieval_accuracy
from dino.evaluate.verdict import Score, Signs, Verdict, difference_error, verdict
from dino.models.backbone import Backbone
from dino.train.callbacks import Checkpoints
from dino.train.checkpoint import BEST
from dino.train.loop import Callback, Crops, StepReport, Trainer

Scores = dict[str, float]


class Evaluator(Callback):
    """Scores teacher and student on labelled images, keeps ``best.pt``, and ends a run that no longer improves.

    Args:
        score: Scores of a backbone; called on every process, and returns the same numbers on each.
        tracked: Name of the score that decides, e.g. ``knn_20_accuracy``.
        queries: Number of labelled images that an accuracy is a mean over.
        every_steps: Steps between evaluations.
        patience: Evaluations without a better score after which the run ends, 0 for never.
        checkpoints: Saves ``last.pt``, which ``best.pt`` is a copy of.
    """

    def __init__(
        self,
        score: Callable[[Backbone], Scores],
        tracked: str,
        queries: int,
        every_steps: int,
        patience: int,
        checkpoints: Checkpoints,
    ) -> None:
        self.score, self.tracked, self.queries = score, tracked, queries
        self.every_steps, self.patience = every_steps, patience
        self.checkpoints, self.folder = checkpoints, checkpoints.folder
        self.best: float | None = None
        self.best_step: int | None = None
        self.misses = 0
        self.untrained: Scores = {}
        self.latest: Scores = {}

    def start(self, trainer: Trainer) -> None:
        """Score the initial weights of a new run; check ``best.pt`` of one that is resumed."""
        if trainer.step == 0:
            self.untrained = self.score(trainer.model.teacher.backbone)
            self.folder.log({"step": 0, "evaluation": {"untrained": self.untrained}})
            progress.say(f"untrained: {_text(self.untrained)}")
        elif self.best_step == trainer.step:
            self.checkpoints.name(BEST)  # the process may have been killed after it wrote last.pt and before this
        elif self.best_step is not None and distributed.is_main():
            self._check_best(self.best_step)
        trainer.stop_early = self._is_out_of_patience()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Evaluate when it is due; save a better checkpoint, or count an evaluation without improvement."""
        if report.step % self.every_steps and report.step != trainer.length.total:
            return
        trainer.settle(report)
        scores = {"teacher": self.score(trainer.model.teacher.backbone)}
        scores["student"] = self.score(trainer.model.student.backbone)
        self.latest = scores["teacher"]
        self.folder.log({"step": report.step, "evaluation": scores})
        progress.say(f"step {report.step}: teacher {_text(scores['teacher'])}; student {_text(scores['student'])}")
        if self.best is None or self.latest[self.tracked] > self.best:
            before = self.best, self.best_step
            self.misses = 0
            self.best, self.best_step = self.latest[self.tracked], report.step  # first: the checkpoint contains them
            if not (self.checkpoints.save(trainer) and self.checkpoints.name(BEST)):
                self.best, self.best_step = before
            return
        self.misses += 1
        trainer.stop_early = self._is_out_of_patience()

    @property
    def state_name(self) -> str:
        """The key in checkpoints since version 0.1.0, in which this class had another name."""
        return "Judge"

    def comparison(self) -> Score | None:
        """The tracked score of the teacher and of the untrained network; None before the first evaluation."""
        if not self.latest or not self.untrained:
            return None
        teacher, untrained = self.latest[self.tracked], self.untrained[self.tracked]
        name = f"{self.tracked.split('_')[1]}-NN accuracy"
        return Score(name, teacher, untrained, difference_error(teacher, untrained, self.queries))

    def state_dict(self) -> dict[str, Any]:
        """Best score and its step, misses, and the scores of the initial weights and of the last evaluation."""
        names = ("tracked", "best", "best_step", "misses", "untrained", "latest")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; from the beginning if its run was not evaluated, or tracked another score."""
        if state.get("tracked", self.tracked) != self.tracked:
            progress.warn(
                f"the best checkpoint is now chosen by {self.tracked}, no longer by {state['tracked']}: "
                "earlier scores are not compared"
            )
            return
        self.best, self.best_step = state.get("best"), state.get("best_step")
        self.misses = state.get("misses", 0)
        self.untrained, self.latest = state.get("untrained", {}), state.get("latest", {})

    def _is_out_of_patience(self) -> bool:
        return 0 < self.patience <= self.misses

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


@torch.no_grad()
def paired_features(backbone: Backbone, batches: Iterable[Batch], crops: Crops, device: torch.device) -> Tensor:
    """Features of the two global views of every sample.

    Args:
        backbone: In either mode, which is restored afterwards.
        batches: Samples with drawn crops.
        crops: Applies them.
        device: Device of the backbone.

    Returns:
        ``(2, N, D)`` float32 features on the CPU.
    """
    was_training = backbone.training
    backbone.eval()
    dtype = next(backbone.parameters()).dtype
    features = []
    for batch in batches:
        views = crops.apply(batch.inputs.to(device), batch.parameters)[0][:2].to(dtype)  # (2, B, C, h, w)
        tokens = backbone(views.flatten(0, 1), cls_only=True)
        features.append(tokens.cls.unflatten(0, views.shape[:2]).float().cpu())  # (2, B, D)
    backbone.train(was_training)
    return torch.cat(features, dim=1)


def evaluate_run(
    teacher: Tensor, untrained: Tensor, *, entropy: float | None, loss: float | None, labelled: Score | None
) -> tuple[Verdict, dict[str, float]]:
    """The verdict on a finished run, and the numbers it is based on.

    Args:
        teacher: ``(2, N, D)`` features of pairs of views by the trained teacher.
        untrained: The same by the initial weights.
        entropy: Teacher entropy as a fraction of ln K.
        loss: Loss as a fraction of ln K.
        labelled: kNN accuracy if labels were given; without it, self-retrieval decides.
    """
    accuracies = {"teacher": self_retrieval_accuracy(*teacher), "untrained": self_retrieval_accuracy(*untrained)}
    error = difference_error(accuracies["teacher"], accuracies["untrained"], teacher.shape[1])
    score = labelled or Score("self-retrieval accuracy", **accuracies, standard_error=error)
    numbers = {
        "own_place_teacher": accuracies["teacher"],
        "own_place_untrained": accuracies["untrained"],
        "effective_rank": effective_rank(teacher[0]),
        "mean_cosine": mean_pairwise_cosine(teacher[0]),
    }
    signs = Signs(entropy, loss, numbers["effective_rank"], numbers["mean_cosine"], teacher.shape[-1], score)
    return verdict(signs), numbers
