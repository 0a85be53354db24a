"""A comparison of vectors: its figures by hand, whole on disk, and what is refused."""

import csv
import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

import tiny_models
from saefty import fsio, steering_compare_report
from saefty.config import build_config
from saefty.errors import ConfigError, InputError, MismatchError
from saefty.interventions.steer import steer
from saefty.interventions.vectors import SteeringVector, load_vector
from saefty.judges.rules import Lexicon
from saefty.metrics.steering import halves
from saefty.off_target import reply_latents
from saefty.plots.base import save_plot
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig
from saefty.stages.steer_compare import CompareConfig, run
from saefty.steering import UNSTEERED
from saefty.steering_vectors import random_vector

SITE = Site(1)
D = tiny_models.D_MODEL
WORDS = ["h", "ea", "th", "ick", "hick"]
"""Of the tiny model's own words, some that it writes when it is steered."""
PROMPTS = [
    Example(f"p{n}", text, raw=True)
    for n, text in enumerate(["the lazy dog", "Mix flour", "I can help", "the model"])
]


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Write what a picture shows in its place: drawing takes most of a small run's time."""
    monkeypatch.setattr(steering_compare_report, "save_plot", write_data)


def write_data(name, data, path, *, size):
    fsio.commit_text(path, f"{name} {size} {data}")


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    paths = {}
    for seed, name in enumerate(("caa", "decoder")):
        values = torch.randn(D, generator=torch.Generator().manual_seed(seed))
        made = SteeringVector(values, SITE, name, provenance={"model": "tiny"})
        paths[name] = str(made.save(folder / name))
    return paths


def random_sae(d_in=D):
    sae = SaeConfig(arch="topk", d_in=d_in, d_sae=48, k=6).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    sae.site = SITE
    return sae


def settings(vectors, folder, **keys):
    section = {
        "vectors": vectors,
        "random": 2,
        "alphas": [0.5, 1.0],
        "judge": "lexicon",
        "judge_options": {"words": WORDS},
        "fluency": "regex",
        "fluency_options": {"pattern": "[ao]"},
        "attributes": {"letter o": {"judge": "regex", "options": {"pattern": "o"}}},
        "max_new_tokens": 8,
        "batch_size": 16,
        "coverage": 0.0,
        "boots": 200,
        "permutations": 200,
    }
    return build_config(
        CompareConfig,
        {
            "model": {"name": "tiny"},
            "compare": {**section, **keys},
            "run": {"dir": str(folder)},
        },
    )


