"""Faults of an endpoint: what passes is asked again by one layer, what stays stops all at once."""

import email.utils
import logging
import signal
import threading
import time
from collections import Counter
from itertools import pairwise

import pytest

from fault_server import FATAL, FAULTS, Endpoint, honest, serving
from saefty.environment import Secret
from saefty.errors import ExternalError, MissingExtraError
from saefty.judges import endpoint as module
from saefty.judges.answers import Answer
from saefty.judges.budget import Budget
from saefty.judges.endpoint import Failure
from saefty.judges.faults import retry_after
from saefty.judges.rating import messages

KEY = "canary-of-no-known-shape"


@pytest.fixture
def server():
    endpoint = Endpoint()
    with serving(endpoint) as url:
        endpoint.url = url
        yield endpoint


def questions(n):
    return [messages("French", "p", f"text {i}") for i in range(n)]


def asking(server, **settings):
    settings = {"concurrency": 8, "timeout": 5.0, "max_wait": 20.0, "backoff": 0.005} | settings
    return module.Endpoint(server.url, "m", Secret(KEY), "J_KEY", {}, "c.sqlite", **settings)


def ask(server, n=1, budget=None, **settings):
    found: dict[int, Answer | Failure] = {}

    def answered(place, outcome):
        assert place not in found, "answered twice"
        found[place] = outcome

    try:
        asking(server, **settings).ask(questions(n), budget or Budget(), answered)
    except ExternalError as error:
        error.found = found
        raise
    return found


def test_every_question_has_its_own_answer(server):
    found = ask(server, 50)
    assert {place: answer.text for place, answer in found.items()} == {
        i: honest(f"text {i}") for i in range(50)
    }
    assert len(server.requests) == 50
    assert found[0].tokens_in == 100
    _, headers, body = server.requests[0]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert (body["model"], len(body["messages"])) == ("m", 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_asked_again_by_one_layer(server, fault):
    server.script = [fault, fault]
    found = ask(server, timeout=0.4)
    assert found[0].text == honest("text 0")
    assert len(server.requests) == 3


def test_between_tries_it_waits_twice_as_long_each_time_and_never_the_same(server):
    server.script = ["503"] * 4
    ask(server, backoff=0.05)
    times = [at for at, _, _ in server.requests]
    waits = [after - before for before, after in pairwise(times)]
    for wait, full in zip(waits, (0.05, 0.1, 0.2, 0.4), strict=True):
        assert full / 2 <= wait < full + 0.15
    endpoint = asking(server)
    drawn = {module._Asking(endpoint, [], Budget(), print)._wait(3, 0.0) for _ in range(20)}
    assert len(drawn) > 15


def test_retry_after_is_honoured_by_every_question(server):
    server.retry_after = "1"
    server.script = ["429 retry-after"]
    began = time.monotonic()
    ask(server, 8, concurrency=2)
    times = [at - began for at, _, _ in server.requests]
    assert len(times) == 9
    # Those that were on their way when it said so, and no other, come within the second.
    assert sum(at < times[0] + 1.0 for at in times) <= 3
    assert times[-1] < 4


def test_a_wait_longer_than_the_limit_stops_at_once(server):
    server.retry_after = "3600"
    server.script = ["", "429 retry-after"]
    began = time.monotonic()
    with pytest.raises(
        ExternalError, match=r"asks to wait 3,600 seconds .* max_wait is 20"
    ) as error:
        ask(server, 50, concurrency=1)
    assert time.monotonic() - began < 5
    assert len(server.requests) == 2
    assert "it asks only what is left" in error.value.then


def test_the_waiting_for_one_question_ends(server):
    server.faults = {"503": 1.0}
    began = time.monotonic()
    found = ask(server, 1, max_wait=0.5, backoff=0.05)
    assert time.monotonic() - began < 3
    assert found[0].reason.startswith("503 server_error: 503, sorry, after ")
    assert 3 <= len(server.requests) <= 6


def test_an_endpoint_that_is_down_is_not_asked_ten_thousand_questions(server):
    server.faults = {"500": 1.0}
    with pytest.raises(ExternalError, match="5 questions in a row .* had no answer; the last: 500"):
        ask(server, 10_000, max_wait=0.05, backoff=0.02)
    assert len(server.requests) < 100


def test_nobody_listening_is_said_with_the_reason():
    class Nobody:
        url = "http://127.0.0.1:9/v1"

    with pytest.raises(ExternalError, match="connection failed"):
        ask(Nobody, 20, max_wait=0.05, backoff=0.02)


@pytest.mark.parametrize("fault", FATAL)
def test_what_does_not_pass_stops_at_once_and_says_how_to_go_on(server, fault):
    server.slow = 0.01

    def break_later():
        while len(server.answered) < 20:
            time.sleep(0.002)
        server.fatal = fault

    threading.Thread(target=break_later, daemon=True).start()
    with pytest.raises(ExternalError) as error:
        ask(server, 10_000, concurrency=4)
    # Those under way when it broke, and nothing behind them.
    assert len(server.requests) - len(server.answered) <= 4 + 4
    assert len(error.value.found) >= 20
    assert all(isinstance(one, Answer) for one in error.value.found.values())
    assert "Answers that came are in the cache c.sqlite" in error.value.safe
    assert "run the same command again" in error.value.then
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401", "refuses the key in J_KEY"),
        ("403", "refuses the key in J_KEY"),
        ("402", "the quota of the key in J_KEY is spent"),
        ("insufficient_quota", "the quota of the key in J_KEY is spent"),
        ("model gone", "has no model 'm'"),
        ("model gone, 400", "has no model 'm'"),
        ("no such address", "is not the address of an OpenAI-compatible endpoint"),
    ],
)
def test_each_of_them_is_told_apart_and_asked_once(server, fault, message):
    server.fatal = fault
    with pytest.raises(ExternalError, match=message):
        ask(server, 100, concurrency=1)
    assert len(server.requests) == 1


