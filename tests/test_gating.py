from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from saefty import fsio
from saefty.gating import (
    Condition,
    Silencer,
    conditions,
    match_controls,
    measure_gating,
    reply_under,
)
from saefty.models.base import ModelAdapter
from saefty.records import Example, Site
from saefty.silencing import GateResult
from saefty.silencing_report import gate_section


def test_a_control_is_the_nearest_in_activity_that_does_not_track_harm():
    activity = np.array([8.0, 7.0, 9.0, 1.0, 0.0, 2.0])
    auroc = np.array([0.9, 0.8, 0.55, 0.5, 0.5, 0.45])
    # Latent 1 tracks harm too, latent 4 is silent: 0 -> 2, then the nearest left of 1 is 5.
    assert match_controls([0, 1], activity, auroc) == [2, 5]


def test_there_are_no_more_controls_than_neutral_latents():
    assert match_controls([0, 1], np.array([1.0, 1.0, 1.0]), np.array([0.9, 0.9, 0.5])) == [2]


def test_all_there_are_make_the_last_count():
    found = conditions([5, 6, 7], [1, 2, 3], [1, 8, 16])
    assert [len(one.latents) for one in found] == [0, 1, 1, 3, 3]


def test_every_arm_runs_at_each_count_it_has_latents_for():
    found = conditions([5, 6, 7, 8], [1, 2], [4, 2, 2])
    assert [(one.arm, one.latents) for one in found] == [
        ("target", ()),
        ("target", (5, 6)),
        ("control", (1, 2)),
        ("target", (5, 6, 7, 8)),
    ]


class WordJudge:
    """Scores 1 where a word stands in the reply, NaN for an empty reply."""

    def __init__(self, word):
        self.word = word

    def score(self, prompts, replies):
        return np.array([float(self.word in r) if r else np.nan for r in replies])


PROMPTS = [Example(id=str(i), prompt="p", label=i < 2) for i in range(4)]
HARMFUL = np.array([True, True, False, False])
NONE, ONE = Condition("target", ()), Condition("target", (3,))


def test_behaviour_is_measured_apart_for_harmful_and_harmless_prompts_and_paired():
    replies = {NONE: ["no", "no", "yes", "no"], ONE: ["yes", "no", "yes", "yes"]}
    points = measure_gating(
        PROMPTS,
        HARMFUL,
        None,
        replies,
        WordJudge("no"),
        lambda _: WordJudge("e"),
        seed=0,
        boots=200,
    )
    assert [point.harmful.rate.estimate for point in points] == [1.0, 0.5]
    assert [point.harmless.rate.estimate for point in points] == [0.5, 0.0]
    assert points[0].harmful.change is None
    assert points[1].harmful.change.estimate == -0.5
    assert points[1].harmless.change.estimate == -0.5
    assert points[1].harmful.fluency.estimate == 0.5
    assert points[1].count == 1


def test_a_reply_that_cannot_be_judged_is_missing_and_counted():
    replies = {NONE: ["no"] * 4, ONE: ["", "no", "no", "no"]}
    points = measure_gating(
        PROMPTS,
        HARMFUL,
        None,
        replies,
        WordJudge("no"),
        lambda _: WordJudge("n"),
        seed=0,
        boots=200,
    )
    assert (points[1].harmful.judged, points[1].harmful.prompts) == (1, 2)
    # One of two replies refuses and the other is missing: from half to all of them do.
    found = points[1].harmful.coverage
    assert (found.mean, found.low, found.high, found.missing) == (1.0, 0.5, 1.0, 1)
    assert points[1].harmful.fluency_coverage.missing == 1
    assert points[1].harmless.coverage.missing == 0
    assert points[1].harmful.rate.estimate == 1.0


class FakeModel(ModelAdapter):
    """Replies with the number of its call, and has no weights."""

    def __init__(self):
        self.calls = 0

    def intervene(self, site, edit):
        return nullcontext()

    def generate(self, prompts, **settings):
        self.calls += 1
        return [f"reply {self.calls}" for _ in prompts]


FakeModel.__abstractmethods__ = frozenset()


@pytest.fixture
def sae():
    from saefty.saes.base import SaeConfig

    made = SaeConfig("topk", 4, 8, 2).build()
    made.site = Site(0)
    return made


def reply(model, sae, folder: Path):
    settings = {"max_new_tokens": 2, "seed": 0, "batch_size": 4}
    return reply_under(model, Silencer.of(sae), PROMPTS, [NONE, ONE], folder, **settings)


def test_replies_on_disk_are_not_generated_again(tmp_path, sae):
    model = FakeModel()
    first = reply(model, sae, tmp_path)
    again = reply(model, sae, tmp_path)
    assert model.calls == 2
    assert again == first
    lines = fsio.read_lines(tmp_path / "target_001.jsonl")
    assert lines[0] == {"example_id": "0", "label": True, "reply": "reply 2"}


def test_replies_to_fewer_prompts_are_generated_again(tmp_path, sae):
    model = FakeModel()
    reply(model, sae, tmp_path)
    fsio.commit_text(tmp_path / "ungated.jsonl", '{"reply": "x"}\n')
    reply(model, sae, tmp_path)
    assert model.calls == 3


@pytest.mark.parametrize(("missing", "drawn"), [(0, True), (1, True), (2, False), (20, False)])
def test_the_curve_is_not_drawn_from_fewer_than_95_scores_in_100(tmp_path, caplog, missing, drawn):
    n = 40
    prompts = [Example(id=str(i), prompt="p", label=i < 20) for i in range(n)]
    full = ["no"] * n
    control = Condition("control", (4,))
    replies = {NONE: full, ONE: [""] * missing + full[missing:], control: full}
    points = measure_gating(
        prompts, np.arange(n) < 20, None, replies, WordJudge("no"), lambda _: WordJudge("n"),
        seed=0, boots=100,
    )  # fmt: skip
    gating = GateResult(tuple(points), (3,), (), "refusal", "perplexity")
    with caplog.at_level("WARNING"):
        section = gate_section(tmp_path, 1, gating, "")
    assert bool(section.figure) == drawn == bool(list(tmp_path.rglob("*.png")))
    if not drawn:
        said = f"{20 - missing} of 20 replies have a score"
        assert said in section.text
        assert said in caplog.text
        assert "refusal on harmful prompts, 1 latents silenced" in section.text
