"""Columns, labels and ids: what a row becomes."""

import json
import logging

import pytest

from saefty.data.base import DATASETS, DataSection, load_examples
from saefty.errors import ConfigError, InputError, UnknownNameError
from saefty.records import Message


@pytest.fixture
def load(tmp_path):
    def read(rows, **columns):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_examples(DataSection(path=str(path), **columns))

    return read


def labels(load, values, **more):
    rows = [{"text": "a", "label": value} for value in values]
    return [example.label for example in load(rows, text="text", label="label", **more)]


def test_running_text_is_raw_and_a_prompt_is_not(load):
    rows = [{"text": "hello", "prompt": "hello"}]
    assert load(rows, text="text")[0].raw
    assert not load(rows, prompt="prompt")[0].raw


def test_the_text_column_is_guessed_messages_first(load):
    turns = [{"role": "user", "content": "hi"}]
    assert load([{"text": "t", "prompt": "p", "messages": turns}])[0].messages == (
        Message("user", "hi"),
    )
    assert load([{"text": "t", "prompt": "p"}])[0].prompt == "p"
    assert load([{"text": "t"}])[0].prompt == "t"


def test_a_prompt_and_its_response_are_one_example(load):
    (example,) = load([{"q": "why?", "a": "because"}], prompt="q", response="a")
    assert (example.prompt, example.response) == ("why?", "because")


def test_messages_may_be_a_list_or_json_in_a_text(load):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    wanted = (Message("user", "hi"), Message("assistant", "yes"))
    rows = [{"m": turns}, {"m": json.dumps(turns)}]
    assert [example.messages for example in load(rows, messages="m")] == [wanted, wanted]


@pytest.mark.parametrize("bad", ["hi", [{"role": "user"}], 7, [1]])
def test_messages_of_another_form_name_the_row(load, bad):
    with pytest.raises(InputError, match=r"row 0 .*needs a list of \{role, content\}"):
        load([{"m": bad}], messages="m")


def test_labels_are_understood_in_the_usual_spellings(load):
    assert labels(load, [True, 1, 1.0, "1", "yes", "Harmful", " TRUE ", "1.0"]) == [True] * 8
    assert labels(load, [False, 0, 0.0, "0", "no", "benign", "0.0"]) == [False] * 7


def test_a_missing_label_is_none_never_harmless(load):
    assert labels(load, [None, "", float("nan"), True]) == [None, None, None, True]


@pytest.mark.parametrize("word", ["maybe", 2, 0.5, "harmful?"])
def test_a_label_that_cannot_be_understood_is_refused(load, word):
    with pytest.raises(InputError, match="neither harmful nor harmless") as error:
        labels(load, [True, word])
    assert "row 1" in error.value.message
    assert f"labels: true, {word}" in error.value.message
    assert "data.harmful=" in error.value.then


@pytest.mark.parametrize("values", [["safe", "unsafe"], ["unsafe", "safe"]])
def test_the_harmless_label_never_stands_as_the_example_of_a_harmful_one(load, values):
    with pytest.raises(InputError, match="labels: ") as error:
        labels(load, values)
    assert "data.harmful='[unsafe]'" in error.value.then
    with pytest.raises(InputError, match="labels: fine, odd") as error:
        labels(load, ["fine", "odd"])
    assert "fine" not in error.value.then


def test_harmful_values_make_all_others_harmless_and_keep_missing_ones(load):
    found = labels(load, ["violence", "hate", "none", None], harmful=["violence", "hate"])
    assert found == [True, True, False, None]


@pytest.mark.parametrize(
    ("values", "harmful"),
    [([1, 0], [1]), ([1.0, 0.0], ["1"]), ([True, False], [True]), ([3, 0], 3), (["a", "b"], "a")],
)
def test_harmful_values_may_be_numbers_truth_values_or_one_word(load, values, harmful):
    assert labels(load, values, harmful=harmful) == [True, False]


def test_harmful_values_that_no_row_has_are_refused(load):
    with pytest.raises(InputError, match=r"its labels are 'violence' \(2\).*Did you mean"):
        labels(load, ["violence", "violence"], harmful=["violance"])


def test_a_harmful_value_that_is_absent_beside_one_that_occurs_is_a_warning(load, caplog):
    logging.getLogger("saefty").propagate = True  # a command in this process may have cut it off
    with caplog.at_level(logging.WARNING):
        assert labels(load, ["hate", "none"], harmful=["hate", "violence"]) == [True, False]
    assert "has no label violence" in caplog.text


def test_rows_are_numbered_where_no_id_column_is_named(load):
    assert [example.id for example in load([{"text": "a"}, {"text": "b"}])] == ["0", "1"]


def test_ids_that_repeat_are_listed(load):
    rows = [{"text": "a", "id": i % 12} for i in range(24)]
    with pytest.raises(InputError, match="12 ids for more than one row: 0, 1, 2"):
        load(rows, text="text", id="id")


def test_numbers_become_text_and_lists_do_not(load):
    assert load([{"text": 7}], text="text")[0].prompt == "7"
    with pytest.raises(InputError, match="holds a list, not text"):
        load([{"text": [7]}], text="text")


def test_a_missing_text_is_empty_never_the_word_nan(load):
    rows = [{"text": "a"}, {"text": None}, {"text": float("nan")}, {}]
    assert [example.prompt for example in load(rows, text="text")] == ["a", "", "", ""]


def test_a_limit_reads_the_first_rows(load):
    rows = [{"text": str(i)} for i in range(9)]
    assert [example.prompt for example in load(rows, text="text", limit=3)] == ["0", "1", "2"]


def test_a_misspelt_column_names_the_nearest(load):
    with pytest.raises(InputError, match=r"'labl' \(data.label\).*Did you mean 'label'"):
        load([{"text": "a", "label": 1}], text="text", label="labl")


def test_a_missing_path_or_dataset_is_named():
    with pytest.raises(ConfigError, match=r"data\.path: required"):
        load_examples(DataSection())
    with pytest.raises(UnknownNameError, match="Did you mean 'local'"):
        load_examples(DataSection(name="lokal"))


def test_every_dataset_is_a_function_with_a_docstring():
    for name in DATASETS:
        assert DATASETS[name].__doc__


def test_a_span_may_be_a_list_or_json_in_a_text_and_may_be_missing(load):
    rows = [{"text": "a", "at": [1, 4]}, {"text": "a", "at": "[2, 3]"}, {"text": "a", "at": None}]
    assert [one.span for one in load(rows, text="text", span="at")] == [(1, 4), (2, 3), None]


@pytest.mark.parametrize("bad", [[3, 3], [-1, 2], [1], [1.5, 3], "3-8", 7, {"start": 1, "end": 2}])
def test_a_span_of_another_form_names_the_row_and_what_is_wanted(load, bad):
    with pytest.raises(InputError, match=r"row 0 .*data.span needs \[start, end\)"):
        load([{"text": "a", "at": bad}], text="text", span="at")
