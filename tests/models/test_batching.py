import pytest
from hypothesis import given
from hypothesis import strategies as st

from saefty.models.batching import plan_batches

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


def test_the_plan_of_four_items_worked_out_by_hand():
    # Longest first: 9 alone; 3 and 2 pad to 3 + 3 = 6; a third would make 9 > 6.
    assert plan_batches([2, 9, 3, 2], token_budget=6) == [[1], [2, 0], [3]]


@given(LENGTHS, st.integers(1, 80), st.integers(1, 70))
def test_every_index_occurs_once(lengths, budget, window):
    plan = plan_batches(lengths, budget, window)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 80), st.integers(1, 70))
def test_padding_counts_towards_the_budget_save_for_a_single_long_item(lengths, budget, window):
    for batch in plan_batches(lengths, budget, window):
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@given(LENGTHS, st.integers(1, 80), st.integers(1, 70))
def test_batches_do_not_cross_windows(lengths, budget, window):
    for batch in plan_batches(lengths, budget, window):
        assert len({i // window for i in batch}) == 1


def test_the_same_lengths_give_the_same_plan():
    lengths = [3, 3, 1, 7, 3, 3]
    assert plan_batches(lengths, 9) == plan_batches(list(lengths), 9)


def test_sorting_removes_nearly_all_padding():
    lengths = [5 + (i * 37) % 120 for i in range(1024)]
    plan = plan_batches(lengths, 1024, 1024)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in plan)
    assert padded / sum(lengths) < 1.03


def test_no_items_make_no_batches():
    assert plan_batches([], 10) == []


@pytest.mark.parametrize(("budget", "window"), [(0, 1), (1, 0)])
def test_a_budget_of_nothing_is_refused(budget, window):
    with pytest.raises(ValueError, match="at least 1"):
        plan_batches([1], budget, window)