def test_an_endpoint_that_wants_a_key_where_none_is_sent_says_so(server):
    server.fatal = "401"
    nobody = module.Endpoint(
        server.url, "m", None, "no variable", {}, "c.sqlite", 1, 5.0, 20.0, 0.005
    )
    with pytest.raises(ExternalError, match="wants a key, and none was sent: key_variable is none"):
        nobody.ask(questions(1), Budget(), lambda place, outcome: None)


def test_a_question_that_is_refused_by_itself_fails_alone(server):
    server.script = ["", "400", "", "422"]
    found = ask(server, 6, concurrency=1)
    assert [isinstance(found[i], Failure) for i in range(6)] == [0, 1, 0, 1, 0, 0]
    assert found[1].reason == "400 server_error: 400, sorry"
    assert len(server.requests) == 6


def test_a_request_that_no_question_gets_through_with_stops(server):
    """A field that the model does not take refuses every question alike."""
    server.faults = {"400": 1.0}
    with pytest.raises(ExternalError, match="5 questions in a row .* 400, sorry") as error:
        ask(server, 1000, concurrency=1)
    assert len(server.requests) == 5
    assert "the request's fields" in error.value.then


def test_no_more_questions_are_under_way_than_allowed(server):
    server.slow = 0.05
    ask(server, 12, concurrency=3)
    assert server.most_at_once == 3


def test_a_slow_endpoint_is_waited_for(server):
    server.slow = 0.4
    began = time.monotonic()
    assert len(ask(server, 8, timeout=5.0)) == 8
    assert time.monotonic() - began < 3


def test_a_spent_budget_stops_and_lets_what_is_under_way_finish(server):
    server.slow = 0.02
    with pytest.raises(ExternalError, match="11 requests were made, repeats included") as error:
        ask(server, 100, Budget(max_requests=11), concurrency=4)
    assert len(server.requests) == len(error.value.found) == 11
    assert "max_requests" in error.value.then


