from dino.evaluate.scores import leakage_marks, score_table

SCORES = {"knn_20_accuracy": 0.5, "knn_20_auc": None}
ERRORS = {"knn_20_accuracy": 0.01}


def test_a_column_per_network_and_a_row_per_metric():
    names = ("model", "initial_weights", "random_initialization", "pixels_8x8")
    rows, header = score_table({**dict.fromkeys(names, SCORES), "standard_errors": dict.fromkeys(names, ERRORS)})
    assert header == ["", "model", "initial weights", "random initialization", "pixels 8x8"]
    assert [row[0] for row in rows] == ["knn_20_accuracy", "20-NN accuracy, standard error", "knn_20_auc"]
    assert rows[2][1:] == ["undefined"] * 4


def test_scores_of_version_0_1_0_are_read():
    result = {"model": SCORES, "untrained": SCORES, "pixels_8x8": SCORES, "standard_error": ERRORS, "about": {}}
    rows, header = score_table(result)
    assert header[2] == "random initialization"  # a random network, whatever the run started from
    assert not leakage_marks(result) and len(rows) == 2


def test_leakage_of_any_kind_is_marked():
    about = {
        "queries": 40,
        "selection": {"seen_rows": 4, "allowed": True},
        "leakage": {"seen_slides": ["a", "b"], "seen_patients": ["p"], "allowed": True},
    }
    rows, _ = score_table({"model": SCORES, "about": about})
    assert [row[:2] for row in rows[2:]] == [
        ["optimistic: test rows that chose the checkpoint", "4 of 40"],
        ["optimistic: test slides that were pretrained on", "2"],
        ["optimistic: test patients that were pretrained on", "1"],
    ]
