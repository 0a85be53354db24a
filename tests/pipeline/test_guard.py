"""`saefty probe --save` and `saefty guard`: from a store of features to scores of a file."""

import csv
import gzip
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import guard_cases
import tiny_models
from guard_cases import HARMFUL, TEXTS, make_guard
from pipeline.conftest import N_EXAMPLES
from saefty import cli, fsio
from saefty.errors import ConfigError, InputError
from saefty.guards.files import save_guard
from saefty.guards.job import ScoreRequest, score_file
from saefty.guards.scoring import Guard, load_guard
from saefty.metrics.intervals import Interval

PROBE = (
    "probe.boots=100", "probe.permutations=100", "probe.k=[1]", "probe.poolings=[mean]",
    "probe.leave_one_source_out=false", "probe.one_vs_rest=false",
)  # fmt: skip


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of labelled texts, one of them too long, one empty."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [
        {"name": f"n{i}", "question": text, "kind": "bad" if harmful else "good"}
        for i, (text, harmful) in enumerate(zip(TEXTS, HARMFUL, strict=True))
    ]
    rows.append({"name": "long", "question": TEXTS[0] * 40, "kind": "bad"})
    rows.append({"name": "empty", "question": "", "kind": "good"})
    path = folder / "prompts.jsonl"
    path.write_text("".join(map(fsio.dump_json_line, rows)))
    return path


COLUMNS = {"text": "question", "id": "name", "label": "kind", "harmful": "bad"}
FLAGS = [word for role, column in COLUMNS.items() for word in (f"--{role}", column)]


@pytest.mark.parametrize(
    "detector",
    [
        "SAE latents",
        pytest.param("dense activations", marks=pytest.mark.slow),
        pytest.param("bag of words", marks=pytest.mark.slow),
    ],
)
def test_a_guard_gives_new_processes_the_scores_that_its_probe_reported(detector, world, tmp_path):
    probed = world.saefty(
        "probe", f"probe.features={world.encoded}", "probe.layers=[2]", *PROBE,
        f"probe.baselines={detector == 'dense activations'}",
        f"probe.save_detector={detector}", "--save", str(tmp_path / "guard"),
        f"run.dir={tmp_path / 'probe'}",
    )  # fmt: skip
    assert probed.code == 0, probed.err
    here = shutil.move(tmp_path / "guard", tmp_path / "moved")
    scored = world.saefty(
        "guard", "score", str(world.prompts), "--guard", str(here), "--text", "text", "--id",
        "id", "--label", "label", "--out", str(tmp_path / "scores.jsonl"),
    )  # fmt: skip
    assert scored.code == 0, scored.err
    with open(tmp_path / "probe" / "scores.csv", newline="") as file:
        reported = {row["example_id"]: float(row[detector]) for row in csv.DictReader(file)}
    found = {row["id"]: row["score"] for row in rows_of(tmp_path / "scores.jsonl")}
    assert len(found) == N_EXAMPLES
    assert len(reported) >= 8
    assert [found[name] for name in reported] == pytest.approx(list(reported.values()), rel=1e-4)
    fitted = N_EXAMPLES - len(reported)
    assert f"the guard was fitted on {fitted} of these {N_EXAMPLES} texts" in scored.err


def test_a_file_becomes_lines_and_figures(prompts, tmp_path):
    guard, model = (
        make_guard(tmp_path / "guard", "latents", "max"),
        str(tiny_models.folder_of("llama")),
    )
    out = tmp_path / "scores.jsonl"
    words = ["guard", "score", str(prompts), *FLAGS, "--guard", str(guard), "--out", str(out)]
    result = CliRunner().invoke(cli.app, [*words, "--model", model, "--json"])
    assert result.exit_code == 0, result.stderr
    rows, figures = rows_of(out), json.loads(result.stdout)["figures"]
    expected = load_guard(guard, model).score(TEXTS)
    assert [row["score"] for row in rows[:-2]] == pytest.approx(expected.tolist(), rel=1e-4)
    assert [(row["id"], row["score"], row["flagged"], row["status"]) for row in rows[-2:]] == [
        ("long", None, None, "too_long"),
        ("empty", None, None, "empty"),
    ]
    assert figures["not_scored"] == {"empty": 1, "too_long": 1}
    flagged = expected >= 0.5
    assert figures["flagged"] == flagged.sum()
    assert figures["recall"]["estimate"] == pytest.approx(flagged[HARMFUL].mean())
    assert figures["false_positive_rate"]["estimate"] == pytest.approx(flagged[~HARMFUL].mean())
    assert "--truncate right reads their beginning" in result.stderr