@pytest.fixture(scope="module")
def finished(model, vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    cfg = settings(vectors, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering_compare_report, "save_plot", write_data)
        return run(cfg, model=model, examples=PROMPTS, harmless=PROMPTS, sae=random_sae())


def test_every_file_is_there(finished):
    names = {p.relative_to(finished.folder).as_posix() for p in finished.folder.rglob("*")}
    assert {
        "summary.md", "summary.json", "ways.csv", "strengths.csv", "differences.csv",
        "latents.csv", "attributes.csv", "plots/pareto.png", "plots/scores.png",
        "plots/off_target.png", "replies.jsonl",
    } <= names  # fmt: skip


def test_the_three_pictures_are_drawn(model, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(steering_compare_report, "save_plot", save_plot)
    run(settings(vectors, tmp_path, random=1), model=model, examples=PROMPTS)
    for name in ("pareto", "scores", "off_target"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_ledger_counts_replies(finished):
    ledger = json.loads((finished.folder / "finished.json").read_text())["ledger"]
    doses = 1 + 4 * 2
    assert ledger["in"] == doses * len(PROMPTS)
    assert ledger["ok"] + sum(ledger["skipped"].values()) == ledger["in"]
    missing = [json.loads(line)["score"] is None
               for path in (finished.folder / "scores" / "fluency").glob("*.jsonl")
               for line in path.read_text().splitlines()]  # fmt: skip
    assert len(missing) == ledger["in"]
    assert ledger["skipped"].get("no score", 0) >= sum(missing)


def test_a_way_s_score_is_that_of_replies_generated_by_hand(finished, model, vectors):
    """Vectors added at alpha times the residual norm, judged here; the strength is theirs."""
    way = finished.figures["ways"]["caa"]
    reported = ~halves(len(PROMPTS), None, seed=0)
    values = SteeringVector(
        torch.randn(D, generator=torch.Generator().manual_seed(0)), SITE, "caa"
    ).unit
    states = []
    for item in model.tokenize(PROMPTS):
        ids = torch.from_numpy(item.ids.astype(np.int64))[None]
        with torch.no_grad():
            hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
        states += hidden.norm(dim=1)[torch.from_numpy(~item.special)].tolist()
    assert [one["alpha"] for one in way["strengths"]] == [0.0, 0.5, 1.0]
    for one in way["strengths"]:
        with model.intervene(SITE, steer(values * np.mean(states), one["alpha"])):
            replies = model.generate(PROMPTS, max_new_tokens=8)
        behaviour = Lexicon(WORDS).score(PROMPTS, replies)[reported]
        coherent = [
            float(bool({*"ao"} & {*r.casefold()})) if r.strip() else np.nan for r in replies
        ]
        coherence = np.array(coherent)
        expected = np.nanmean(behaviour) * np.nanmean(coherence[reported])
        assert one["score"]["estimate"] == pytest.approx(expected, abs=1e-9)
    chosen = max(way["strengths"], key=lambda one: one["chosen_on"] or -1)
    assert way["best"] == chosen


def test_at_alpha_zero_every_way_is_the_model_as_it_is(finished):
    zero = [way["strengths"][0] for way in finished.figures["ways"].values()]
    assert all(one == zero[0] for one in zero)
    assert len(zero) == 4


def test_random_directions_have_one_part_in_the_differences(finished):
    pairs = {(one["first"], one["second"]) for one in finished.figures["differences"]}
    ways, rival = finished.figures["ways"], finished.figures["rival"]
    steer = {name for name, way in ways.items() if way["best"]["alpha"]}
    tested = {UNSTEERED, *(steer - {"random_1", "random_2"}), *(steer & {rival})}
    assert {frozenset(pair) for pair in pairs} == {
        frozenset(pair) for pair in combinations(tested, 2)
    }
    text = (finished.folder / "summary.md").read_text(encoding="utf-8")
    score = ways[rival]["best"]["score"]["estimate"]
    assert (f"scores {score:.3f}, the maximum over 2 random" in text) == (rival in steer)


def test_the_tables_hold_what_the_figures_say(finished):
    with open(finished.folder / "ways.csv", newline="", encoding="utf-8") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    steer = [name for name, way in finished.figures["ways"].items() if way["best"]["alpha"]]
    assert steer
    for name in steer:
        best = finished.figures["ways"][name]["best"]
        assert float(rows[name]["score"]) == pytest.approx(best["score"]["estimate"])
        assert float(rows[name]["score_where_chosen"]) == pytest.approx(best["chosen_on"])
        kl = finished.figures["harmless"][name]["kl"]["estimate"]
        assert float(rows[name]["kl"]) == pytest.approx(kl)
    for name in set(rows) - set(steer):
        row = rows[name]
        assert {row["alpha"], row["score"], row["kl"], row["moved"]} == {""}
        assert row["note"] == "no strength beats not steering"
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary["reported_on"] + summary["chosen_on"] == len(PROMPTS)
    text = (finished.folder / "summary.md").read_text(encoding="utf-8")
    assert "without steering" in text or "unsteered model" in text
    assert "random directions" in text


def test_a_run_that_was_cut_short_ends_with_the_same_bytes(finished, model, vectors, tmp_path):
    cfg = settings(vectors, tmp_path)
    given = {"model": model, "examples": PROMPTS, "harmless": PROMPTS, "sae": random_sae()}
    run(cfg, **given)
    digests = {
        path.relative_to(tmp_path): fsio.digest(path)
        for path in tmp_path.rglob("*")
        if path.suffix in {".csv", ".png", ".jsonl"} and path.name != "journal.jsonl"
    }
    (tmp_path / "finished.json").unlink()
    gone = [*tmp_path.glob("replies/*/00001.jsonl"), *tmp_path.glob("scores/*/c*")]
    kept = list(tmp_path.glob("scores/attributes/letter o/*.jsonl"))
    assert kept
    for path in [*gone, kept[0]]:
        path.unlink()
    run(cfg, **given)
    assert {name: fsio.digest(tmp_path / name) for name in digests} == digests


@pytest.mark.parametrize("alphas", [[], [0.0], [2.0], [2.0, 2.0], [float("inf"), 1.0]])
def test_a_grid_without_spread_is_refused(model, vectors, tmp_path, alphas):
    with pytest.raises(ConfigError):
        run(settings(vectors, tmp_path / "r", alphas=alphas), model=model, examples=PROMPTS)
    assert not (tmp_path / "r").exists()


def test_a_vector_of_another_width_is_refused_before_any_work(model, tmp_path):
    wide = SteeringVector(torch.ones(D + 1), SITE, "caa").save(tmp_path / "wide")
    with pytest.raises(MismatchError, match=f"{D + 1} wide, but the activations of"):
        run(settings({"wide": str(wide)}, tmp_path / "r"), model=model, examples=PROMPTS)
    assert not (tmp_path / "r").exists()


def test_an_sae_of_another_model_is_refused(model, vectors, tmp_path):
    with pytest.raises(MismatchError, match="16 wide"):
        run(settings(vectors, tmp_path / "r"), model=model, examples=PROMPTS, sae=random_sae(16))


def test_too_few_prompts_are_refused(model, vectors, tmp_path):
    with pytest.raises(InputError, match="2 prompts in 2 clusters are too few"):
        run(settings(vectors, tmp_path / "r"), model=model, examples=PROMPTS[:2])
    grouped = [replace(one, group=str(n % 3)) for n, one in enumerate(PROMPTS)]
    with pytest.raises(InputError, match="4 prompts in 3 clusters are too few"):
        run(settings(vectors, tmp_path / "r"), model=model, examples=grouped)
    assert not (tmp_path / "r").exists()


def test_no_vector_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="no vector to compare"):
        run(settings({}, tmp_path / "r"), model=model, examples=PROMPTS)


def test_both_methods_stand_side_by_side(model, vectors, tmp_path):
    cfg = settings(vectors, tmp_path, methods=[1, 2], random=0, attributes={})
    figures = run(cfg, model=model, examples=PROMPTS).figures
    assert set(figures["ways"]) == {
        f"{name}, method {method}" for name in vectors for method in (1, 2)
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"methods": []}, "methods"),
        ({"where": []}, "where"),
        ({"where": [-1]}, "where"),
    ],
)
def test_a_setting_that_means_nothing_is_told_by_its_key(vectors, tmp_path, keys, message):
    with pytest.raises(ConfigError, match=rf"compare\.{message}"):
        settings(vectors, tmp_path / "r", **keys)


