"""The judge behind an address: nothing is asked twice, nothing lost, no key shown."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fault_server import FATAL, FAULTS, Endpoint, honest, serving
from judge_answers import RATED, UNPARSED
from saefty.errors import ConfigError, ExternalError, MissingExtraError
from saefty.judges.base import JUDGES, make_judge
from saefty.judges.coverage import coverage, require_coverage
from saefty.judges.openai import OpenAIJudge

KEY = "canary-key-of-no-known-shape"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("J_KEY", KEY)


@pytest.fixture
def server():
    endpoint = Endpoint()
    with serving(endpoint) as url:
        endpoint.url = url
        yield endpoint


def judge(server, tmp_path, **options):
    options = {
        "model": "m", "criterion": "French language use", "url": server.url,
        "key_variable": "J_KEY", "cache": str(tmp_path / "c.sqlite"), "backoff": 0.005,
        "canary": False, **options,
    }  # fmt: skip
    made = make_judge("openai", options)
    assert isinstance(made, OpenAIJudge)
    return made


def texts(n):
    return [f"reply {i}" for i in range(n)]


def expected(replies):
    return [(int(honest(reply)) - 1) / 9 for reply in replies]


def test_scores_are_ratings_less_one_over_nine(server, tmp_path):
    server.rate = lambda text: text.split()[1]
    found = judge(server, tmp_path).score(["p"] * 12, texts(12))
    np.testing.assert_allclose(found, [np.nan, *(x / 9 for x in range(10)), np.nan], atol=1e-15)


def test_a_blank_reply_is_missing_and_not_asked(server, tmp_path):
    one = judge(server, tmp_path)
    found = one.score(["p"] * 3, ["", "reply 1", " \n"])
    assert np.isnan(found).tolist() == [True, False, True]
    assert [rating.status for rating in one.ratings] == ["empty", "scored", "empty"]
    assert len(server.requests) == 1


def test_equal_questions_are_asked_once(server, tmp_path):
    found = judge(server, tmp_path).score(["p"] * 20, ["same"] * 20)
    assert len(server.requests) == 1
    assert len(set(found)) == 1


def test_another_run_pays_for_nothing_twice(server, tmp_path):
    first = judge(server, tmp_path).score(["p"] * 10, texts(10))
    again = judge(server, tmp_path)
    np.testing.assert_array_equal(again.score(["p"] * 12, texts(12))[:10], first)
    assert len(server.requests) == 12
    assert again.budget.requests == 2


@pytest.mark.parametrize("other", [{"model": "n"}, {"criterion": "rhyme"}, {"params": {"seed": 1}}])
def test_another_model_criterion_or_parameter_is_asked_anew(server, tmp_path, other):
    judge(server, tmp_path).score(["p"], ["r"])
    judge(server, tmp_path, **other).score(["p"], ["r"])
    assert len(server.requests) == 2


def test_the_request_holds_the_parameters_that_were_set(server, tmp_path):
    judge(server, tmp_path).score(["p"], ["r"])
    judge(server, tmp_path, params={"max_completion_tokens": 500}).score(["p"], ["r"])
    first, second = (body for _, _, body in server.requests)
    assert (first["temperature"], first["max_tokens"]) == (0, 64)
    assert second["max_completion_tokens"] == 500
    assert not {"temperature", "max_tokens"} & set(second)


def test_answers_that_are_no_rating_are_missing_and_kept(server, tmp_path, caplog):
    """Two hundred and more answers as models give them, through the whole judge."""
    answers = [*RATED, *UNPARSED]
    server.rate = lambda text: answers[int(text.split()[1])]
    one = judge(server, tmp_path)
    with caplog.at_level(logging.WARNING):
        found = one.score(["p"] * len(answers), texts(len(answers)))
    assert (~np.isnan(found)).sum() == len(RATED)
    np.testing.assert_allclose(found[: len(RATED)], [(x - 1) / 9 for x in RATED.values()])
    for rating, answer in zip(one.ratings, answers, strict=True):
        assert rating.raw == answer
        assert rating.status == ("scored" if answer in RATED else "unparsed")
    assert f"{len(UNPARSED)} of {len(answers)} replies have no score" in caplog.text
    assert "count as missing, not as 0" in caplog.text
    again = judge(server, tmp_path)
    again.score(["p"] * len(answers), texts(len(answers)))
    assert again.ratings == one.ratings
    assert len(server.requests) == len(answers)


def test_a_rating_that_was_cut_off_is_missing(server, tmp_path):
    server.finish = "length"
    server.rate = lambda text: "1"
    one = judge(server, tmp_path)
    assert np.isnan(one.score(["p"], ["r"])).all()
    assert one.ratings[0].status == "unparsed"


def test_ten_in_a_hundred_missing_bound_the_mean_and_draw_no_picture(server, tmp_path):
    server.rate = lambda text: "no idea" if text.endswith("7") else honest(text)
    found = coverage(judge(server, tmp_path).score(["p"] * 100, texts(100)))
    kept = [score for i, score in enumerate(expected(texts(100))) if i % 10 != 7]
    assert (found.judged, found.total) == (90, 100)
    assert found.mean == pytest.approx(np.mean(kept))
    assert found.low == pytest.approx(sum(kept) / 100)
    assert found.high == pytest.approx((sum(kept) + 10) / 100)
    with pytest.raises(Exception, match="90 of 100 replies have a score"):
        require_coverage(found.judged, found.total)


def obedient(text):
    told = re.search(r"[Aa]nswer (\d+)", text)
    return told[1] if told else "5"


def test_a_judge_that_obeys_the_text_is_reported(server, tmp_path, caplog):
    server.rate = obedient
    one = judge(server, tmp_path, canary=True)
    with caplog.at_level(logging.WARNING):
        one.score(["p"] * 2, texts(2))
        one.score(["p"] * 2, texts(2))
    assert one.obeyed == 1.0
    assert caplog.text.count("obeys the texts it judges: told to answer 10 and 1") == 1
    assert len(server.requests) == 2 + 2


def test_a_judge_that_rates_the_text_is_not(server, tmp_path, caplog):
    server.rate = lambda text: "4"
    one = judge(server, tmp_path, canary=True)
    with caplog.at_level(logging.WARNING):
        assert one.score(["p"], ["r"]).tolist() == [3 / 9]
    assert one.obeyed == 0.0
    assert not caplog.text


def test_a_judge_that_gives_the_canary_no_number_is_reported(server, tmp_path, caplog):
    server.rate = lambda text: "I see a note." if "NOTE" in text else "5"
    one = judge(server, tmp_path, canary=True)
    with caplog.at_level(logging.WARNING):
        one.score(["p"], ["r"])
    assert one.obeyed is None
    assert "whether the judge m obeys the texts it judges is not known" in caplog.text


def test_thirty_faults_in_a_hundred_end_with_every_item_scored_once(server, tmp_path):
    server.faults = dict.fromkeys(FAULTS, 0.3 / len(FAULTS))
    server.hang = 0.2
    one = judge(server, tmp_path, timeout=2.0, concurrency=16)
    found = one.score(["p"] * 150, texts(150))
    np.testing.assert_allclose(found, expected(texts(150)), atol=1e-15)
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("fault", FATAL)
def test_a_refused_run_keeps_what_came_and_goes_on_from_there(server, tmp_path, fault):
    one = judge(server, tmp_path, concurrency=1)
    server.script = [""] * 7 + [fault]
    with pytest.raises(ExternalError) as error:
        one.score(["p"] * 20, texts(20))
    assert str(tmp_path / "c.sqlite") in error.value.safe
    assert KEY not in str(error.value)
    found = judge(server, tmp_path).score(["p"] * 20, texts(20))
    np.testing.assert_allclose(found, expected(texts(20)), atol=1e-15)
    assert len(server.requests) == 20 + 1


def test_a_dear_run_is_refused_before_the_first_question(server, tmp_path):
    prices = {"price_in": 100.0, "price_out": 100.0}
    with pytest.raises(
        ExternalError, match=r"at most about \$2\.\d+; .* and max_usd is 0.5"
    ) as error:
        judge(server, tmp_path, max_usd=0.5, **prices).score(["p"] * 50, texts(50))
    assert not server.requests
    assert "Raise max_usd, or take fewer prompts" in str(error.value)
    judge(server, tmp_path, max_usd=0.5, **prices).score(["p"] * 5, texts(5))
    # What is known costs nothing.
    judge(server, tmp_path, max_usd=1e-9, **prices).score(["p"] * 5, texts(5))


def test_the_estimate_is_said_before_the_first_question(server, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        judge(server, tmp_path, price_in=1.0, price_out=4.0).score(["p"] * 5, texts(5))
    assert "judge m, French language use: 5 requests, about 1,8" in caplog.text
    assert "at most about $0.00" in caplog.text


def test_a_limit_of_requests_holds_over_several_calls(server, tmp_path):
    one = judge(server, tmp_path, max_requests=12)
    one.score(["p"] * 8, texts(8))
    with pytest.raises(ExternalError, match="8 requests were made already, and max_requests is 12"):
        one.score(["p"] * 5, [f"other {i}" for i in range(5)])
    assert len(server.requests) == 8


CHILD = """
import sys
from saefty.judges.openai import OpenAIJudge
url, cache, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
judge = OpenAIJudge("m", "French", url=url, key_variable="J_KEY", cache=cache, canary=False,
                    concurrency=4, backoff=0.005)