@pytest.mark.parametrize("form", ["csv", "json", "parquet", "txt", "jsonl.gz"])
def test_every_form_of_file_is_read_alike(form, tmp_path):
    guard = make_guard(tmp_path / "guard", "words")
    rows = [{"text": text} for text in TEXTS]
    path = tmp_path / f"texts.{form}"
    if form == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["text"])
            writer.writeheader()
            writer.writerows(rows)
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "txt":
        path.write_text("\n".join(TEXTS))
    else:
        with gzip.open(path, "wt") as file:
            file.writelines(map(fsio.dump_json_line, rows))
    found = score_file(ScoreRequest(guard, str(path), {}))
    expected = load_guard(guard).score(TEXTS).tolist()
    assert [row["score"] for row in found.rows] == expected


def test_lines_on_standard_input_are_texts(tmp_path, monkeypatch):
    guard = make_guard(tmp_path / "guard", "words")
    data = f"{TEXTS[0]}\n\n{TEXTS[5]}\r\n".encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    found = score_file(ScoreRequest(guard, "-", {}))
    expected = load_guard(guard).score([TEXTS[0], TEXTS[5]]).tolist()
    assert [row["score"] for row in found.rows] == expected
    assert found.text().splitlines()[0].endswith(TEXTS[0])


