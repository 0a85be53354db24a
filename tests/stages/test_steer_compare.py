"""A comparison of vectors: its figures by hand, whole on disk, and what is refused."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from typer.testing import CliRunner

import tiny_models
from saefty import fsio, steering_compare_report
from saefty.cli import app
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
from saefty.saes.native import save_sae
from saefty.stages.steer_compare import CompareConfig, run
from saefty.steering import PLAIN, UNSTEERED, Dose
from saefty.steering_compare_report import write_comparison
from saefty.steering_comparison import compare
from saefty.steering_tables import OffTargets
from saefty.steering_vectors import random_vector

SITE = Site(1)
D = tiny_models.D_MODEL
WORDS = ["the", "and", "dog", "a", "o", "an"]
PROMPTS = [
    Example(f"p{n}", text, raw=True)
    for n, text in enumerate(["the lazy dog", "Mix flour", "I can help", "the model"])
]


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Write what a picture shows in its place: drawing takes most of a small run's time."""
    monkeypatch.setattr(steering_compare_report, "save_plot", write_data)


def write_data(name, data, path, size):
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
        "fluency_options": {"pattern": "e"},
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
        coherence = np.array([float("e" in r.casefold()) if r.strip() else np.nan for r in replies])
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
    assert len(pairs) == 6  # two vectors, the rival and the unsteered model
    assert sum(UNSTEERED in pair for pair in pairs) == 3
    controls = {name for pair in pairs for name in pair if name.startswith("random")}
    assert controls == {finished.figures["rival"]}
    text = (finished.folder / "summary.md").read_text(encoding="utf-8")
    rival = finished.figures["ways"][finished.figures["rival"]]["best"]["score"]["estimate"]
    assert f"it scores {rival:.3f}" in text


def test_the_tables_hold_what_the_figures_say(finished):
    with open(finished.folder / "ways.csv", newline="", encoding="utf-8") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    for name, way in finished.figures["ways"].items():
        assert float(rows[name]["score"]) == pytest.approx(way["best"]["score"]["estimate"])
        kl = finished.figures["harmless"][name]["kl"]["estimate"]
        assert float(rows[name]["kl"]) == pytest.approx(kl)
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


def scored(behaviour, coherence, coverage=0.95, controls=()):
    """Compare with scores that are given; the way of each dose is its own arm at alpha 1."""
    n = len(next(iter(behaviour.values())))
    shown = {PLAIN: np.full(n, 0.2), **{Dose(a, 1.0): v for a, v in behaviour.items()}}
    fluent = {PLAIN: np.ones(n), **{Dose(a, 1.0): v for a, v in coherence.items()}}
    return compare(
        shown, fluent, list(behaviour), [0.0, 1.0], None, controls=controls, coverage=coverage,
        boots=100, permutations=100, seed=0,
    )  # fmt: skip


def few_scores(n=64):
    """Scores of a model that is broken: six of all replies, three on either side, are perfect."""
    first = halves(n, None, seed=0)
    values = np.full(n, np.nan)
    values[np.flatnonzero(first)[:3]] = values[np.flatnonzero(~first)[:3]] = 1.0
    return values


def test_a_strength_that_breaks_the_model_does_not_win(tmp_path):
    found = scored({"caa": few_scores()}, {"caa": few_scores()})
    way = found.ways[0]
    assert way.best.alpha == 0.0
    assert (way.strengths[1].missing, way.strengths[1].scored) == (29, 3 / 32)
    assert np.isnan(way.strengths[1].score.estimate)
    assert way.strengths[1].score.method == "too few scored"
    assert scored({"caa": few_scores()}, {"caa": few_scores()}, coverage=0.0).ways[0].best.alpha
    figures = write_comparison(
        tmp_path, found, OffTargets(), controls=[], behaviour="b", judges=("x", "y"),
        unit="residual", coverage=0.95,
    )  # fmt: skip
    assert figures["coverage"] == {"unsteered": 1.0, "caa": 3 / 32}
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "No alpha of any vector beats the unsteered model" in text
    assert "Left out: caa: alpha 1 (9% of those reported)" in text


def test_replies_that_were_never_scored_are_refused_with_the_share():
    shown = {PLAIN: few_scores(), Dose("a", 1.0): few_scores()}
    with pytest.raises(InputError, match=r"9\.4% at best, and 95% are needed"):
        compare(
            shown, shown, ["a"], [0.0, 1.0], None, coverage=0.95, boots=100, permutations=100,
            seed=0,
        )  # fmt: skip


def test_perfect_scores_claim_no_certainty_and_neither_do_their_differences():
    found = scored({"a": np.ones(64), "b": np.zeros(64)}, {"a": np.ones(64), "b": np.ones(64)})
    best = found.way("a").best.score
    low = binomtest(32, 32).proportion_ci(0.95, method="wilson").low ** 2
    assert (best.estimate, best.high) == (1.0, 1.0)
    assert best.low == pytest.approx(low, abs=1e-9)
    one = next(d for d in found.differences if {d.first, d.second} == {"a", "b"})
    other = found.way("b").best.score  # the unsteered model's: 0.2 on all prompts
    below = np.hypot(best.estimate - best.low, other.high - other.estimate)
    assert one.difference.estimate == pytest.approx(0.8)
    assert one.difference.low == pytest.approx(0.8 - below)
    same = next(d for d in found.differences if {d.first, d.second} == {"b", UNSTEERED})
    assert (same.difference.low, same.difference.high, same.p) == (0.0, 0.0, 1.0)