@pytest.mark.parametrize("name", ["random_1", "Random_2", "unsteered", "../../x", "a/b", ".hidden"])
def test_a_name_that_would_fall_on_other_replies_is_refused(model, vectors, tmp_path, name):
    named = {name: vectors["caa"], "decoder": vectors["decoder"]}
    with pytest.raises(ConfigError, match="name"):
        run(settings(named, tmp_path / "r"), model=model, examples=PROMPTS)
    assert not (tmp_path / "r").exists()


def test_an_attribute_that_cannot_be_a_folder_is_refused(model, vectors, tmp_path):
    wrong = {"a/b": {"judge": "regex", "options": {"pattern": "o"}}}
    with pytest.raises(ConfigError, match="cannot name an attribute"):
        run(settings(vectors, tmp_path / "r", attributes=wrong), model=model, examples=PROMPTS)


def test_random_directions_alone_are_refused(model, tmp_path):
    path = random_vector(D, SITE).save(tmp_path / "v")
    with pytest.raises(ConfigError, match="all 1 vectors are random directions"):
        run(settings({"mine": str(path)}, tmp_path / "r"), model=model, examples=PROMPTS)
    assert not (tmp_path / "r").exists()


def test_a_judge_of_fluency_in_the_wrong_place_is_sent_to_its_own_key(model, vectors, tmp_path):
    cfg = settings(vectors, tmp_path / "r", judge="perplexity", judge_options={})
    with pytest.raises(ConfigError, match="Set compare.fluency=perplexity"):
        run(cfg, model=model, examples=PROMPTS)


def test_a_vector_that_changed_makes_it_another_comparison(model, vectors, tmp_path):
    cfg = settings(vectors, tmp_path / "run", random=0, attributes={})
    run(cfg, model=model, examples=PROMPTS)
    other = replace(load_vector(vectors["caa"]), norms={"residual": 3.0})
    changed = settings({**vectors, "caa": str(other.save(tmp_path / "caa"))}, tmp_path / "run",
                       random=0, attributes={})  # fmt: skip
    with pytest.raises(MismatchError, match=r"inputs\.vectors\.caa"):
        run(changed, model=model, examples=PROMPTS)


def test_what_else_changed_is_of_the_prompts_that_are_reported(finished, model):
    reported = np.flatnonzero(~halves(len(PROMPTS), None, seed=0))
    replies = [fsio.read_lines(finished.folder / "replies" / "unsteered" / "00000.jsonl")]
    by_id = {one["example_id"]: one["reply"] for one in replies[0]}
    own = [by_id[PROMPTS[n].id] for n in reported]
    before = [float("o" in reply.casefold()) if reply.strip() else np.nan for reply in own]
    for shifts in finished.figures["attributes"].values():
        assert shifts[0]["before"] == pytest.approx(np.nanmean(before))
    latents = reply_latents(model, random_sae(), SITE, [PROMPTS[n] for n in reported], own)
    for found in finished.figures["latents"].values():
        assert found["clusters"] <= len(reported)
        for one in found["shifts"]:
            assert one["before"] == pytest.approx(np.nanmean(latents[:, one["latent"]]), abs=1e-5)


