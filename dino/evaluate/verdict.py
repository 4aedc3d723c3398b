"""The verdict on a finished run: learning, flat, declined or collapsed, with the numbers it rests on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# By chance alone, a difference exceeds two of its standard errors in about one run of forty.
SIGNIFICANT_STANDARD_ERRORS = 2.0
# DINO collapses in two ways (Caron et al. 2021, section 5.3): every image is assigned to one prototype (entropy and
# loss approach 0), or to all prototypes equally (both approach ln K). These bounds leave 1 % at either end.
ONE_PROTOTYPE = 0.01
ALL_PROTOTYPES = 0.99
# Features with a higher mean cosine, or a lower effective rank, distinguish almost nothing. An untrained ViT-Ti on
# tissue has a mean cosine of 0.7 and an effective rank of 14.
COLLAPSED_COSINE = 0.9999
COLLAPSED_RANK = 1.5
# Without a score only the loss is known: below this fraction of ln K the student does predict the teacher.
REDUCED_LOSS = 0.95


INITIAL = "initial_weights"  # what a run with model.init started from
RANDOM = "random_initialization"  # what every other run started from
FROZEN = "frozen_teacher"  # what a run with a frozen teacher distils
UNTRAINED = "untrained"  # in files of versions up to 0.1.0: either of them
STUDENT, TEACHER = "student", "teacher"


def in_words(name: str) -> str:
    """The name of a network or a baseline as it is shown."""
    return name.replace("_", " ")


def baselines_of(scores: Mapping[str, Any], pretrained: bool) -> dict[str, Any]:
    """The baselines among named scores, of any version of this package; first what the run started from.

    A frozen teacher is one of them.

    Args:
        scores: Scores, or whatever else, by name; other names are left out.
        pretrained: Whether the run started from ``model.init``.
    """
    start = INITIAL if pretrained else RANDOM
    named = {start if name == UNTRAINED else name: found for name, found in scores.items()}
    return {name: named[name] for name in (INITIAL, RANDOM, FROZEN) if name in named}


@dataclass(frozen=True)
class Difference:
    """What the teacher's accuracy exceeds that of a baseline by.

    Attributes:
        baseline: :data:`INITIAL`, :data:`RANDOM` or :data:`FROZEN`.
        value: The baseline's accuracy.
        difference: The teacher's less the baseline's.
        standard_error: Of the difference.
    """

    baseline: str
    value: float
    difference: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """Two standard errors on either side: it contains the true difference in about 95 of 100 cases."""
        reach = SIGNIFICANT_STANDARD_ERRORS * self.standard_error
        return self.difference - reach, self.difference + reach

    @property
    def is_higher(self) -> bool:
        """Whether the teacher is significantly better than the baseline: the interval is above 0."""
        return self.difference > 0 and self.interval[0] > 0

    @property
    def is_lower(self) -> bool:
        """Whether the teacher is significantly worse than the baseline: the interval is below 0."""
        return self.difference < 0 and self.interval[1] < 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``status.json``."""
        return {"value": self.value, "difference": self.difference, "interval": list(self.interval)}


