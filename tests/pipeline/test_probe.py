"""probe from the command line on the sandbox: the table, the sentence, and guards that agree."""

import csv
import json

import numpy as np
import pytest

from saefty import fsio
from saefty.guards.scoring import load_guard
from saefty.sandbox.language_model import MODEL_FOLDER
from saefty.sandbox.world import World

REQUESTS = 72
FAST = ("probe.boots=100", "probe.permutations=100", "probe.poolings=[mean]", "probe.k=1",
        "probe.one_vs_rest=false", "probe.leave_one_source_out=false")  # fmt: skip


@pytest.fixture(scope="module")
def requests(saefty, tmp_path_factory):
    """Labelled requests of four languages, encoded by an SAE of a few steps, and their store."""
    folder = tmp_path_factory.mktemp("probe")
    records = []
    for one in World(0).requests(REQUESTS, seed=1):
        example = one.example(response=False)
        records.append(
            {
                "id": example.id, "prompt": example.prompt, "label": example.label,
                "group": f"{example.group} {one.language}", "source": one.language,
                "category": one.topic,
            }
        )  # fmt: skip
    path = folder / "requests.jsonl"
    fsio.commit_text(path, "".join(map(fsio.dump_json_line, records)))
    data = [f"model.name={MODEL_FOLDER}", f"data.path={path}"]
    data += [f"data.{key}={key}" for key in records[0]]
    steps = (
        ("extract", *data, "extract.layers=1", f"run.dir={folder / 'x'}"),
        ("train", f"train.store={folder / 'x'}", "sae.k=5", "sae.d_sae=128", "train.max_steps=40",
         f"run.dir={folder / 's'}"),
        ("encode", f"encode.sae={folder / 's'}", *data, f"run.dir={folder / 'f'}"),
    )  # fmt: skip
    for words in steps:
        result = saefty(*words)
        assert result.code == 0, result.err
    return folder, {record["id"]: record["prompt"] for record in records}


@pytest.fixture(scope="module")
def compared(saefty, requests):
    folder = requests[0]
    result = saefty(
        "probe", f"probe.features={folder / 'f'}", *FAST, f"run.dir={folder / 'p'}", "--json",
        "--save", str(folder / "guard"),
    )  # fmt: skip
    assert result.code == 0, result.err
    return folder, json.loads(result.out)


def test_every_input_is_compared_and_the_sentence_stands_first(compared):
    folder, outcome = compared
    figures = outcome["figures"]
    names = {one["detector"] for one in figures["detectors"]["all"]}
    assert names == {
        "SAE latents", "1 latent", "dense activations", "random SAE", "bag of words",
    }  # fmt: skip
    assert len(figures["paired"]["all"]) == 10
    assert figures["sentence"] in (folder / "p" / "summary.md").read_text()
    assert sorted(figures["sources"]) == ["de", "en", "es", "fr"]


def test_the_same_store_given_beside_the_features_changes_nothing(saefty, compared):
    folder, outcome = compared
    result = saefty(
        "probe", f"probe.features={folder / 'f'}", f"probe.store={folder / 'x'}", *FAST,
        f"run.dir={folder / 'p2'}", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = {
        one["detector"]: one["auroc"]["estimate"]
        for one in json.loads(result.out)["figures"]["detectors"]["all"]
    }
    expected = {
        one["detector"]: one["auroc"]["estimate"] for one in outcome["figures"]["detectors"]["all"]
    }
    assert found == pytest.approx(expected, abs=1e-6)
    assert not (folder / "p2" / "activations").exists()


@pytest.mark.parametrize("detector", [None, "SAE latents", "dense activations", "bag of words"])
def test_a_saved_guard_gives_texts_the_probabilities_of_the_report(
    saefty, requests, compared, detector
):
    folder, prompts = requests
    place, run = folder / "guard", folder / "p"
    if detector is None:
        detector = compared[1]["figures"]["saved"].partition(",")[0]
    else:  # from the complete run
        place = folder / f"guard {detector}"
        result = saefty(
            "probe", f"probe.features={folder / 'f'}", *FAST, f"probe.save_detector={detector}",
            f"run.dir={run}", "--save", str(place),
        )  # fmt: skip
        assert result.code == 0, result.err
    with open(run / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = load_guard(place).score([prompts[row["example_id"]] for row in rows])
    np.testing.assert_allclose(scores, [float(row[detector]) for row in rows], atol=2e-4)


def test_a_guard_of_activations_that_are_encoded_on_the_way_agrees_with_them(
    saefty, requests, compared
):
    folder, prompts = requests
    result = saefty(
        "probe", f"probe.sae={folder / 's'}", f"probe.store={folder / 'x'}", *FAST,
        "probe.baselines=false", "probe.save_detector=SAE latents", f"run.dir={folder / 'p4'}",
        "--save", str(folder / "guard on the way"), "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    found, expected = (
        {one["detector"]: one["auroc"] for one in figures["detectors"]["all"]}["SAE latents"]
        for figures in (json.loads(result.out)["figures"], compared[1]["figures"])
    )
    assert found == expected
    with open(folder / "p4" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = load_guard(folder / "guard on the way").score(
        [prompts[row["example_id"]] for row in rows]
    )
    np.testing.assert_allclose(scores, [float(row["SAE latents"]) for row in rows], atol=2e-4)


def test_a_guard_folder_that_holds_something_else_is_left_alone(saefty, requests):
    folder = requests[0]
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    result = saefty(
        "probe", f"probe.features={folder / 'f'}", *FAST, f"run.dir={folder / 'p3'}",
        "--save", str(folder / "mine"),
    )  # fmt: skip
    assert result.code != 0
    assert "holds something else than a guard" in result.err
    assert [path.name for path in (folder / "mine").iterdir()] == ["notes.txt"]
