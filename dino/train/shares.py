"""Expected and realised shares of the groups that draws are balanced over, in the log and in ``status.json``."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from dino import distributed
from dino.data.groups import Groups
from dino.train.loop import Callback, StepReport, Trainer
from dino.train.run_folder import RunFolder

SHOWN = 20  # groups that are listed; of more, those that deviate most


class SharesLog(Callback):
    """Counts the samples of each group that a run was trained on, replacements of bad ones included.

    Args:
        groups: The groups.
        folder: The run folder.
        every_steps: Steps between records.
    """

    def __init__(self, groups: Groups, folder: RunFolder, every_steps: int) -> None:
        self.groups, self.folder, self.every_steps = groups, folder, every_steps
        self.counts = np.zeros(len(groups), np.int64)  # of all processes
        self._pending: Counter[int] = Counter()  # of this process, since the last sum over processes

    def start(self, trainer: Trainer) -> None:
        """Record the expected shares, and what was realised before the run was interrupted."""
        self.folder.note_status(sampling=summary(self.groups, self.counts))

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Count a step's samples, and record the shares when that is due."""
        for batch in report.batches:
            self._pending.update(self.groups.at(batch.indices).tolist())
        if report.step % self.every_steps and report.step != trainer.length.total:
            return
        self._sum()
        found = summary(self.groups, self.counts)
        self.folder.log({"step": report.step, "shares": {one["group"]: one["realised"] for one in found["shares"]}})
        self.folder.note_status(sampling=found)

    def state_dict(self) -> dict[str, Any]:
        """The counts; every process has to ask for them."""
        self._sum()
        return {"counts": torch.from_numpy(self.counts.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the counts of a checkpoint."""
        self.counts, self._pending = np.zeros(len(self.groups), np.int64), Counter()
        if state:
            self.counts += state["counts"].numpy()

    def _sum(self) -> None:
        for counts in distributed.gather(self._pending):
            self.counts[list(counts)] += np.array(list(counts.values()), np.int64)
        self._pending = Counter()


def summary(groups: Groups, counts: np.ndarray) -> dict[str, Any]:
    """Plain values for ``status.json``.

    Args:
        groups: The groups.
        counts: ``(G,)`` samples of each that were trained on.

    Returns:
        ``columns``, ``groups`` and ``tiles`` (numbers of them), ``draws`` so far, smallest and largest ``expected`` and
        ``realised`` share, and ``shares``: ``group``, ``tiles``, ``expected`` and ``realised`` of each group, or of the
        :data:`SHOWN` that deviate most.
    """
    draws = int(counts.sum())
    expected, realised = groups.shares, counts / max(1, draws)
    shown: Iterable[int] = range(len(groups))
    if len(groups) > SHOWN:
        shown = np.sort(np.argsort(-np.abs(realised - expected), kind="stable")[:SHOWN]).tolist()
    return {
        "columns": list(groups.columns),
        "groups": len(groups),
        "tiles": groups.samples,
        "draws": draws,
        "expected": [float(expected.min()), float(expected.max())],
        "realised": [float(realised.min()), float(realised.max())],
        "largest_deviation": float(np.abs(realised - expected).max()),
        "shares": [_row(groups, number, float(realised[number])) for number in shown],
    }


def _row(groups: Groups, number: int, realised: float) -> Mapping[str, Any]:
    return {
        "group": groups.label(number),
        "tiles": int(groups.counts[number]),
        "expected": round(float(groups.shares[number]), 6),
        "realised": round(realised, 6),
    }
