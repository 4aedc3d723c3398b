"""The runner: what it records, how it counts, and what it does where something is missing or differs."""

import json

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import extraction, measure, results
from benchmarks.measure import Duel, Row, Setting

CPU = torch.device("cpu")


def test_ratio_is_the_median_over_rounds():
    row = Duel([1.0, 2.0, 1.0], [3.0, 4.0, 5.0]).row("x", 10, "img/s", "theirs", target=2.5)
    assert (row.ours, row.theirs, row.ratio, row.spread, row.rounds) == (10.0, 2.5, 3.0, (2.0, 5.0), 3)
    assert row.met
    missed = Row("x", ours=1.0, target=2.0).to_dict()
    assert missed == {"name": "x", "ours": 1.0, "target": 2.0, "met": False}


def test_rounds_take_turns_and_the_first_does_not_count():
    calls = []
    times = measure.in_turn([lambda: calls.append("a"), lambda: calls.append("b")], range(2), CPU)
    assert calls == ["a", "b"] * 3
    assert [len(seconds) for seconds in times] == [2, 2]


def test_peak_counts_what_is_alive_at_once():
    kept = torch.empty(1000)

    def work():
        first = torch.empty(1_000_000)
        del first
        second = torch.empty(2_000_000)
        return second + kept[0]

    assert measure.peak_bytes(work, CPU) == pytest.approx(16e6, rel=0.01)


def test_flops_of_a_matrix_product():
    left, right = torch.zeros(3, 5), torch.zeros(5, 7)
    assert measure.flops(lambda: left @ right) == 2 * 3 * 5 * 7


def test_a_result_is_one_line_with_its_limit(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    row = Row("step", "img/s", 5.0, details={"gflop_per_item": 10.0})
    results.record(row, "step", {"matmul_bf16_gflops": 200.0}, {"date": "2026-01-01"}, path)
    (line,) = path.read_text().splitlines()
    found = json.loads(line)
    assert (found["limit"], found["ours"], found["date"]) == (20.0, 5.0, "2026-01-01")


def test_results_become_a_table_that_keeps_the_last_measurement(tmp_path):
    path = tmp_path / "results.jsonl"
    for ours in (1.0, 2.0):
        row = Duel([1 / ours] * 2, [1.0, 1.0]).row("loss", 1, "img/s", "pairs", target=1.5)
        results.record(row, "loss", {}, {"date": "2026-01-01"}, path)
    *_, line = results.markdown(path).splitlines()
    assert line == "| loss | 2 img/s | pairs | 1 | 2.00 (2.00 to 2.00) | 1.5 |  |  |"


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        runner.parse(["speed"])
    assert "expected names from step" in capsys.readouterr().err


def test_quick_run_shows_a_table_and_records_nothing(tmp_path, capsys):
    assert runner.main(["optimizer", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert "optimizer tail" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_contestants_that_differ_fail_the_run(tmp_path, monkeypatch):
    def disagree(setting: Setting):
        measure.expect_close("features", 1.0, 0.1)

    monkeypatch.setattr(extraction, "run", disagree)
    assert runner.main(["extraction", "--quick", "--device", "cpu"]) == 1


def test_reading_from_a_slide_is_skipped_where_its_libraries_are_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(extraction.importlib.util, "find_spec", lambda name: None)
    rows = list(extraction.run(Setting(CPU, tmp_path, quick=True)))
    assert rows[-1].skipped == "hs2p and openslide are not installed here"
    assert [row.unit for row in rows[:-1]] == ["tiles/s"] * 3
