"""Separating positional words from settings."""

import re

import pytest

from dino.cli.grammar import (
    UsageError,
    expect,
    expect_many,
    named_or_positional,
    refuse_settings_as_options,
    split,
)


def test_words_in_any_order():
    assert split(["a=1", "root", "model.arch=vit_tiny", "run"]) == (["root", "run"], ["a=1", "model.arch=vit_tiny"])


@pytest.mark.parametrize("word", ["./a=1", "/data/x=1", "timm:vit_small", "slides/*.svs", "=1", "1=a", "a"])
def test_what_is_no_key_is_positional(word):
    assert split([word]) == ([word], [])


@pytest.mark.parametrize("word", ["a=", "a=b=c", "_x.y_1=[1, 2]", "output_dir=/data/x=1"])
def test_what_is_a_key_is_a_setting(word):
    assert split([word]) == ([], [word])


def test_a_word_that_exists_as_a_file_is_never_a_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split(["stain=HE"]) == ([], ["stain=HE"])
    (tmp_path / "stain=HE").mkdir()
    assert split(["stain=HE"]) == (["stain=HE"], [])


def test_the_number_of_positional_words_counts():
    assert expect(["a", "b"], ["ROOT", "RUN"]) == ["a", "b"]
    with pytest.raises(UsageError, match="expected ROOT RUN, found 1: a"):
        expect(["a"], ["ROOT", "RUN"])
    with pytest.raises(UsageError, match="expected ROOT RUN, found nothing"):
        expect([], ["ROOT", "RUN"])
    assert expect_many(["a", "b", "c"], "SLIDE", "ROOT") == (["a", "b"], "c")
    with pytest.raises(UsageError, match="one or more SLIDE"):
        expect_many(["a"], "SLIDE", "ROOT")


def test_positional_or_by_name_but_not_both():
    names = {"data_dir": "ROOT", "output_dir": "RUN"}
    by_name = {"data_dir": "a", "output_dir": "b"}
    assert named_or_positional(["a", "b", "seed=1"], names) == (by_name, ["seed=1"])
    assert named_or_positional(["output_dir=b", "seed=1", "data_dir=a"], names) == (by_name, ["seed=1"])
    assert named_or_positional(["data_dir=a"], names) == ({"data_dir": "a"}, [])
    with pytest.raises(UsageError, match="expected RUN once"):
        named_or_positional(["a", "b", "output_dir=c"], names)
    with pytest.raises(UsageError, match="expected ROOT RUN, found 3"):
        named_or_positional(["a", "b", "c"], names)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["a", "--training.nepochs", "1"], "--training.nepochs; settings are KEY=VALUE words: training.nepochs=1"),
        (["--training.nepochs=1", "b"], "--training.nepochs; settings are KEY=VALUE words: training.nepochs=1"),
        (["-k", "[1, 2]"], "-k; settings are KEY=VALUE words: 'k=[1, 2]'"),
        (["--dry-run", "--config", "x"], "--dry-run; settings are KEY=VALUE words: dry_run=VALUE"),
        (["--seed"], "--seed; settings are KEY=VALUE words: seed=VALUE"),
    ],
)
def test_a_setting_written_as_an_option_is_answered_with_its_right_form(args, word):
    keys = {"training.nepochs", "k", "dry_run", "seed", "config"}
    with pytest.raises(UsageError, match=f"^{re.escape('there is no option ' + word)}$"):
        refuse_settings_as_options(args, keys, {"--config", "-c", "--help"})


@pytest.mark.parametrize("args", [["a", "seed=1"], ["--config", "x"], ["--other", "1"], ["--", "--seed"], ["-"], []])
def test_options_and_other_words_are_left_to_the_parser(args):
    assert refuse_settings_as_options(args, {"seed", "config"}, {"--config"}) is None