@dataclass(frozen=True)
class Score:
    """An accuracy of the teacher and of its baselines.

    Attributes:
        name: What was measured, such as "20-NN accuracy".
        teacher: The trained teacher's.
        baselines: That of each baseline by name (:data:`INITIAL`, :data:`RANDOM`, :data:`FROZEN`), first what the run
            started from.
        queries: Number of queries that each is a mean over.
        samples: Number of samples that the queries are of, where there are fewer; None where there are as many.
        errors: Standard error of the difference to each baseline, where it was measured query by query; else both
            accuracies are treated as independent.
    """

    name: str
    teacher: float
    baselines: Mapping[str, float]
    queries: int
    samples: int | None = None
    errors: Mapping[str, float] | None = None

    def differences(self) -> list[Difference]:
        """The difference to each baseline."""

        def error(name: str, value: float) -> float:
            return self.errors[name] if self.errors else difference_error(self.teacher, value, self.queries)

        return [
            Difference(name, value, self.teacher - value, error(name, value)) for name, value in self.baselines.items()
        ]

    @property
    def from_start(self) -> Difference:
        """The difference to what the run started from."""
        return self.differences()[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``status.json``."""
        differences = {found.baseline: found.to_dict() for found in self.differences()}
        samples = {} if self.samples is None else {"samples": self.samples}
        return {"score": self.name, TEACHER: self.teacher, "queries": self.queries, **samples, **differences}


@dataclass(frozen=True)
class Signs:
    """The measurements a verdict is based on; None where something was not measured.

    Attributes:
        entropy: Mean entropy of the teacher's targets, as a fraction of ln K.
        loss: The loss as a fraction of ln K.
        effective_rank: Effective rank of the teacher's features.
        cosine: Mean cosine similarity between two of the teacher's features.
        embed_dim: Dimension D of the features.
        score: Score of the teacher and of the baselines.
        best_step: Step of ``best.pt``, 0 for the weights that the run started from; None without one.
    """

    entropy: float | None = None
    loss: float | None = None
    effective_rank: float | None = None
    cosine: float | None = None
    embed_dim: int | None = None
    score: Score | None = None
    best_step: int | None = None

    def is_finite(self) -> bool:
        """Whether every measurement is a finite number."""
        numbers = [self.entropy, self.loss, self.effective_rank, self.cosine]
        numbers += [self.score.teacher, *self.score.baselines.values()] if self.score else []
        return all(math.isfinite(number) for number in numbers if number is not None)

    def facts(self) -> list[str]:
        """The measurements in words, one string each."""
        found = []
        if self.score:
            of = f" of {self.score.samples:,} samples" if self.score.samples else ""
            found.append(
                f"{self.score.name} {self.score.teacher:.3f} ({self.score.queries:,} queries{of}, intervals of two "
                "standard errors)"
            )
            for one in self.score.differences():
                low, high = one.interval
                found.append(
                    f"{in_words(one.baseline)} {one.value:.3f}: {one.difference:+.3f}, "
                    f"interval {low:+.3f} to {high:+.3f}"
                )
        if self.loss is not None:
            found.append(f"loss {self.loss:.3f} of ln K")
        if self.entropy is not None:
            found.append(f"teacher entropy {self.entropy:.3f} of ln K")
        if self.effective_rank is not None:
            of = f" of {self.embed_dim}" if self.embed_dim else ""
            found.append(f"effective rank of the features {self.effective_rank:.1f}{of}")
        if self.cosine is not None:
            found.append(f"mean cosine between features {self.cosine:.3f}")
        return found


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run, as data; :attr:`text` makes a paragraph of it.

    Attributes:
        word: ``learning``, ``flat``, ``declined`` (from ``model.init``) or ``collapsed``.
        reason: One or two sentences.
        facts: The measurements, one string each.
    """

    word: str
    reason: str
    facts: Sequence[str] = ()

    @property
    def text(self) -> str:
        """Word, reason and measurements as one paragraph."""
        parts = [f"{self.word.capitalize()}.", self.reason, self.numbers]
        return " ".join(part for part in parts if part)

    @property
    def numbers(self) -> str:
        """The measurements as one sentence; empty without any."""
        joined = "; ".join(self.facts)
        return f"{joined[0].upper()}{joined[1:]}." if joined else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``status.json``."""
        return {**asdict(self), "facts": list(self.facts), "text": self.text}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Verdict":
        """The verdict that :meth:`to_dict` wrote, or that of version 0.1.0, which recorded only word and text."""
        word = str(values["word"])
        if "reason" in values:
            return cls(word, str(values["reason"]), tuple(str(fact) for fact in values.get("facts", ())))
        return cls(word, str(values["text"]).removeprefix(f"{word.capitalize()}. "))


def difference_error(first: float, second: float, count: int) -> float:
    """Standard error of the difference of two accuracies over ``count`` queries.

    Both are treated as independent binomial proportions. Both use the same queries, so this is conservative.

    Args:
        first: An accuracy in [0, 1].
        second: Another.
        count: Number of queries of each.
    """
    return math.sqrt((first * (1 - first) + second * (1 - second)) / max(count, 1))


def paired_error(differences: Sequence[float]) -> float:
    """Standard error of the mean of differences between paired observations, infinite for a single one.

    It takes into account that a hard query is hard for both networks, which :func:`difference_error` does not.

    Args:
        differences: Of each sample, between its results by two networks.
    """
    count = len(differences)
    if count < 2:
        return math.inf
    mean = sum(differences) / count  # statistics.stdev would fail if one is not finite
    return math.sqrt(sum((one - mean) ** 2 for one in differences) / (count - 1) / count)


def verdict(signs: Signs) -> Verdict:
    """The verdict that follows from the measurements.

    1. A number that is not finite: collapsed.
    2. A score that exceeds that of the weights which the run started from by more than two standard errors: learning.
       It takes precedence over signs of collapse, because features that distinguish tissue have not collapsed, whatever
       the loss.
    3. Features that are all alike, or targets of either collapse of DINO: collapsed.
    4. A score that is lower than that of ``model.init`` by more than two standard errors: declined.
    5. No score, but a loss well below ln K: learning, and the reason names what it is based on.
    6. Otherwise: flat.

    Args:
        signs: What was measured.
    """
    word, reason = _decide(signs)
    return Verdict(word, reason, tuple(signs.facts()))


def _decide(signs: Signs) -> tuple[str, str]:
    if not signs.is_finite():
        return "collapsed", "A loss or feature is not a finite number."
    collapse, score = _collapse(signs), signs.score
    if score and score.from_start.is_higher:
        warning = f" However: {collapse[0].lower()}{collapse[1:]}" if collapse else ""
        return "learning", f"{_compared_to_start(signs, score)}{warning}"
    pretrained = score is not None and INITIAL in score.baselines
    if collapse:
        return "collapsed", f"{collapse} {_compared_to_start(signs, score)}" if score and pretrained else collapse
    if score:
        declined = pretrained and score.from_start.is_lower
        return "declined" if declined else "flat", _compared_to_start(signs, score)
    if signs.loss is not None and signs.loss < REDUCED_LOSS:
        return "learning", "The loss has decreased. No score of the features is available, only the loss."
    return "flat", "The loss has hardly decreased, and no score of the features is available."


def _compared_to_start(signs: Signs, score: Score) -> str:
    """How the end of a run compares with its start, and which weights are kept as the best."""
    start = score.from_start
    relation = "indistinguishable from"
    if start.is_higher or start.is_lower:
        relation = f"significantly {'better' if start.is_higher else 'worse'} than"
    if start.baseline != INITIAL:
        return f"The features are {relation} those of a random initialization."
    sentence = f"The features are {relation} those of the initial weights."
    if signs.best_step is None:
        return sentence
    best = f"of step {signs.best_step:,}" if signs.best_step else "the initial weights: no later ones were better"
    return f"{sentence} The best checkpoint, which is exported, is {best}."


def _collapse(signs: Signs) -> str:
    """The sign of collapse as a sentence; empty without any."""
    if signs.cosine is not None and signs.cosine > COLLAPSED_COSINE:
        return "The network maps all images to the same features."
    if signs.effective_rank is not None and signs.effective_rank < COLLAPSED_RANK:
        return "The features vary in hardly more than one direction."
    if signs.entropy is None or signs.loss is None:
        return ""
    if max(signs.entropy, signs.loss) < ONE_PROTOTYPE:
        return "The teacher assigns all images to the same prototype."
    if min(signs.entropy, signs.loss) > ALL_PROTOTYPES:
        return "The teacher assigns all prototypes the same probability for every image."
    return ""
