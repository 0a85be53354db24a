import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from saefty import fsio
from saefty.metrics.intervals import Interval
from saefty.report import (
    Column,
    Section,
    Table,
    flatten,
    markdown_report,
    plain,
    write_report,
)

TABLE = Table(
    (Column("latent", "latent"), Column("auroc", "AUROC"), Column("note", "note")),
    (
        {"latent": 12, "auroc": np.float64(0.98765), "note": "fires | often"},
        {"latent": 70123, "auroc": float("nan"), "note": None},
    ),
)


def parsed(table):
    return list(csv.reader(io.StringIO(table.csv(), newline="")))


def test_a_table_in_markdown_is_rounded_and_aligned():
    assert TABLE.markdown().splitlines() == [
        "| latent | AUROC | note |",
        "| ---: | ---: | --- |",
        r"| 12 | 0.988 | fires \| often |",
        "| 70,123 | – | – |",
    ]


def test_a_table_in_csv_keeps_full_precision():
    assert parsed(TABLE) == [
        ["latent", "auroc", "note"],
        ["12", "0.98765", "fires | often"],
        ["70123", "", ""],
    ]


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-cmd", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1", "＋1", '=HYPERLINK("x")'],
)
def test_text_that_a_spreadsheet_would_run_is_defused(text):
    assert parsed(Table((Column("a", "a"),), ({"a": text},)))[1] == [f"'{text}"]


def test_ordinary_text_stays_as_it_is():
    text = 'a=b, "c"\nd'
    assert parsed(Table((Column("a", "a"),), ({"a": text},)))[1] == [text]


@pytest.mark.parametrize("number", [-1, -0.5, np.float32(-0.5), np.int64(-3), 1e-30])
def test_numbers_stay_numbers(number):
    cell = parsed(Table((Column("a", "a"),), ({"a": number},)))[1][0]
    assert float(cell) == float(number)


def test_truth_values_are_words():
    table = Table((Column("a", "a"),), ({"a": True}, {"a": np.bool_(False)}))
    assert parsed(table)[1:] == [["true"], ["false"]]
    assert table.markdown().splitlines()[2:] == ["| yes |", "| no |"]


def test_text_from_data_cannot_become_markup():
    table = Table((Column("a", "a"),), ({"a": "<img src=x> [a](b)\n**c** `d`"},))
    assert table.markdown().splitlines()[2] == (r"| \<img src=x\> \[a\](b) \*\*c\*\* \`d\` |")


@dataclass
class Record:
    latent: int
    auroc: Interval


RECORD = Record(3, Interval(0.9, 0.8, float("nan"), "bootstrap", 20))


def test_records_become_columns_with_joined_names():
    assert flatten(RECORD)["auroc_low"] == 0.8
    assert parsed(Table.of([RECORD]))[0][:4] == [
        "latent",
        "auroc_estimate",
        "auroc_low",
        "auroc_high",
    ]


def test_what_is_no_number_becomes_null():
    value = {"a": float("nan"), "b": np.array([1.0, np.inf]), "c": RECORD}
    text = json.dumps(plain(value), allow_nan=False)
    assert json.loads(text)["b"] == [1.0, None]
    assert json.loads(text)["c"]["auroc"]["high"] is None


def test_json_keeps_the_kinds_of_values():
    value = {"n": np.int64(3), "ok": np.bool_(True), "p": Path("a/b"), "s": {2, 1}, 5: (1, 2)}
    assert plain(value) == {"n": 3, "ok": True, "p": "a/b", "s": [1, 2], "5": [1, 2]}


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="a object cannot be written"):
        plain({"a": object()})


def test_a_report_has_its_parts_in_order():
    text = markdown_report(
        "Gate",
        "Nothing was found.",
        [Section("Latents", "The best.", TABLE, "plots/a.png", "AUROC of the best latents.")],
    )
    assert text.split("\n\n")[:4] == ["# Gate", "Nothing was found.", "## Latents", "The best."]
    assert "![AUROC of the best latents.](plots/a.png)" in text


def test_a_report_is_written_whole(tmp_path):
    files = write_report(
        tmp_path,
        title="東京",
        lead="Ready.",
        sections=[],
        figures={"fvu": np.float32(0.5)},
        tables={"layer_2/latents": TABLE},
    )
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "summary.md",
        "summary.json",
        "layer_2/latents.csv",
    ]
    assert fsio.read_json(tmp_path / "summary.json") == {"fvu": 0.5}
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").startswith("# 東京\n")