def test_a_clear_difference_holds_however_many_ways_there_are():
    rng = np.random.default_rng(0)
    arms = [f"way {n}" for n in range(12)]
    behaviour = {PLAIN: np.zeros(80)}
    behaviour |= {Dose(arm, 1.0): 0.3 + 0.1 * rng.random(80) for arm in arms}
    behaviour[Dose("way 3", 1.0)] = 0.8 + 0.1 * rng.random(80)
    coherence = {dose: np.ones(80) for dose in behaviour}
    found = compare(
        behaviour, coherence, arms, [0.0, 1.0], None, coverage=0.95, boots=100, permutations=100,
        seed=0,
    )  # fmt: skip
    assert found.ways[0].name == "way 3"
    own = [one for one in found.differences if one.first == "way 3"]
    assert len(own) + sum(one.second == "way 3" for one in found.differences) == 12
    assert max(one.p_holm for one in own) <= 0.05
    others = [
        one for one in found.differences if not {"way 3", UNSTEERED} & {one.first, one.second}
    ]
    assert sum(one.p_holm <= 0.05 for one in others) <= 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_sae(random_sae(), folder / "sae")
    for name, texts in {"pos": ["the lazy dog", "a robot"], "neg": ["Mix flour"]}.items():
        lines = "".join(fsio.dump_json_line({"text": text}) for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


class TestMakingOne:
    """`saefty steer vector` on the command line."""

    def made(self, *words):
        return CliRunner().invoke(app, ["steer", "vector", *map(str, words)])

    def test_decoder_caa_and_random_ones_are_made(self, world):
        sae, out = world / "sae", world / "decoder"
        done = self.made("--method", "decoder", "--sae", sae, "--latent", "3:2,9", "--out", out,
                         "--export", world / "d.npy")  # fmt: skip
        assert done.exit_code == 0, done.output
        expected = (2 * random_sae().W_dec[3] + random_sae().W_dec[9]).detach().numpy()
        np.testing.assert_allclose(np.load(world / "d.npy"), expected, atol=1e-6)
        model = tiny_models.folder_of("llama")
        sides = ("--positive", world / "pos.jsonl", "--negative", world / "neg.jsonl")
        for method, more in (("caa", ("--layer", 1)), ("latent_difference", ("--sae", sae))):
            done = self.made("--method", method, "--model", model, *sides, *more, "--out",
                             world / method, "--json")  # fmt: skip
            assert done.exit_code == 0, done.output
            assert json.loads(done.stdout)["figures"]["norms"]["residual"] > 0
        done = self.made("--method", "random", "--like", world / "caa", "--out", world / "r")
        assert done.exit_code == 0, done.output

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (("--method", "decoder", "--latent", "3"), 2, "needs --sae"),
            (("--method", "sae_ts"), 2, "needs --effects and --latent"),
            (("--method", "caa", "--model", "x"), 2, "needs --layer"),
            (("--method", "nonsense"), 2, "vector.method"),
            (
                ("--method", "caa", "--layer", "1", "--model", "x", "--hook-point", "foo"),
                2,
                "vector.hook_point",
            ),
            (
                ("--method", "caa", "--layer", "1", "--model", "x", "--export", "v.txt"),
                2,
                "not as v.txt",
            ),
        ],
    )
    def test_what_is_missing_is_named(self, world, words, code, message):
        done = self.made(*words, "--out", world / "x")
        assert done.exit_code == code
        assert message in done.output

    def test_one_side_of_a_contrast_is_refused_with_both_counts(self, world):
        done = self.made("--method", "caa", "--layer", 1, "--model", tiny_models.folder_of("llama"),
                         "--positive", world / "pos.jsonl", "--out", world / "x")  # fmt: skip
        assert done.exit_code == 3
        assert "2 positive and 0 negative" in done.output

    def test_a_latent_out_of_range_is_named(self, world):
        done = self.made("--method", "decoder", "--sae", world / "sae", "--latent", 48, "--out",
                         world / "x")  # fmt: skip
        assert done.exit_code == 2
        assert "latent 48 does not exist" in done.output

    def test_a_place_that_holds_no_vector_is_refused_before_the_model_is_read(self, world):
        done = self.made("--method", "caa", "--layer", 1, "--model", "nowhere", "--out", "v.json")
        assert done.exit_code == 2
        assert "not as v.json" in done.output

    def test_a_random_one_is_none_of_those_of_a_comparison(self, world):
        drawn = random_vector(D, SITE, seed=0)
        assert not torch.equal(drawn.values, random_vector(D, SITE, seed=0, draw=1).values)
        assert not (world / "x").exists()
