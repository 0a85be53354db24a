from itertools import islice

import numpy as np
import pytest
import torch

from saefty.errors import InputError, NumericError
from saefty.sandbox.planted import PlantedSource
from saefty.training_data import Cursor, held_out_rows, split_by_example, stream

ALL = np.ones(100, dtype=bool)


class Source(PlantedSource):
    """100 rows whose value is their number; ten rows an example."""

    def __init__(self, groups=None):
        super().__init__(torch.arange(100.0)[:, None].repeat(1, 2))
        self.groups = groups or {}

    def examples(self):
        return [{"group": self.groups.get(i)} for i in range(10)]


def test_no_example_is_on_both_sides():
    source = Source()
    split = split_by_example(source, 0.3, seed=0)
    example = source.rows()["example"]
    assert split.held_out.sum() == 30
    assert not set(example[split.train]) & set(example[split.held_out])
    assert (split.train ^ split.held_out).all()


def test_examples_of_a_group_stay_together():
    groups = {0: "a", 5: "a", 9: "a", 1: "b", 2: "b"}
    for seed in range(20):
        split = split_by_example(Source(groups), 0.2, seed)
        for members in ([0, 5, 9], [1, 2]):
            rows = np.isin(np.arange(100) // 10, members)
            assert len(set(split.held_out[rows])) == 1


def test_the_seed_decides_who_is_held_out():
    one, two = (split_by_example(Source(), 0.3, seed).held_out for seed in (0, 1))
    assert not np.array_equal(one, two)
    assert np.array_equal(one, split_by_example(Source(), 0.3, 0).held_out)


def test_a_share_of_zero_trains_on_all():
    split = split_by_example(Source(), 0.0, 0)
    assert split.train.all()
    assert not split.held_out.any()


def test_no_more_rows_than_asked_for_are_held_out():
    assert split_by_example(Source(), 0.9, 0, max_held_out=20).held_out.sum() == 20


def test_a_large_share_leaves_an_example_to_train_on():
    assert split_by_example(Source(), 0.999, 0).train.sum() == 10


def test_a_single_group_cannot_be_split():
    source = Source(dict.fromkeys(range(10), "all the same"))
    with pytest.raises(InputError, match=r"all 100 rows come from one example or group"):
        split_by_example(source, 0.05, 0)


def numbers(batches):
    return [(place, x[:, 0].int().tolist()) for place, x in batches]


def test_every_epoch_holds_every_row_once_in_another_order():
    batches = numbers(islice(stream(Source(), 0, 20, 7, ALL, Cursor()), 10))
    first, second = ([row for _, x in part for row in x] for part in (batches[:5], batches[5:]))
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert batches[5][0] == Cursor(1, 0)


@pytest.mark.parametrize("at", [Cursor(0, 0), Cursor(0, 3), Cursor(1, 2), Cursor(2, 0)])
def test_a_stream_continues_where_another_stopped(at):
    whole = numbers(islice(stream(Source(), 0, 20, 7, ALL, Cursor()), 15))
    rest = numbers(islice(stream(Source(), 0, 20, 7, ALL, at), 5))
    start = at.epoch * 5 + at.batch
    assert rest == whole[start : start + 5]


def test_a_small_rest_of_an_epoch_is_left_out_and_a_large_one_is_not():
    sizes = [len(x) for _, x in islice(stream(Source(), 0, 30, 0, ALL, Cursor()), 4)]
    assert sizes == [30, 30, 30, 30]
    sizes = [len(x) for _, x in islice(stream(Source(), 0, 60, 0, ALL, Cursor()), 4)]
    assert sizes == [60, 40, 60, 40]


def test_fewer_rows_than_a_batch_make_one():
    sizes = [len(x) for _, x in islice(stream(Source(), 0, 4096, 0, ALL, Cursor()), 2)]
    assert sizes == [100, 100]


def test_a_row_that_is_not_finite_is_named():
    source = Source()
    source.x[42, 1] = float("nan")
    with pytest.raises(
        NumericError, match=r"1 of the 20 rows of batch \d of epoch 0 .* rows 42 of"
    ):
        list(islice(stream(source, 0, 20, 3, ALL, Cursor()), 5))


def test_held_out_rows_come_in_order():
    keep = np.zeros(100, dtype=bool)
    keep[[3, 50, 99]] = True
    assert held_out_rows(Source(), 0, 2, keep)[:, 0].tolist() == [3, 50, 99]
    assert held_out_rows(Source(), 0, 2, ~ALL).shape == (0, 2)
