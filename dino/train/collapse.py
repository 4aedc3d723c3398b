"""Signs of collapse while a run goes on: said once, with what to change; never a reason to stop."""

import math
from collections.abc import Callable, Mapping

from dino.evaluate.verdict import ALL_PROTOTYPES, COLLAPSED_RANK, ONE_PROTOTYPE

LINES = 10  # lines of the log in a row that must show a sign
FEW_SAMPLES = 16  # fewer than these can fill few directions by chance

Line = Mapping[str, float]


def _entropy(line: Line) -> float:
    return line["teacher_entropy_relative"]


# DINO collapses in two ways, and centring and sharpening each prevent one (Caron et al. 2021, section 5.3). Features
# can also shrink to few directions while prototypes are still told apart (Jing et al. 2022, arXiv 2110.09348).
SIGNS: dict[str, Callable[[Line], bool]] = {
    "the teacher puts every sample into one prototype (entropy near 0): raise model.teacher_temp, or lower "
    "model.center_momentum or optim.lr": lambda line: _entropy(line) < ONE_PROTOTYPE,
    "the teacher finds all prototypes alike (entropy near ln K): lower model.warmup_teacher_temp and "
    "model.teacher_temp": lambda line: _entropy(line) > ALL_PROTOTYPES,
    "the loss stays at ln K, so the student learns nothing: raise optim.lr or training.batch_size_per_gpu, or lower "
    "model.out_dim": lambda line: _entropy(line) <= ALL_PROTOTYPES < line["loss_relative"],
    "the teacher's features fill hardly more than one direction (feature_rank near 1), so they tell no samples apart: "
    "lower optim.lr, raise training.warmup_epochs or model.momentum_teacher, or train on samples that differ "
    "more": lambda line: line.get("feature_rank", math.inf) < COLLAPSED_RANK,
}


class CollapseWatch:
    """Tells when a sign of collapse has lasted.

    Args:
        settled_after: Steps of warm-up, when these signs are normal.
        samples: Samples of a step; of few, the features' directions say nothing.
    """

    def __init__(self, settled_after: int, samples: int = FEW_SAMPLES) -> None:
        self.settled_after, self.samples = settled_after, samples
        self._lasting = dict.fromkeys(SIGNS, 0)

    def __call__(self, line: Line) -> list[str]:
        """What to say after a line of the log; nothing as long as all is well.

        Args:
            line: ``step``, ``teacher_entropy_relative`` and ``loss_relative`` as shares of ln K, and ``feature_rank``.
        """
        if self.samples < FEW_SAMPLES:
            line = {**line, "feature_rank": math.inf}
        if line["step"] <= self.settled_after:
            return []
        for sign, shows in SIGNS.items():
            self._lasting[sign] = self._lasting[sign] + 1 if shows(line) else 0
        return [sign for sign, lines in self._lasting.items() if lines == LINES]
