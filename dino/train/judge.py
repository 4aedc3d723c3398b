"""The judge of a run while it trains: kNN on labelled images, the best checkpoint, and the end of a run that stalls."""

from collections.abc import Callable
from typing import Any

from dino import distributed, progress
from dino.models.backbone import Backbone
from dino.train.callbacks import Checkpoints
from dino.train.checkpoint import BEST
from dino.train.loop import StepReport, Trainer
from dino.train.run_folder import RunFolder

Scores = dict[str, float]


class Judge:
    """kNN of teacher and student on labelled images while training; keeps ``best.pt`` and ends a run that stalls.

    Args:
        score: Scores of a backbone; called on every process, returns the same numbers on each.
        tracked: Which score decides, e.g. ``knn_20_accuracy``.
        every_steps: Steps between evaluations.
        patience: Evaluations without a better score before the run ends, 0 for never.
        folder: The run folder.
        checkpoints: Saves ``last.pt``, of which ``best.pt`` is a copy.
    """

    def __init__(
        self,
        score: Callable[[Backbone], Scores],
        tracked: str,
        every_steps: int,
        patience: int,
        folder: RunFolder,
        checkpoints: Checkpoints,
    ) -> None:
        self.score, self.tracked, self.every_steps, self.patience = score, tracked, every_steps, patience
        self.folder, self.checkpoints = folder, checkpoints
        self.best: float | None = None
        self.best_step: int | None = None
        self.misses = 0
        self.untrained: Scores = {}
        self.latest: Scores = {}

    def start(self, trainer: Trainer) -> None:
        """Judge the start weights, as the floor of the run; or take up where a process was stopped or killed."""
        if trainer.step == 0:
            self.untrained = self.score(trainer.model.teacher.backbone)
            self.folder.log({"step": 0, "evaluation": {"untrained": self.untrained}})
            progress.say(f"untrained: {_shown(self.untrained)}")
        elif self.best_step == trainer.step:
            self.checkpoints.name(BEST)  # a process killed after it wrote the checkpoint did not come to this
        elif self.best_step is not None and distributed.is_main():
            self._look_for_best(self.best_step)
        trainer.stop_early = self._has_stalled()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Evaluate when it is due, keep the best, and count what is not better."""
        if report.step % self.every_steps and report.step != trainer.length.total:
            return
        trainer.settle(report)
        scores = {"teacher": self.score(trainer.model.teacher.backbone)}
        scores["student"] = self.score(trainer.model.student.backbone)
        self.latest = scores["teacher"]
        self.folder.log({"step": report.step, "evaluation": scores})
        progress.say(f"step {report.step}: teacher {_shown(scores['teacher'])}; student {_shown(scores['student'])}")
        if self.best is None or self.latest[self.tracked] > self.best:
            before = self.best, self.best_step
            self.misses = 0
            self.best, self.best_step = self.latest[self.tracked], report.step  # first: the checkpoint holds them
            if not (self.checkpoints.save(trainer) and self.checkpoints.name(BEST)):
                self.best, self.best_step = before
            return
        self.misses += 1
        trainer.stop_early = self._has_stalled()

    def state_dict(self) -> dict[str, Any]:
        """Best score and its step, misses, and the scores of the start weights and of the last evaluation."""
        names = ("tracked", "best", "best_step", "misses", "untrained", "latest")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where the run was saved; anew where it had no judge, or one with another measure."""
        if state.get("tracked", self.tracked) != self.tracked:
            progress.warn(f"the best checkpoint is now chosen by {self.tracked}, not {state['tracked']}: counting anew")
            return
        self.best, self.best_step = state.get("best"), state.get("best_step")
        self.misses = state.get("misses", 0)
        self.untrained, self.latest = state.get("untrained", {}), state.get("latest", {})

    def _has_stalled(self) -> bool:
        return 0 < self.patience <= self.misses

    def _look_for_best(self, step: int) -> None:
        """Say so where ``best.pt`` is not the checkpoint that the score belongs to, as after damage to the disk."""
        found = self.checkpoints.files.step_of(BEST)
        if found != step:
            self.folder.warn(
                f"expected {self.checkpoints.files.folder / BEST} to be of step {step}, the best so far, found "
                f"{'none that is whole' if found is None else f'step {found}'}; it is written at the next better score"
            )


def _shown(scores: Scores) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if value is not None)
