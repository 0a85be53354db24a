"""Judges that cannot be made as asked are refused, with the settings they take."""

import re

import pytest

from saefty.errors import ConfigError, UnknownNameError
from saefty.judges.base import judge_record, make_judge


def test_a_judge_is_made_with_its_settings():
    assert make_judge("regex", {"pattern": "no"}).score(["", ""], ["No.", "Sure"]).tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("regex", {}, "regex cannot be made with the settings {}: missing a required argument"),
        ("regex", {"patern": "a"}, "regex cannot be made with the settings {'patern': 'a'}"),
        ("regex", {"pattern": "("}, "'(' is not a regular expression"),
        ("regex", {}, "Its settings are pattern, ignore_case: intervention.judge_options.NAME="),
        ("regex", {"api_key": "abc", "x": 1}, "with the settings {'api_key': '***', 'x': 1}"),
        ("perplexity", {}, "Set intervention.fluency=perplexity"),
    ],
)
def test_settings_that_a_judge_does_not_take_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_judge(name, options)


def test_a_judge_of_fluency_is_told_where_its_settings_stand():
    with pytest.raises(ConfigError, match=r"intervention\.fluency_options\.NAME=VALUE"):
        make_judge("regex", {}, "intervention.fluency")


def test_a_misspelt_judge_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'refusal'"):
        make_judge("refusl", {})


def test_the_record_of_a_judge_changes_with_the_files_it_reads(tmp_path):
    words, folder = tmp_path / "words.txt", tmp_path / "guard"
    words.write_text("no\n")
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "weights").write_bytes(b"1")
    options = {"file": str(words), "model": str(folder), "words": ["no"]}
    first = judge_record("lexicon", options)
    assert first == judge_record("lexicon", {**options, "cache": str(tmp_path)})
    assert set(first["files"]) == {"file", "model"}
    words.write_text("yes\n")
    second = judge_record("lexicon", options)
    assert second["files"]["file"] != first["files"]["file"]
    assert second["files"]["model"] == first["files"]["model"]
    (folder / "inner" / "weights").rename(folder / "weights")
    assert judge_record("lexicon", options)["files"]["model"] != first["files"]["model"]


@pytest.mark.parametrize("value", ["", "a\0b", "x" * 5000, "no such file", 3, ["a"]])
def test_an_option_that_names_no_file_is_not_read(value):
    assert judge_record("regex", {"pattern": value}) == {"name": "regex", "files": {}}