def test_the_length_of_a_vector_is_told_in_residual_norms(finished, model, vectors, tmp_path):
    """Of `residual` one alpha is one; of `activation` it is the vector's own length by theirs."""
    own = [one["length"] for one in finished.figures["facts"].values()]
    assert own == pytest.approx([1.0] * 4)
    norms = []
    for item in model.tokenize(PROMPTS):
        ids = torch.from_numpy(item.ids.astype(np.int64))[None]
        with torch.no_grad():
            hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
        norms += hidden.norm(dim=1)[torch.from_numpy(~item.special)].tolist()
    long = load_vector(vectors["caa"])
    long = replace(long, values=50 * long.values)
    named = {**vectors, "caa": str(long.save(tmp_path / "caa"))}
    cfg = settings(named, tmp_path / "run", unit="activation", alphas=[0.01, 0.02], random=1)
    done = run(cfg, model=model, examples=PROMPTS)
    lengths = {name: one["length"] for name, one in done.figures["facts"].items()}
    for name, path in named.items():
        assert lengths[name] == pytest.approx(load_vector(path).norm / np.mean(norms), rel=1e-5)
    assert lengths["random_1"] == pytest.approx(lengths["caa"])
    text = (done.folder / "summary.md").read_text(encoding="utf-8")
    assert "Not a fair comparison of directions" in text
    assert f"{lengths['caa']:.3g} for caa" in text
    assert "Not a fair comparison" not in (finished.folder / "summary.md").read_text("utf-8")


def test_alpha_counts_in_the_latent_s_maximum_for_random_directions_too(model, vectors, tmp_path):
    cfg = settings(vectors, tmp_path / "run", unit="latent", random=1, attributes={})
    with pytest.raises(ConfigError, match="nothing of the latent's maximum"):
        run(cfg, model=model, examples=PROMPTS)
    assert not (tmp_path / "run").exists()
    named = {
        name: str(load_vector(path).with_norms(latent=2.0).save(tmp_path / name))
        for name, path in vectors.items()
    }
    cfg = settings(named, tmp_path / "run", unit="latent", random=1, attributes={})
    assert set(run(cfg, model=model, examples=PROMPTS).figures["ways"]) == {*vectors, "random_1"}


def test_a_strength_that_breaks_the_model_leaves_the_others_their_scores(model, vectors, tmp_path):
    """In float32 a vector of 1e39 norms is infinite; whole and broken doses share batches."""
    keys = {"random": 0, "attributes": {}}
    whole = run(settings(vectors, tmp_path / "whole", **keys), model=model, examples=PROMPTS)
    cfg = settings(vectors, tmp_path / "run", **keys, alphas=[0.5, 1.0, 1e39])
    done = run(cfg, model=model, examples=PROMPTS)
    assert set(done.figures["broken"]) == {"caa_1e+39", "decoder_1e+39"}
    for name in vectors:
        *others, broken = done.figures["ways"][name]["strengths"]
        assert others == whole.figures["ways"][name]["strengths"]
        assert (broken["alpha"], broken["score"]["estimate"], broken["missing"]) == (1e39, None, 2)
    text = (done.folder / "summary.md").read_text(encoding="utf-8")
    assert "Strengths that broke the model" in text
    assert "step 1 of generation" in text
    ledger = json.loads((done.folder / "finished.json").read_text())["ledger"]
    assert ledger["failed"] == {"broke the model": 2 * len(PROMPTS)}


def test_a_bare_vector_is_told_what_can_be_done(model, vectors, tmp_path):
    np.save(tmp_path / "bare.npy", load_vector(vectors["caa"]).values.numpy())
    with pytest.raises(ConfigError, match="bare.npy is a bare vector") as error:
        run(settings({"bare": str(tmp_path / "bare.npy")}, tmp_path / "r"), model=model)
    assert 'sf.load_vector(PATH, sf.Site(20)).save("FOLDER")' in error.value.then


def test_a_judge_that_scores_nothing_is_refused_with_the_reasons(model, vectors, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", lambda examples, **_: [""] * len(examples))
        with pytest.raises(InputError, match="none of the 36 replies .* behaviour: empty 36"):
            run(settings(vectors, tmp_path / "r"), model=model, examples=PROMPTS)
