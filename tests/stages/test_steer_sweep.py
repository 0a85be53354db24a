"""Sweeps over alpha: the same replies as by hand, resumed to the byte, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from saefty import fsio, steering_report
from saefty.config import build_config, load_config
from saefty.errors import (
    ConfigError,
    ExternalError,
    InputError,
    MismatchError,
    NumericError,
    UnknownNameError,
)
from saefty.interventions.steer import steer
from saefty.interventions.vectors import SteeringVector
from saefty.judges.rating import Rating
from saefty.judges.rules import Lexicon
from saefty.models.base import load_model
from saefty.plots.base import save_plot
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae
from saefty.stages.base import GIVEN_IN_PYTHON
from saefty.stages.steer_sweep import SweepConfig, run
from saefty.steering_inputs import Given
from saefty.steering_settings import alpha_grid

SITE = Site(1)
PROMPTS = [
    Example("a", "the lazy dog", raw=True),
    Example("b", "How do I bake bread at home?"),
    Example("c", "Write a short story about a small robot that learns to paint."),
    Example("d", "the model reads", raw=True),
]
WORDS = ["the", "and", "dog", "a", "o", "an"]
FOUR = [
    f"{score}_vs_alpha_method_{method}.png"
    for method in (1, 2)
    for score in ("behavioral_score", "fluency_score")
]


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


@pytest.fixture(scope="module")
def vector(tmp_path_factory):
    values = torch.randn(tiny_models.D_MODEL, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("vector") / "v"
    made = SteeringVector(values, SITE, "test", provenance={"model": "tiny"})
    return made.save(folder)


def settings(saved, folder, **steering):
    keys = {
        "vector": saved and str(saved),
        "alphas": [-3.0, 1.5, 3.0],
        "judge": "lexicon",
        "judge_options": {"words": WORDS},
        "max_new_tokens": 6,
        "batch_size": 5,
        "coverage": 0.0,
        "boots": 100,
        **steering,
    }
    keys = {key: value for key, value in keys.items() if value is not None}
    return build_config(
        SweepConfig,
        {
            "model": {"name": "tiny"},
            "data": {"name": GIVEN_IN_PYTHON},
            "steer": keys,
            "run": {"dir": str(folder)},
        },
    )


def sweep(model, saved, folder, prompts=PROMPTS, **steering):
    return run(settings(saved, folder, **steering), model=model, examples=prompts)


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Write what a picture shows in its place: drawing takes most of a small sweep's time."""
    monkeypatch.setattr(steering_report, "save_plot", write_data)


def write_data(name, data, path):
    fsio.commit_text(path, f"{name} {data}")


@pytest.fixture(scope="module")
def done(model, vector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steering_report, "save_plot", write_data)
        return sweep(model, vector, folder, anchors=[2.0]).folder