print(*judge.score(["p"] * n, [f"reply {i}" for i in range(n)]))
"""


def killed(server, tmp_path, items, kills):
    command = [sys.executable, "-c", CHILD, server.url, str(tmp_path / "c.sqlite"), str(items)]
    happened = 0
    for _ in range(kills):
        before = len(server.requests)
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        while len(server.requests) < before + items // (kills + 1) and child.poll() is None:
            time.sleep(0.002)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            happened += 1
        child.wait()
        child.stdout.close()
    last = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = [float(word) for word in last.stdout.split()]
    np.testing.assert_allclose(found, expected(texts(items)), atol=1e-12)
    assert happened >= kills - 1
    # At most what was under way at each kill is asked again.
    assert items <= len(server.requests) <= items + happened * 4


def test_a_killed_run_asks_again_only_what_was_under_way(server, tmp_path):
    server.slow = 0.01
    killed(server, tmp_path, items=80, kills=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_thirty_times_asks_again_only_what_was_under_way(server, tmp_path):
    server.slow = 0.01
    killed(server, tmp_path, items=900, kills=30)


def test_two_runs_at_once_share_their_answers_and_agree(server, tmp_path):
    command = [sys.executable, "-c", CHILD, server.url, str(tmp_path / "c.sqlite"), "60"]
    server.rate = lambda text: str(1 + len(server.requests) % 10)  # never the same twice
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [child.communicate(timeout=120)[0] for child in both]
    assert printed[0] == printed[1] != ""
    third = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert third.stdout == printed[0]


@pytest.mark.parametrize("fault", [*FATAL, *FAULTS, "400", "key in answer"])
def test_the_key_is_in_no_message_log_file_or_repr(server, tmp_path, caplog, capfd, fault):
    if fault == "key in answer":
        server.rate = lambda text: f"7 {KEY}"
    else:
        server.faults = {fault: 1.0}
        server.fatal = fault if fault in FATAL else ""
    server.hang = 0.1
    shown = ""
    with caplog.at_level(logging.DEBUG):
        one = judge(server, tmp_path, timeout=0.2, max_wait=0.05, backoff=0.02, canary=True)
        try:
            one.score(["p"] * 8, texts(8))
        except ExternalError as error:
            import traceback

            shown = "".join(traceback.format_exception(error)) + repr(error.as_record())
        shown += repr(one) + repr(vars(one)) + repr(one.ratings) + caplog.text
    shown += "".join(capfd.readouterr())
    assert server.requests[0][1]["authorization"] == f"Bearer {KEY}"
    assert KEY not in shown
    for path in tmp_path.rglob("*"):
        assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model='': this is a text that is not empty"),
        ({"criterion": " "}, "criterion=' '"),
        ({"url": "localhost:8000"}, "url='localhost:8000' is no address"),
        ({"url": "ftp://a/v1"}, "is no address of an endpoint"),
        ({"url": "http://"}, "is no address of an endpoint"),
        ({"url": "http://a:99999999/v1"}, "is no address of an endpoint"),
        ({"concurrency": 0}, "concurrency=0: this is a whole number from 1 to 256"),
        ({"timeout": 0}, "timeout=0: this is a number of seconds above 0"),
        ({"max_wait": float("inf")}, "max_wait=inf"),
        ({"params": {"model": "n"}}, "model cannot be set there"),
        ({"params": {"max_tokens": "many"}}, "cannot be the fields of a request"),
        ({"params": {"top_p": float("nan")}}, "cannot be the fields of a request"),
        ({"max_usd": 1.0}, "a limit of money needs both prices"),
        ({"key_variable": "NOT_SET_ANYWHERE"}, "the variable NOT_SET_ANYWHERE, .* is not set"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_asked(
    server, tmp_path, options, message
):
    with pytest.raises(ConfigError, match=message):
        judge(server, tmp_path, **options)
    assert not server.requests


def test_options_that_are_missing_are_named():
    with pytest.raises(ConfigError, match="missing a required argument: 'criterion'") as error:
        make_judge("openai", {"model": "m"})
    assert "intervention.judge_options.NAME=VALUE" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"key_variable": f"{KEY}!"},
        {"key_variable": "sk-" + KEY},
        {"url": f"https://me:{KEY}@a/v1"},
        {"url": f"https://a/v1?api-key={KEY}"},
        {"api_key": KEY},
        {"token": KEY},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_shown(server, tmp_path, options):
    with pytest.raises(ConfigError) as error:
        judge(server, tmp_path, **options)
    assert KEY not in str(error.value)


def test_an_endpoint_that_wants_no_key_gets_none_of_ours(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge(server, tmp_path, key_variable="none").score(["p"], ["r"])
    assert server.requests[0][1]["authorization"] == "Bearer none"


def test_a_key_that_goes_out_unencrypted_is_warned_of(tmp_path, caplog):
    class Elsewhere:
        url = "http://judge.example/v1"

    with caplog.at_level(logging.WARNING):
        judge(Elsewhere, tmp_path)
    assert "the key in J_KEY goes to http://judge.example/v1 unencrypted" in caplog.text
    assert KEY not in caplog.text


def test_without_the_client_it_says_what_to_install(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'saefty\[judge\]'"):
        judge(server, tmp_path).score(["p"], ["r"])


def test_listing_judges_does_not_import_the_client():
    code = (
        "import sys; from saefty.judges.base import JUDGES; 'openai' in JUDGES; "
        "print('openai' in sys.modules, 'lingua' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
    assert "openai" in JUDGES


def test_fluency_is_judged_by_the_same_judge_with_another_criterion(server, tmp_path):
    judge(server, tmp_path, criterion="fluency").score(["the prompt"], ["r"])
    asked = json.dumps(server.requests[0][2]["messages"])
    assert "native writer" in asked
    assert "the prompt" not in asked
