from dataclasses import replace

import pytest
import torch

from saefty.interventions.base import INTERVENTIONS, acting_at, chosen
from saefty.models.base import Positions

# One row of five tokens: padding, BOS, two of the prompt, one of the response.
MASK = [False, True, True, True, True]
SPECIAL = [False, True, False, False, False]
RESPONSE = [False, False, False, False, True]


def positions(is_prefill=True):
    return Positions(
        mask=torch.tensor([MASK]),
        index=torch.tensor([[0, 0, 1, 2, 3]]),
        special=torch.tensor([SPECIAL]),
        response=torch.tensor([RESPONSE]),
        is_prefill=is_prefill,
    )


@pytest.mark.parametrize(
    ("where", "is_prefill", "skip_special", "expected"),
    [
        ("both", True, True, [0, 0, 1, 1, 1]),
        ("both", True, False, [0, 1, 1, 1, 1]),
        ("both", False, True, [0, 0, 1, 1, 1]),
        ("prefill", True, True, [0, 0, 1, 1, 1]),
        ("prefill", False, True, [0, 0, 0, 0, 0]),
        ("decode", True, True, [0, 0, 0, 0, 0]),
        ("decode", False, True, [0, 0, 1, 1, 1]),
        ("response", True, True, [0, 0, 0, 0, 1]),
        ("response", False, True, [0, 0, 0, 0, 1]),
        ("last", True, True, [0, 0, 0, 1, 0]),
        ("last", False, True, [0, 0, 0, 0, 0]),
        ((0, 2), True, True, [0, 0, 0, 1, 0]),
        ((0, 2), True, False, [0, 1, 0, 1, 0]),
        ((1, 3, 80), False, True, [0, 0, 1, 0, 1]),
    ],
)
def test_the_tokens_acted_on(where, is_prefill, skip_special, expected):
    found = chosen(positions(is_prefill), where, skip_special=skip_special)
    assert found.int().tolist() == [expected]


@pytest.mark.parametrize("where", ["answer", (), (-1,)])
def test_an_unknown_place_is_refused(where):
    with pytest.raises((ValueError, TypeError), match="answer|counted from 0"):
        chosen(positions(), where)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("prefill", [0, 0, 1, 0, 0]),
        ("decode", [0, 0, 0, 1, 1]),
        ("last", [0, 0, 1, 0, 0]),
        ("both", [0, 0, 1, 1, 1]),
    ],
)
def test_a_whole_pass_tells_what_the_model_wrote_from_what_it_was_given(where, expected):
    written = torch.tensor([[False, False, False, True, True]])
    whole = replace(positions(), generated=written, response=written)
    assert chosen(whole, where).int().tolist() == [expected]


def test_the_last_token_is_special_only_where_special_tokens_count():
    ends = torch.tensor([[False, True, False, True, False]])
    given = replace(positions(), special=ends)
    assert chosen(given, "last").int().tolist() == [[0, 0, 1, 0, 0]]
    assert chosen(given, "last", skip_special=False).int().tolist() == [[0, 0, 0, 1, 0]]


def test_only_the_chosen_rows_change_and_the_others_keep_their_bits():
    x = torch.randn(1, 5, 3)
    edited = acting_at(lambda rows: rows * 2, "response")(x, positions())
    assert torch.equal(edited[:, :4], x[:, :4])
    assert torch.equal(edited[:, 4], x[:, 4] * 2)


def test_rows_are_edited_in_float32_and_returned_as_they_came():
    seen = []

    def edit(rows):
        seen.append(rows.dtype)
        return rows

    x = torch.randn(1, 5, 3).bfloat16()
    edited = acting_at(edit)(x, positions())
    assert seen == [torch.float32]
    assert torch.equal(edited, x)


def test_the_activations_that_came_in_are_not_written_to():
    x = torch.zeros(1, 5, 3)
    acting_at(lambda rows: rows + 1)(x, positions())
    assert not x.any()


def test_interventions_are_found_by_name():
    known = {"gate", "subtract", "steer", "project_out", "cap", "clamp", "cap_latents"}
    assert known <= set(INTERVENTIONS)
