"""Signs of collapse while a run goes on: said once, with what to change; never a reason to stop."""

from collections.abc import Callable, Mapping

from dino.evaluate.verdict import ALL_PROTOTYPES, ONE_PROTOTYPE

LINES = 10  # lines of the log in a row that must show a sign

# DINO collapses in two ways, and centring and sharpening each prevent one (Caron et al. 2021, section 5.3).
SIGNS: dict[str, Callable[[float, float], bool]] = {
    "the teacher puts every sample into one prototype (entropy near 0): raise model.teacher_temp, or lower "
    "model.center_momentum or optim.lr": lambda entropy, loss: entropy < ONE_PROTOTYPE,
    "the teacher finds all prototypes alike (entropy near ln K): lower model.warmup_teacher_temp and "
    "model.teacher_temp": lambda entropy, loss: entropy > ALL_PROTOTYPES,
    "the loss stays at ln K, so the student learns nothing: raise optim.lr or training.batch_size_per_gpu, or lower "
    "model.out_dim": lambda entropy, loss: entropy <= ALL_PROTOTYPES < loss,
}


class CollapseWatch:
    """Tells when a sign of collapse has lasted.

    Args:
        settled_after: Steps of warm-up, when these signs are normal.
    """

    def __init__(self, settled_after: int) -> None:
        self.settled_after = settled_after
        self._lasting = dict.fromkeys(SIGNS, 0)

    def __call__(self, line: Mapping[str, float]) -> list[str]:
        """What to say after a line of the log; nothing as long as all is well.

        Args:
            line: ``step``, and ``teacher_entropy_relative`` and ``loss_relative`` as shares of ln K.
        """
        if line["step"] <= self.settled_after:
            return []
        for sign, shows in SIGNS.items():
            shown = shows(line["teacher_entropy_relative"], line["loss_relative"])
            self._lasting[sign] = self._lasting[sign] + 1 if shown else 0
        return [sign for sign, lines in self._lasting.items() if lines == LINES]
