import math

import pytest

from dino.evaluate.verdict import Score, Signs, difference_error, verdict

HEALTHY = {"entropy": 0.6, "loss": 0.8, "effective_rank": 20.0, "cosine": 0.4, "embed_dim": 192}


def score(teacher, untrained=0.45, error=0.02):
    return Score("20-NN accuracy", teacher, untrained, error)


@pytest.mark.parametrize(
    ("signs", "word"),
    [
        (Signs(**HEALTHY, score=score(0.55)), "learning"),
        (Signs(**HEALTHY, score=score(0.48)), "flat"),
        (Signs(**HEALTHY, score=score(0.30)), "flat"),
        (Signs(**HEALTHY), "learning"),
        (Signs(**{**HEALTHY, "loss": 0.99}), "flat"),
        (Signs(), "flat"),
        (Signs(**{**HEALTHY, "entropy": 0.999, "loss": 0.999}, score=score(0.45)), "collapsed"),
        (Signs(**{**HEALTHY, "entropy": 0.001, "loss": 0.0001}), "collapsed"),
        (Signs(**{**HEALTHY, "cosine": 0.99999}, score=score(0.30)), "collapsed"),
        (Signs(**{**HEALTHY, "effective_rank": 1.1}), "collapsed"),
        (Signs(**{**HEALTHY, "effective_rank": 1.1}, score=score(0.55)), "learning"),
        (Signs(**{**HEALTHY, "loss": math.nan}, score=score(0.55)), "collapsed"),
    ],
)
def test_rules(signs, word):
    assert verdict(signs).word == word


def test_the_text_holds_the_numbers():
    text = verdict(Signs(**HEALTHY, score=score(0.55))).text
    for part in (
        "Learning.",
        "20-NN accuracy 0.550",
        "untrained 0.450",
        "+5.0 standard errors",
        "20.0 of 192",
        "0.800",
    ):
        assert part in text


def test_a_good_score_beside_a_sign_of_collapse_is_said():
    assert "Take care" in verdict(Signs(**{**HEALTHY, "effective_rank": 1.1}, score=score(0.55))).text


def test_error_of_a_difference():
    assert difference_error(0.5, 0.5, 750) == pytest.approx(math.sqrt(2 * 0.25 / 750))
    assert difference_error(1.0, 1.0, 10) == 0
