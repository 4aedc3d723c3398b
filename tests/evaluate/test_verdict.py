import json
import math

import pytest
from scipy import stats

from dino.evaluate.verdict import (
    INITIAL,
    RANDOM,
    Score,
    Signs,
    Verdict,
    baselines_of,
    difference_error,
    paired_error,
    verdict,
)

HEALTHY = {"entropy": 0.6, "loss": 0.8, "effective_rank": 20.0, "cosine": 0.4, "embed_dim": 192}


def score(teacher, random=0.45, queries=1250):  # with a standard error of about 0.02
    return Score("20-NN accuracy", teacher, {RANDOM: random}, queries)


def continued(teacher, initial=0.6, random=0.45, queries=1250):
    return Score("20-NN accuracy", teacher, {INITIAL: initial, RANDOM: random}, queries)


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
        (Signs(**HEALTHY, score=continued(0.70)), "learning"),
        (Signs(**HEALTHY, score=continued(0.61)), "flat"),  # far better than random weights, but no better than before
        (Signs(**HEALTHY, score=continued(0.50)), "declined"),
        (Signs(**{**HEALTHY, "cosine": 0.99999}, score=continued(0.50)), "collapsed"),
    ],
)
def test_rules(signs, word):
    assert verdict(signs).word == word


def test_the_text_contains_the_numbers():
    text = verdict(Signs(**HEALTHY, score=score(0.55))).text
    for part in (
        "Learning.",
        "20-NN accuracy 0.550",
        "1,250 queries",
        "random initialization 0.450: +0.100, interval +0.060 to +0.140",
        "20.0 of 192",
        "0.800",
    ):
        assert part in text


def test_the_end_is_compared_with_the_start_and_the_best_checkpoint_is_named():
    text = verdict(Signs(**HEALTHY, score=continued(0.5), best_step=0)).text
    low, high = (-0.1 + sign * 2 * math.sqrt((0.5 * 0.5 + 0.6 * 0.4) / 1250) for sign in (-1, 1))
    for part in (
        "significantly worse than those of the initial weights",
        "best checkpoint, which is exported, is the initial weights",
        f"initial weights 0.600: -0.100, interval {low:+.3f} to {high:+.3f}",
        "random initialization 0.450: +0.050",
    ):
        assert part in text
    assert "is of step 1,200" in verdict(Signs(**HEALTHY, score=continued(0.7), best_step=1200)).reason
    assert "random" in verdict(Signs(**HEALTHY, score=score(0.55), best_step=1200)).reason


def test_a_comparison_is_plain_data():
    found = json.loads(json.dumps(continued(0.7).to_dict()))
    assert found["teacher"] == 0.7 and found["queries"] == 1250
    assert found[INITIAL]["difference"] == pytest.approx(0.1)
    assert found[INITIAL]["interval"][0] < 0.1 < found[INITIAL]["interval"][1]


def test_old_names_of_baselines_are_read():
    assert baselines_of({"untrained": 1, "teacher": 2}, pretrained=False) == {RANDOM: 1}
    assert baselines_of({"untrained": 1}, pretrained=True) == {INITIAL: 1}
    assert list(baselines_of({RANDOM: 1, INITIAL: 2}, pretrained=True)) == [INITIAL, RANDOM]


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


def test_paired_error_is_that_of_a_paired_t_test():
    first, second = [1.0, 0.0, 1.0, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5, 1.0, 0.0]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    expected = stats.ttest_rel(first, second)
    assert sum(differences) / 6 / paired_error(differences) == pytest.approx(expected.statistic)
    assert paired_error([0.5]) == math.inf


def test_measured_errors_replace_those_of_independent_accuracies():
    found = Score("self-retrieval accuracy", 0.75, {RANDOM: 0.7}, 258, samples=43, errors={RANDOM: 0.02})
    assert found.from_start.is_higher and not score(0.75, 0.7, queries=258).from_start.is_higher
    assert found.from_start.interval == pytest.approx((0.01, 0.09))
    assert "(258 queries of 43 samples, " in verdict(Signs(**HEALTHY, score=found)).text
    assert found.to_dict()["samples"] == 43
