"""One verdict in words on a finished run: learning, flat, or collapsed."""

import math
from dataclasses import dataclass

# Two standard errors of a difference: by chance alone a run exceeds them about once in forty.
CLEAR_STANDARD_ERRORS = 2.0
# DINO collapses in two ways (Caron et al. 2021, section 5.3): every picture gets one prototype (entropy and loss go to
# 0) or all prototypes alike (both go to ln K). Healthy runs stay well inside; these bounds leave 1 % at either end.
ONE_PROTOTYPE = 0.01
ALL_PROTOTYPES = 0.99
# Features that point one way to within this, or fill fewer directions than this, can tell almost nothing apart. Far
# from normal: an untrained ViT-Ti on tissue has a mean cosine of 0.7 and fills 14 directions.
ALIKE_COSINE = 0.9999
FEW_DIRECTIONS = 1.5
# Without a score there is only the loss: below this share of ln K the student does predict its teacher.
MOVED_LOSS = 0.95


@dataclass(frozen=True)
class Score:
    """The teacher's score beside the floor.

    Attributes:
        name: What was measured, in words ("20-NN accuracy").
        teacher: The trained teacher's.
        untrained: That of the network before training.
        standard_error: Of the difference of the two.
    """

    name: str
    teacher: float
    untrained: float
    standard_error: float

    @property
    def standard_errors(self) -> float:
        """The difference in units of its standard error."""
        return (self.teacher - self.untrained) / max(self.standard_error, 1e-12)


@dataclass(frozen=True)
class Signs:
    """What is known of a run; None where it was not measured.

    Attributes:
        entropy: Mean entropy of the teacher's targets, as a share of ln K.
        loss: The loss as a share of ln K.
        effective_rank: How many directions the teacher's features fill.
        cosine: Mean cosine similarity of two of the teacher's features.
        embed_dim: Width D of the features.
        score: Score beside its floor.
    """

    entropy: float | None = None
    loss: float | None = None
    effective_rank: float | None = None
    cosine: float | None = None
    embed_dim: int | None = None
    score: Score | None = None


@dataclass(frozen=True)
class Verdict:
    """The judgement.

    Attributes:
        word: ``learning``, ``flat`` or ``collapsed``.
        text: Two or three sentences for a reader who knows the lab, not the loss, with the numbers in them.
    """

    word: str
    text: str


def difference_error(first: float, second: float, count: int) -> float:
    """Standard error of the difference of two accuracies over ``count`` queries.

    Both are taken as independent binomial shares. They are measured on the same queries, so this is on the safe side.

    Args:
        first: An accuracy in [0, 1].
        second: Another.
        count: How many queries each was measured on.
    """
    return math.sqrt((first * (1 - first) + second * (1 - second)) / max(count, 1))


def verdict(signs: Signs) -> Verdict:
    """Judge a run.

    1. A number that is not finite: collapsed.
    2. A score that beats the untrained floor by more than two standard errors: learning. It comes before the signs of
       collapse because features that tell tissue apart have not collapsed, whatever the loss looks like.
    3. Features all alike, or the targets of either collapse of DINO: collapsed.
    4. No score at all, but a loss that has clearly left ln K: learning, and the text says what that rests on.
    5. Anything else: flat.

    Args:
        signs: What was measured.

    Returns:
        The word and its reasons.
    """
    numbers = [signs.entropy, signs.loss, signs.effective_rank, signs.cosine]
    numbers += [signs.score.teacher, signs.score.untrained] if signs.score else []
    if not all(math.isfinite(n) for n in numbers if n is not None):
        return _spoken("collapsed", "A loss or feature is not a finite number.", signs)
    reason = _collapse(signs)
    score = signs.score
    if score and score.standard_errors > CLEAR_STANDARD_ERRORS:
        caution = f" Take care, though: {reason[0].lower()}{reason[1:]}" if reason else ""
        return _spoken("learning", f"The features beat those of the untrained network clearly.{caution}", signs)
    if reason:
        return _spoken("collapsed", reason, signs)
    if score:
        worse = score.standard_errors < -CLEAR_STANDARD_ERRORS
        so_far = "are worse than" if worse else "cannot be told from"
        return _spoken("flat", f"So far the features {so_far} those of the untrained network.", signs)
    if signs.loss is not None and signs.loss < MOVED_LOSS:
        text = "The loss has fallen; nothing was there to score the features with, so this rests on the loss alone."
        return _spoken("learning", text, signs)
    return _spoken("flat", "The loss has hardly moved, and nothing was there to score the features with.", signs)


def _collapse(signs: Signs) -> str:
    """Which sign of collapse there is, as a sentence; empty without any."""
    if signs.cosine is not None and signs.cosine > ALIKE_COSINE:
        return "The network gives every picture the same features."
    if signs.effective_rank is not None and signs.effective_rank < FEW_DIRECTIONS:
        return "The features fill hardly more than one direction."
    if signs.entropy is None or signs.loss is None:
        return ""
    if max(signs.entropy, signs.loss) < ONE_PROTOTYPE:
        return "The teacher puts every picture into one and the same prototype."
    if min(signs.entropy, signs.loss) > ALL_PROTOTYPES:
        return "The teacher finds all prototypes equally fitting for every picture."
    return ""


def _spoken(word: str, reason: str, signs: Signs) -> Verdict:
    facts = []
    if signs.score:
        s = signs.score
        facts.append(
            f"{s.name} {s.teacher:.3f}, untrained {s.untrained:.3f}: {s.teacher - s.untrained:+.3f}, "
            f"{s.standard_errors:+.1f} standard errors (clear is more than {CLEAR_STANDARD_ERRORS:g})"
        )
    if signs.loss is not None:
        facts.append(f"loss {signs.loss:.3f} of ln K")
    if signs.entropy is not None:
        facts.append(f"teacher entropy {signs.entropy:.3f} of ln K")
    if signs.effective_rank is not None:
        of = f" of {signs.embed_dim}" if signs.embed_dim else ""
        facts.append(f"features fill about {signs.effective_rank:.1f}{of} directions")
    if signs.cosine is not None:
        facts.append(f"mean cosine of two features {signs.cosine:.3f}")
    numbers = "; ".join(facts)
    return Verdict(word, f"{word.capitalize()}. {reason}" + (f" {numbers[0].upper()}{numbers[1:]}." if facts else ""))
