"""Separating positional arguments from settings."""

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


def test_settings_and_positional_arguments_in_any_order():
    assert split(["a=1", "root", "model.arch=vit_tiny", "run"]) == (["root", "run"], ["a=1", "model.arch=vit_tiny"])


@pytest.mark.parametrize("argument", ["./a=1", "/data/x=1", "timm:vit_small", "slides/*.svs", "=1", "1=a", "a"])
def test_an_argument_without_a_key_is_positional(argument):
    assert split([argument]) == ([argument], [])


@pytest.mark.parametrize("argument", ["a=", "a=b=c", "_x.y_1=[1, 2]", "output_dir=/data/x=1", "a=" + "x" * 5000])
def test_an_argument_with_a_key_is_a_setting(argument):
    assert split([argument]) == ([], [argument])


def test_the_name_of_an_existing_file_is_never_a_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split(["stain=HE"]) == ([], ["stain=HE"])
    (tmp_path / "stain=HE").mkdir()
    assert split(["stain=HE"]) == (["stain=HE"], [])


def test_a_wrong_number_of_positional_arguments_is_an_error():
    assert expect(["a", "b"], ["ROOT", "RUN"]) == ["a", "b"]
    with pytest.raises(UsageError, match=r"expected ROOT RUN, found 1 argument \(a\)"):
        expect(["a"], ["ROOT", "RUN"])
    with pytest.raises(UsageError, match="expected ROOT RUN, found no arguments"):
        expect([], ["ROOT", "RUN"])
    with pytest.raises(UsageError, match=r"found 1 argument \('my slides'\)$"):
        expect(["my slides"], ["ROOT", "RUN"])
    with pytest.raises(
        UsageError, match=r"found 5 arguments \(a b seed = 1\); write settings without spaces around =$"
    ):
        expect(["a", "b", "seed", "=", "1"], ["ROOT", "RUN"])
    assert expect_many(["a", "b", "c"], "SLIDE", "ROOT") == (["a", "b"], "c")
    with pytest.raises(UsageError, match="at least one SLIDE"):
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
    ("args", "message"),
    [
        (["a", "--training.nepochs", "1"], "--training.nepochs; settings are passed as KEY=VALUE: training.nepochs=1"),
        (["--training.nepochs=1", "b"], "--training.nepochs; settings are passed as KEY=VALUE: training.nepochs=1"),
        (["-k", "[1, 2]"], "-k; settings are passed as KEY=VALUE: 'k=[1, 2]'"),
        (["--dry-run", "--config", "x"], "--dry-run; settings are passed as KEY=VALUE: dry_run=VALUE"),
        (["--seed"], "--seed; settings are passed as KEY=VALUE: seed=VALUE"),
    ],
)
def test_a_setting_written_as_an_option_is_an_error_with_the_correct_form(args, message):
    keys = {"training.nepochs", "k", "dry_run", "seed", "config"}
    with pytest.raises(UsageError, match=f"^{re.escape('unknown option ' + message)}$"):
        refuse_settings_as_options(args, keys, {"--config", "-c", "--help"})


@pytest.mark.parametrize("args", [["a", "seed=1"], ["--config", "x"], ["--other", "1"], ["--", "--seed"], ["-"], []])
def test_options_and_other_arguments_are_accepted(args):
    assert refuse_settings_as_options(args, {"seed", "config"}, {"--config"}) is None
