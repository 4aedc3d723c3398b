import json
import math

import pytest

from dino.evaluate.verdict import Score, Signs, Verdict, difference_error, verdict

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


def test_the_text_contains_the_numbers():
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


def test_a_significant_score_with_a_sign_of_collapse_carries_a_warning():
    assert "However" in verdict(Signs(**{**HEALTHY, "effective_rank": 1.1}, score=score(0.55))).reason


def test_a_verdict_is_written_and_read_as_data():
    found = verdict(Signs(**HEALTHY, score=score(0.55)))
    written = json.loads(json.dumps(found.to_dict()))
    assert Verdict.from_dict(written) == found
    assert written["text"] == found.text == f"Learning. {found.reason} {found.numbers}"


def test_a_verdict_of_version_0_1_0_is_read():
    text = "Flat. So far so good. 20-NN accuracy 0.5, untrained 0.5."
    found = Verdict.from_dict({"word": "flat", "text": text})
    assert (found.word, found.text) == ("flat", text)


def test_error_of_a_difference():
    assert difference_error(0.5, 0.5, 750) == pytest.approx(math.sqrt(2 * 0.25 / 750))
    assert difference_error(1.0, 1.0, 10) == 0
