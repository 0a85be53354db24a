"""What judging costs: estimated first, stopped before the limit."""

import pytest

from saefty.errors import ConfigError
from saefty.judges.budget import Budget, BudgetSpentError

QUESTION = [{"role": "system", "content": "a" * 300}, {"role": "user", "content": "é" * 150}]
PRICES = {"price_in": 2.0, "price_out": 8.0}


def test_an_estimate_counts_three_bytes_a_token_and_the_longest_answers():
    found = Budget(**PRICES, longest=10).estimate([QUESTION] * 5)
    assert (found.requests, found.tokens_in, found.tokens_out) == (5, 5 * (600 // 3 + 16), 50)
    assert found.usd == pytest.approx((5 * 216 * 2.0 + 50 * 8.0) / 1e6)
    assert str(found) == "5 requests, about 1,080 tokens of questions, at most about $0.0026"


def test_without_prices_there_is_no_price():
    found = Budget().estimate([QUESTION])
    assert found.usd is None
    assert "$" not in str(found)


def test_work_that_will_not_fit_is_refused_before_it_begins():
    with pytest.raises(BudgetSpentError, match="5 replies are to be judged, 0 requests were made"):
        budget = Budget(max_requests=4)
        budget.check(budget.estimate([QUESTION] * 5))
    with pytest.raises(
        BudgetSpentError, match=r"about \$0.0\d+; \$0.0000 are spent .* max_usd is 0.001"
    ):
        budget = Budget(max_usd=0.001, **PRICES)
        budget.check(budget.estimate([QUESTION] * 5))


def test_what_is_set_aside_bounds_what_a_request_can_cost():
    budget = Budget(max_usd=1.0, **PRICES, longest=10)
    # At most one token a byte, 16 more a turn, and the longest answer.
    assert budget.set_aside(QUESTION) == pytest.approx(((600 + 32) * 2.0 + 10 * 8.0) / 1e6)


def test_money_set_aside_counts_until_it_is_settled():
    most = ((600 + 32) * 2.0 + 10 * 8.0) / 1e6
    budget = Budget(max_usd=2.5 * most, **PRICES, longest=10)
    first, _ = budget.set_aside(QUESTION), budget.set_aside(QUESTION)
    with pytest.raises(BudgetSpentError, match="the next request could go beyond max_usd"):
        budget.set_aside(QUESTION)
    budget.settle(first, 100, 1)
    assert budget.usd == pytest.approx((100 * 2.0 + 8.0) / 1e6)
    budget.set_aside(QUESTION)
    assert budget.requests == 3


def test_a_question_waits_while_money_set_aside_may_come_back():
    most = ((600 + 32) * 2.0 + 10 * 8.0) / 1e6
    budget = Budget(max_usd=1.5 * most, **PRICES, longest=10)
    assert not budget.must_wait(QUESTION)
    first = budget.set_aside(QUESTION)
    assert budget.must_wait(QUESTION)
    budget.settle(first, 1, 1)
    assert not budget.must_wait(QUESTION)
    budget.release(budget.set_aside(QUESTION), charged=True)
    # Nothing will come back: it is not waited for, and refused.
    assert not budget.must_wait(QUESTION)
    with pytest.raises(BudgetSpentError):
        budget.set_aside(QUESTION)


def test_a_request_cut_off_is_counted_in_full_and_a_refused_one_for_nothing():
    budget = Budget(max_usd=1.0, **PRICES)
    aside = budget.set_aside(QUESTION)
    budget.release(aside, charged=True)
    assert budget.usd == pytest.approx(aside)
    budget.release(budget.set_aside(QUESTION), charged=False)
    assert budget.usd == pytest.approx(aside)
    assert budget.requests == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_requests": 0}, "max_requests=0: a limit is a number above 0"),
        ({"max_usd": -1.0, **PRICES}, "max_usd=-1.0: a limit"),
        ({"max_usd": float("nan"), **PRICES}, "max_usd=nan: a limit"),
        ({"max_usd": 1.0}, "a limit of money needs both prices"),
        ({"price_in": 1.0}, "needs both prices"),
        ({"price_in": -1.0, "price_out": 1.0}, "price_in=-1.0: a price"),
    ],
)
def test_limits_and_prices_that_say_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**options)