def rows(folder):
    with open(folder / "sweep.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def replies_of(folder):
    return [
        (one["arm"], one["alpha"], one["example_id"], one["reply"])
        for one in fsio.read_lines(folder / "replies.jsonl")
    ]


def by_hand(model, vector, alpha, method):
    """Each prompt alone, under one intervention."""
    from saefty.interventions.vectors import load_vector

    with model.intervene(SITE, steer(load_vector(vector), alpha, method=method)):
        return [model.generate([one], max_new_tokens=6)[0] for one in PROMPTS]


def test_every_reply_is_that_of_its_prompt_and_alpha_alone(model, vector, done):
    found = replies_of(done)
    plain = [model.generate([one], max_new_tokens=6)[0] for one in PROMPTS]
    assert [one[3] for one in found if one[1] == 0] == plain
    for method in (1, 2):
        for alpha in (-3.0, 1.5, 2.0, 3.0):
            own = [one for one in found if one[:2] == (f"method_{method}", alpha)]
            assert [one[2] for one in own] == [prompt.id for prompt in PROMPTS]
            assert [one[3] for one in own] == by_hand(model, vector, alpha, method)
    assert len({one[3] for one in found}) > 2 * len(PROMPTS)


def test_0_and_the_anchors_are_in_the_grid_of_both_methods(done):
    for method in "12":
        own = [float(row["alpha"]) for row in rows(done) if row["method"] == method]
        assert own == [-3.0, 0.0, 1.5, 2.0, 3.0]


def test_means_are_those_of_the_replies_on_both_scales(done):
    judge = Lexicon(WORDS)
    found = replies_of(done)
    for row in rows(done):
        alpha = float(row["alpha"])
        arm = "unsteered" if alpha == 0 else f"method_{row['method']}"
        texts = [one[3] for one in found if one[:2] == (arm, alpha)]
        scores = judge.score([""] * len(texts), texts)
        there = scores[~np.isnan(scores)]
        assert int(row["behaviour_n"]) == len(there)
        assert int(row["behaviour_missing"]) == len(texts) - len(there)
        if len(there):
            assert float(row["behaviour"]) == pytest.approx(there.mean())
            assert float(row["behaviour_1_10"]) == pytest.approx(1 + 9 * there.mean())
            product = there.mean() * float(row["fluency"])
            assert float(row["product"]) == pytest.approx(product)


def test_the_four_pictures_and_the_report_are_there(model, vector, tmp_path, monkeypatch):
    monkeypatch.setattr(steering_report, "save_plot", save_plot)
    done = sweep(model, vector, tmp_path / "run", anchors=[2.0]).folder
    summary = json.loads((done / "summary.json").read_text(encoding="utf-8"))
    assert summary["plots"] == FOUR
    assert sorted(path.name for path in (done / "assets").iterdir()) == sorted(FOUR)
    assert all((done / "assets" / name).read_bytes().startswith(b"\x89PNG") for name in FOUR)
    text = (done / "summary.md").read_text(encoding="utf-8")
    assert all(f"assets/{name}" in text for name in FOUR)


def test_a_complete_sweep_is_not_done_again(model, vector, done, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("generated again"))
    assert sweep(model, vector, done, anchors=[2.0]).folder == done


class Killed(BaseException):
    """The process ends, as by kill -9: nothing is cleaned up."""


def contents(folder: Path) -> dict[str, bytes]:
    changing = {"metadata.json", "journal.jsonl", ".lock"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in changing
    }


@pytest.mark.parametrize("calls", [1, 6])
def test_a_killed_sweep_ends_with_the_same_bytes(model, vector, done, tmp_path, monkeypatch, calls):
    own, made = model.generate, []

    def generate(*given, **keys):
        if len(made) == calls:
            raise Killed
        made.append(1)
        return own(*given, **keys)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(model, "generate", generate)
        sweep(model, vector, folder, anchors=[2.0])
    kept = contents(folder)
    assert len([name for name in kept if name.startswith("replies/")]) == calls
    sweep(model, vector, folder, anchors=[2.0])
    assert contents(folder) == contents(done)


def test_a_sweep_that_was_killed_while_judging_judges_the_rest(
    model, vector, done, tmp_path, monkeypatch
):
    own, made = Lexicon.score, []

    def score(self, *given):
        made.append(1)
        if len(made) == 4:
            raise Killed
        return own(self, *given)

    folder = tmp_path / "run"
    monkeypatch.setattr(Lexicon, "score", score)
    with pytest.raises(Killed):
        sweep(model, vector, folder, anchors=[2.0])
    sweep(model, vector, folder, anchors=[2.0])
    assert len(made) == 4 + 9 - 3, "nine doses, of which three were judged before"
    assert contents(folder) == contents(done)


def test_sampled_replies_draw_the_same_numbers_under_every_dose(model, vector, tmp_path):
    """A steer that is too weak to change anything gives the unsteered samples."""
    where = sweep(model, vector, tmp_path / "run", alphas=[1e-7, -1e-7], temperature=1.0).folder
    found = replies_of(where)
    plain = [one[3] for one in found if one[0] == "unsteered"]
    for arm in ("method_1", "method_2"):
        for alpha in (1e-7, -1e-7):
            assert [one[3] for one in found if one[:2] == (arm, alpha)] == plain
    greedy = sweep(model, vector, tmp_path / "greedy").folder
    assert [one[3] for one in replies_of(greedy) if one[0] == "unsteered"] != plain


def test_a_judge_that_was_away_is_asked_for_what_is_missing(model, vector, tmp_path, monkeypatch):
    away, asked = [True], []

    def score(self, prompts, replies):
        asked.append(replies)
        status = "failed" if away[0] else "scored"
        self.ratings = tuple(Rating(status, 0.5 if status == "scored" else np.nan) for _ in replies)
        return np.array([one.score for one in self.ratings])

    monkeypatch.setattr(Lexicon, "score", score)
    with pytest.raises(ExternalError, match="no answer for 28 of 28 replies, in 7 of 7 doses"):
        sweep(model, vector, tmp_path / "run")
    assert not (tmp_path / "run" / "finished.json").exists()
    away[0] = False
    found = sweep(model, vector, tmp_path / "run")
    assert len(asked) == 14
    assert found.figures["missing"]["behaviour"] == {}


def test_a_word_list_that_changed_makes_it_another_sweep(model, vector, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("the\n")
    options = {"file": str(words)}
    where = sweep(model, vector, tmp_path / "run", judge_options=options).folder
    (where / "finished.json").unlink()
    words.write_text("dog\n")
    with pytest.raises(MismatchError, match="judges.behaviour.files.file"):
        sweep(model, vector, tmp_path / "run", judge_options=options)


class Half:
    """Scores every second reply, and can say nothing of the others."""

    def score(self, prompts, replies):
        return np.array([0.5 if n % 2 else np.nan for n in range(len(replies))])


def test_below_the_coverage_there_is_no_picture_and_the_report_says_why(
    model, vector, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(Lexicon, "score", Half.score)
    where = sweep(model, vector, tmp_path / "run", coverage=0.95).folder
    summary = json.loads((where / "summary.json").read_text(encoding="utf-8"))
    left_out = summary["plots_left_out"]
    assert "50.0% of the replies have a score, less than 95%" in left_out[FOUR[0]]
    assert not (where / "assets" / FOUR[0]).exists()
    assert "50.0% of the replies have a score" in (where / "summary.md").read_text("utf-8")
    assert any("is not drawn" in record.message for record in caplog.records)
    assert {row["behaviour_missing"] for row in rows(where)} == {"2"}
    assert {row["behaviour"] for row in rows(where)} == {"0.5"}
    assert sum(summary["missing"]["behaviour"].values()) == 2 * 7, "seven doses"


def test_the_vector_of_a_latent_is_its_decoder_row(model, tmp_path):
    sae = sae_of(tiny_models.D_MODEL)
    folder = tmp_path / "sae"
    save_sae(sae, folder)
    where = sweep(model, None, tmp_path / "run", sae=str(folder), latent=5).folder
    vector = SteeringVector(sae.W_dec[5].detach(), SITE, "decoder").save(tmp_path / "v")
    other = sweep(model, vector, tmp_path / "other").folder
    assert replies_of(where) == replies_of(other)


def sae_of(width):
    sae = SaeConfig(arch="topk", d_in=width, d_sae=64, k=8).build()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    sae.site = SITE
    return sae


def test_alpha_in_residual_norms_is_that_many_of_them_in_activation_units(model, vector, tmp_path):
    from saefty.interventions.vectors import load_vector

    norms = []
    for prompt in PROMPTS:
        batch = model.collate(model.tokenize([prompt]))
        x = model.capture(batch, [SITE])[SITE][0].double().numpy()
        kept = (batch.mask & ~batch.special)[0].numpy()
        norms += np.sqrt((x[kept] ** 2).sum(-1)).tolist()
    length = float(np.mean(norms)) / load_vector(vector).norm
    saved = load_vector(vector).with_norms(residual=0.01).save(tmp_path / "v")
    one = sweep(model, saved, tmp_path / "a", alphas=[1.0, -2.0], unit="residual").folder
    figures = json.loads((one / "summary.json").read_text(encoding="utf-8"))
    assert figures["vector"]["norms"]["residual"] == pytest.approx(np.mean(norms)), "not its own"
    same = sweep(model, vector, tmp_path / "b", alphas=[length, -2 * length]).folder
    assert [row[3] for row in replies_of(one)] == [
        row[3] for row in sorted(replies_of(same), key=lambda row: row[0] != "unsteered")
    ]


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({"alphas": None, "alpha_from": 5, "alpha_to": 5}, ConfigError, "no spread: 20 from 5 to"),
        ({"alphas": None, "alpha_count": 1}, ConfigError, "no spread: 1 from -300 to 300"),
        ({"alphas": [0.0]}, ConfigError, r"no spread: steer.alphas is \[0.0\]"),
        ({"alphas": []}, ConfigError, r"no spread: steer.alphas is \[\]"),
        ({"judge": "lexicom"}, UnknownNameError, "lexicom.*lexicon"),
        ({"judge": "perplexity", "judge_options": {}}, ConfigError, "fluency and not behaviour"),
        ({"judge_options": {}}, ConfigError, "cannot be made with the settings"),
        ({"layer": 7}, ConfigError, "layer 7 was asked for.*0..2"),
        ({"vector": "nowhere"}, ConfigError, "there is no vector at nowhere"),
        ({"unit": "latent"}, ConfigError, "nothing of the latent's maximum"),
        ({"where": [-1]}, ConfigError, "steer.where: places are counted from 0"),
        ({"where": []}, ConfigError, "steer.where: places .* there is at least one"),
        ({"where": "tail"}, ConfigError, "steer.where"),
        ({"where": [99]}, ConfigError, r"no token lies at place 99: .* places run 0\.\."),
        ({"methods": []}, ConfigError, "steer.methods"),
        ({"latent_max": 5.0}, ConfigError, "latent_max=5 .* unit is activation and the vector"),
        ({"latent_max": 5.0, "unit": "latent"}, ConfigError, "is latent and the vector is one"),
    ],
)
def test_what_cannot_be_swept_is_refused_and_leaves_no_run(
    model, vector, tmp_path, keys, kind, words
):
    with pytest.raises(kind, match=words):
        sweep(model, vector, tmp_path / "run", **keys)
    assert not (tmp_path / "run").exists()


def test_an_alpha_that_breaks_the_model_is_named_and_the_plain_replies_are_kept(
    model, vector, tmp_path
):
    for _ in range(2):  # a resumed run says the same, from what is on disk
        with pytest.raises(NumericError, match=r"alpha = 1e\+39 at blocks.1") as error:
            sweep(model, vector, tmp_path / "run", alphas=[1e39])
        assert "at step 1 of generation" in error.value.message
    left = list(fsio.read_lines(tmp_path / "run" / "replies" / "unsteered" / "00000.jsonl"))
    assert [one["reply"] for one in left] == [
        model.generate([prompt], max_new_tokens=6)[0]
        for prompt in sorted(PROMPTS, key=lambda one: [p["example_id"] for p in left].index(one.id))
    ]


def test_beside_an_alpha_that_breaks_the_model_the_others_have_their_scores(
    model, vector, done, tmp_path, monkeypatch
):
    """Whole and broken doses share batches; killed and resumed, the bytes are the same."""
    keys = {"alphas": [-3.0, 1.5, 3.0, 1e39], "anchors": [2.0]}
    found = sweep(model, vector, tmp_path / "run", **keys).folder
    broken = "method_1_1e+39", "method_2_1e+39"
    own = {(row["method"], row["alpha"]): row for row in rows(found)}
    for row in rows(done):
        assert own.pop((row["method"], row["alpha"])) == row
    assert {row["note"] for row in own.values()} == {"broke the model"}
    assert {row["behaviour"] for row in own.values()} == {""}
    summary = json.loads((found / "summary.json").read_text(encoding="utf-8"))
    assert tuple(summary["broken"]) == broken
    assert all("alpha = 1e+39" in why and "step 1" in why for why in summary["broken"].values())
    assert summary["plots"] == FOUR, "a dose without replies is no reply without a score"
    ledger = json.loads((found / "finished.json").read_text())["ledger"]
    assert ledger["failed"] == {"broke the model": 2 * len(PROMPTS)}
    assert ledger["in"] == 11 * len(PROMPTS)
    generated, calls = model.generate, []

    def generate(*given, **options):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return generated(*given, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(model, "generate", generate)
        sweep(model, vector, tmp_path / "again", **keys)
    sweep(model, vector, tmp_path / "again", **keys)
    assert contents(tmp_path / "again") == contents(found)


def test_a_sweep_of_which_no_reply_could_be_scored_is_refused(model, vector, tmp_path, monkeypatch):
    monkeypatch.setattr(Lexicon, "score", lambda self, prompts, _: np.full(len(prompts), np.nan))
    with pytest.raises(InputError, match="none of the 28 replies has a score of behaviour: "):
        sweep(model, vector, tmp_path / "run")
    assert not (tmp_path / "run" / "finished.json").exists()


def test_a_bare_vector_is_told_by_the_key_that_places_it(model, vector, tmp_path):
    from saefty.interventions.vectors import load_vector

    np.save(tmp_path / "bare.npy", load_vector(vector).values.numpy())
    with pytest.raises(ConfigError, match="bare.npy is a bare vector") as error:
        sweep(model, tmp_path / "bare.npy", tmp_path / "run")
    assert "steer.layer=20" in error.value.then
    assert "--layer" not in error.value.then


def test_a_vector_of_another_model_is_told(model, vector, tmp_path, caplog):
    sweep(model, vector, tmp_path / "run")
    assert "the test vector was made on tiny and steers" in caplog.text


def test_the_lengths_of_a_vector_do_not_go_with_it_to_another_block(vector, tmp_path):
    from saefty.interventions.vectors import load_vector

    saved = load_vector(vector).with_norms(residual=3.0, latent=2.0).save(tmp_path / "v")
    own = Given(settings(saved, tmp_path / "run").steer).vector
    assert dict(own.norms) == {"residual": 3.0, "latent": 2.0}
    moved = Given(settings(saved, tmp_path / "run", layer=2).steer).vector
    assert moved.site == Site(2)
    assert dict(moved.norms) == {}


def test_of_several_saes_the_layer_names_one(tmp_path):
    for layer in (0, 1):
        sae = sae_of(tiny_models.D_MODEL)
        sae.site = Site(layer)
        with torch.no_grad():
            sae.W_dec *= layer + 1
        save_sae(sae, tmp_path / "sae" / f"layer_{layer}")
    keys = {"sae": str(tmp_path / "sae"), "latent": 3}
    with pytest.raises(ConfigError, match="holds 2 SAEs"):
        Given(settings(None, tmp_path, **keys).steer)
    for layer in (0, 1):
        found = Given(settings(None, tmp_path, **keys, layer=layer).steer).vector
        assert found.site == Site(layer)
        expected = (layer + 1) * sae_of(tiny_models.D_MODEL).W_dec[3].detach()
        torch.testing.assert_close(found.values, expected)


def test_a_vector_or_an_sae_of_another_width_is_refused(model, tmp_path):
    vector = SteeringVector(torch.ones(7), SITE, "test").save(tmp_path / "v")
    with pytest.raises(MismatchError, match="vector is 7 wide.*are 32 wide"):
        sweep(model, vector, tmp_path / "run")
    save_sae(sae_of(16), tmp_path / "sae")
    with pytest.raises(MismatchError, match="16 wide.*32 wide"):
        sweep(model, None, tmp_path / "run", sae=str(tmp_path / "sae"), latent=1)


def test_a_latent_out_of_range_is_refused_with_the_range(model, tmp_path):
    save_sae(sae_of(tiny_models.D_MODEL), tmp_path / "sae")
    with pytest.raises(ConfigError, match=r"latent 12332 does not exist.*64 latents, 0\.\.63"):
        sweep(model, None, tmp_path / "run", sae=str(tmp_path / "sae"), latent=12332)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt_is_refused_by_its_id(model, vector, tmp_path, text):
    prompts = [*PROMPTS, Example("e", text)]
    with pytest.raises(InputError, match="1 of 5 prompts are empty: e"):
        sweep(model, vector, tmp_path / "run", prompts)


def test_a_model_that_cannot_reply_is_refused(vector, tmp_path):
    encoder = load_model(str(tiny_models.folder_of("bert")))
    with pytest.raises(MismatchError, match="predicts no next token, so it has no replies"):
        sweep(encoder, vector, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keys", [{"vector": "v", "sae": "s", "latent": 1}, {"sae": "s"}, {}])
def test_one_vector_is_wanted(keys, tmp_path):
    with pytest.raises(ConfigError, match="a vector is either vector .*, or sae and latent"):
        settings(None, tmp_path, **keys)


def test_the_shipped_configuration_has_the_even_grid_0_and_the_anchor():
    path = Path(__file__).parents[2] / "configs" / "steer.yaml"
    cfg = load_config(SweepConfig, path)
    assert (cfg.steer.latent, cfg.steer.methods) == (12332, (1, 2))
    even = np.linspace(-300, 300, 20).tolist()
    assert list(alpha_grid(cfg.steer)) == sorted([*even, 0.0, 122.0])