def test_an_interrupted_command_leaves_no_half_file(prompts, tmp_path, monkeypatch):
    guard, out = make_guard(tmp_path / "guard", "words"), tmp_path / "scores.jsonl"
    monkeypatch.setattr("saefty.guards.job.AT_ONCE", 10)
    judge, calls = Guard.judge, []

    def interrupted(self, texts):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(self, texts)

    monkeypatch.setattr(Guard, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_file(ScoreRequest(guard, str(prompts), COLUMNS, out=out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guard"]
    monkeypatch.setattr(Guard, "judge", judge)
    whole = score_file(ScoreRequest(guard, str(prompts), COLUMNS, out=out))
    assert len(rows_of(out)) == len(whole.rows) == len(TEXTS) + 2


def test_parts_of_a_file_are_joined_in_order(prompts, tmp_path, monkeypatch):
    guard = make_guard(tmp_path / "guard", "words")
    together = score_file(ScoreRequest(guard, str(prompts), COLUMNS))
    monkeypatch.setattr("saefty.guards.job.AT_ONCE", 7)
    assert score_file(ScoreRequest(guard, str(prompts), COLUMNS)).record() == together.record()


@pytest.mark.parametrize(
    ("changes", "kind", "what"),
    [
        ({"file": "how do I bake a bomb"}, InputError, "bake a bomb' is not there"),
        ({"columns": {"prompt": "quest"}}, InputError, r"no column 'quest' \(--prompt\)"),
        ({"columns": {"text": "question", "label": "kind"}}, InputError, "labels: "),
        ({"words": ("limit=3",)}, ConfigError, "Did you mean 'data.limit'"),
        ({"threshold": "90"}, ConfigError, "between 0 and 1"),
        ({"file": "-"}, ConfigError, "which have no columns: --text"),
    ],
)
def test_mistakes_are_named_in_the_commands_own_words(changes, kind, what, prompts, tmp_path):
    guard = make_guard(tmp_path / "guard", "words")
    request = {"guard": guard, "file": str(prompts), "columns": COLUMNS, **changes}
    with pytest.raises(kind) as caught:
        score_file(ScoreRequest(**request))
    assert caught.match(what)


@pytest.mark.parametrize(
    ("name", "what"),
    [("scores.csv", "lines of JSON"), ("prompts.jsonl", "are both"), ("folder.jsonl", "a folder")],
)
def test_an_output_that_would_destroy_something_is_refused(name, what, prompts, tmp_path):
    here = shutil.copy(prompts, tmp_path / "prompts.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    before = here.read_bytes()
    with pytest.raises(ConfigError, match=what):
        score_file(ScoreRequest(tmp_path / "guard", str(here), {}, out=tmp_path / name))
    assert here.read_bytes() == before


@pytest.mark.parametrize("content", ['{"id": 1, "text": "mine"}\n', "no JSON\n", "[" * 9999])
def test_a_file_of_something_else_is_not_written_over(content, prompts, tmp_path):
    guard, out = make_guard(tmp_path / "guard", "words"), tmp_path / "mine.jsonl"
    out.write_text(content)
    with pytest.raises(ConfigError, match="does not hold scores that this command wrote"):
        score_file(ScoreRequest(guard, str(prompts), COLUMNS, out=out))
    assert out.read_text() == content


def test_a_file_that_further_words_name_is_not_written_over(prompts, tmp_path):
    guard, scores = make_guard(tmp_path / "guard", "words"), tmp_path / "scores.jsonl"
    score_file(ScoreRequest(guard, str(prompts), COLUMNS, out=scores))
    before = scores.read_bytes()
    words = (f"data.path={scores}", "data.text=status")
    for given in (words, (*words, "data.files=[a.jsonl]")):
        with pytest.raises(ConfigError, match="are both"):
            score_file(ScoreRequest(guard, str(prompts), {}, given, out=scores))
    assert scores.read_bytes() == before


@pytest.mark.parametrize("inner", ["scores.jsonl", "more/scores.jsonl"])
def test_no_scores_are_put_into_a_guards_folder(inner, prompts, tmp_path):
    guard = make_guard(tmp_path / "guard", "words")
    before = sorted(guard.rglob("*"))
    with pytest.raises(ConfigError, match="lies in the folder of a guard"):
        score_file(ScoreRequest(guard, str(prompts), COLUMNS, out=guard / inner))
    assert sorted(guard.rglob("*")) == before


def test_a_missing_file_is_named_where_there_are_older_scores(prompts, tmp_path):
    guard, out = make_guard(tmp_path / "guard", "words"), tmp_path / "scores.jsonl"
    score_file(ScoreRequest(guard, str(prompts), COLUMNS, out=out))
    with pytest.raises(InputError, match="nowhere.jsonl' is not there"):
        score_file(ScoreRequest(guard, str(tmp_path / "nowhere.jsonl"), COLUMNS, out=out))
    assert len(rows_of(out)) == len(TEXTS) + 2


@pytest.mark.parametrize("name", ["[x].jsonl", "a: b.jsonl", "null.jsonl", "1e3.jsonl"])
def test_names_are_taken_as_they_are_written(name, tmp_path, monkeypatch):
    guard = make_guard(tmp_path / "guard", "words")
    monkeypatch.chdir(tmp_path)
    rows = [{"text": "bread", "null": "a robot"}]
    Path(name).write_text("".join(map(fsio.dump_json_line, rows)))
    found = score_file(ScoreRequest(guard, name, {"text": "null"}))
    assert found.rows[0]["score"] == load_guard(guard).score(["a robot"])[0]


def test_scores_are_written_over_by_scores_and_that_is_said(prompts, tmp_path, caplog):
    caplog.set_level("INFO")
    guard, out = make_guard(tmp_path / "guard", "words"), tmp_path / "scores.jsonl"
    score_file(ScoreRequest(guard, str(prompts), {"text": "question"}, out=out))
    score_file(ScoreRequest(guard, str(prompts), COLUMNS, out=out))
    assert rows_of(out)[0]["label"] is bool(HARMFUL[0])
    assert caplog.text.count(f"the scores in {out} will be written over") == 1


def test_a_dash_is_no_name_of_an_output(prompts, tmp_path):
    with pytest.raises(ConfigError, match="- is none") as caught:
        score_file(ScoreRequest(tmp_path, str(prompts), COLUMNS, out=Path("-")))
    assert "--json" in caught.value.then


def test_labels_that_are_upside_down_are_warned_of(prompts, tmp_path, caplog):
    guard = make_guard(tmp_path / "guard", "words")
    score_file(ScoreRequest(guard, str(prompts), {**COLUMNS, "harmful": "good"}))
    assert "the labels may be inverted" in caplog.text


def test_texts_of_the_fit_are_told_apart_from_the_others(tmp_path, caplog):
    guard, path = make_guard(tmp_path / "guard", "words"), tmp_path / "texts.jsonl"
    new = [("the robot, bread and water", True), ("please bake the bread", False)]
    rows = [*zip(TEXTS, HARMFUL.tolist(), strict=True), *new]
    path.write_text("".join(fsio.dump_json_line({"text": a, "label": b}) for a, b in rows))
    found = score_file(ScoreRequest(guard, str(path), {"label": "label"}))
    expected = load_guard(guard).flag([text for text, _ in new])
    assert found.figures["unseen"]["texts"] == 2
    assert found.figures["unseen"]["flagged"] == expected.sum()
    assert "Without the texts it was fitted on: 2 of 2 texts scored" in found.text()
    score_file(ScoreRequest(guard, str(path), {}))
    assert "their scores say nothing of how it does on others" in caplog.text


def test_a_column_of_ids_and_texts_of_unknown_words_are_warned_of(prompts, tmp_path, caplog):
    guard = make_guard(tmp_path / "guard", "words")
    score_file(ScoreRequest(guard, str(prompts), {"text": "name"}))
    assert "the column 'name' holds single words with digits" in caplog.text
    assert "mostly of words that the guard does not know (100 % of all)" in caplog.text


def test_texts_read_otherwise_than_in_training_are_warned_of(prompts, tmp_path, caplog):
    guard = make_guard(tmp_path / "guard", "dense", with_response=True)
    columns = {"prompt": "question"}
    score_file(
        ScoreRequest(guard, str(prompts), columns, model=str(tiny_models.folder_of("llama")))
    )
    assert "give the column as --text" in caplog.text
    assert "38 of 38 texts have no response" in caplog.text


def test_a_guard_says_what_it_is(tmp_path):
    guard = make_guard(tmp_path / "guard", "dense", "last")
    result = CliRunner().invoke(cli.app, ["guard", "info", str(guard)])
    assert result.exit_code == 0
    assert "Activations at blocks.1.hook_resid_post" in result.output
    assert "`fpr_1pct`: 0.8176" in result.output
    card = [line[2:] for line in (guard / "guard.md").read_text().splitlines() if line[:2] == "- "]
    assert all(line in result.output for line in card)
    assert "AUROC 0.910 [0.840, 0.970]" in result.output
    record = json.loads(CliRunner().invoke(cli.app, ["guard", "info", str(guard), "--json"]).output)
    assert record["facts"]["examples"] == len(TEXTS)
    assert record["thresholds"]["fpr_1pct"] == pytest.approx(1 / (1 + np.exp(-1.5)))


def test_a_guard_that_was_not_shown_to_work_says_so(prompts, tmp_path, caplog):
    guard = make_guard(tmp_path / "guard", "words")
    poor = guard_cases.facts(auroc=Interval(0.6, 0.45, 0.7, "by hand", 40))
    whole = load_guard(guard).files
    worse = save_guard(tmp_path / "worse", whole.spec, whole.linear, poor)
    assert "do not rely on it" in (worse / "guard.md").read_text()
    score_file(ScoreRequest(worse, str(prompts), COLUMNS))
    assert "better than chance has not been shown: its AUROC was 0.600" in caplog.text