def test_money_is_never_spent_beyond_its_limit(server):
    budget = Budget(max_usd=0.05, price_in=5.0, price_out=15.0, longest=64)
    server.usage = (390, 60)  # nearly what a request can cost at most
    server.faults = {"503": 0.2}
    with pytest.raises(ExternalError, match="the next request could go beyond max_usd=0.05"):
        ask(server, 100, budget, concurrency=2)
    charged = sum(server.answered.values()) * (390 * 5.0 + 60 * 15.0) / 1e6
    assert budget.usd == pytest.approx(charged)
    assert 0.03 < charged <= 0.05


def test_an_answer_without_its_cost_is_counted_at_the_most_it_can_be(server):
    server.usage = None
    budget = Budget(max_usd=1.0, price_in=5.0, price_out=15.0)
    ask(server, 1, budget)
    assert budget.usd == pytest.approx(Budget(1, 1.0, 5.0, 15.0).set_aside(questions(1)[0]))


def test_ctrl_c_ends_the_asking_at_once(server):
    server.slow = 0.3
    found, signalled = {}, []

    def answered(place, outcome):
        found[place] = outcome
        if not signalled:
            signalled.append(time.monotonic())
            threading.Timer(0.4, signal.raise_signal, [signal.SIGINT]).start()

    with pytest.raises(KeyboardInterrupt):
        asking(server, concurrency=2).ask(questions(1000), Budget(), answered)
    assert time.monotonic() - signalled[0] < 10
    assert 0 < len(found) <= len(server.requests) < 100
    assert not [one for one in threading.enumerate() if one.name == "judge" and one.is_alive()]


def test_it_works_where_a_loop_of_events_is_running_already(server):
    """As in a notebook."""
    import asyncio

    async def cell():
        return ask(server, 3)

    assert len(asyncio.run(cell())) == 3


def test_an_error_of_our_own_is_not_taken_for_the_endpoint_s(server):
    def answered(place, outcome):
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        asking(server).ask(questions(20), Budget(), answered)


def test_a_refusal_of_the_model_is_its_answer(server):
    server.message = {"content": None, "refusal": "I cannot rate this."}
    assert ask(server)[0].text == "I cannot rate this."


def test_an_answer_without_content_is_empty(server):
    server.message = {"content": None}
    assert ask(server)[0].text == ""


def test_the_client_s_own_log_shows_no_key(server, caplog):
    with caplog.at_level(logging.DEBUG):
        server.script = ["500", "401"]
        with pytest.raises(ExternalError):
            ask(server)
    assert KEY not in caplog.text


def test_a_missing_client_is_said_with_what_to_install(server, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'saefty\[judge\]'"):
        ask(server)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "inf"}, 0),
        ({"retry-after": ""}, 0),
        ({"retry-after": "7", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    ],
)
def test_retry_after_is_seconds_or_nothing(headers, seconds):
    assert retry_after(headers) == seconds


def test_retry_after_may_be_a_date():
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 55 < retry_after({"retry-after": date}) <= 60


def thirty_in_a_hundred(server, n):
    server.faults = dict.fromkeys(FAULTS, 0.3 / len(FAULTS))
    server.hang = 0.2
    found = ask(server, n, concurrency=16, timeout=2.0)
    assert len(found) == n
    assert [found[i].text for i in range(n)] == [honest(f"text {i}") for i in range(n)]
    # Each was asked until it was answered, and not once more.
    assert server.answered == Counter({f"text {i}": 1 for i in range(n)})
    assert len(server.requests) > 1.3 * n
    return found


def test_with_thirty_faults_in_a_hundred_each_of_a_thousand_is_answered_once(server):
    thirty_in_a_hundred(server, 1000)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_with_thirty_faults_in_a_hundred_each_of_ten_thousand_is_answered_once(server):
    thirty_in_a_hundred(server, 10_000)
