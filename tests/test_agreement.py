"""Counting how an engine agrees with the reference, by hand."""

import math

import pytest
import torch

from gptoss_nf4.check.agreement import Agreement, Generation


def generation(*logprobs: dict[int, float]) -> Generation:
    return Generation("p", "t", list(range(len(logprobs))), 1, list(logprobs))


def test_positions_choices_and_differences_are_counted():
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]).log()
    found = Agreement()
    found.add(
        generation({}, {0: math.log(0.5), 1: -math.inf}, {0: math.log(0.5), 1: math.log(0.25)}, {2: math.log(0.7)}),
        reference,
    )
    assert (found.positions, found.agreeing) == (3, 2)
    assert found.worst_difference == pytest.approx(math.log(2))
    assert found.as_dict() == {
        "positions": 3,
        "top1_agreement": pytest.approx(2 / 3),
        "worst_logprob_difference": pytest.approx(math.log(2)),
    }
    assert [(each["prompt"], each["position"], each["same_choice"]) for each in found.by_position] == [
        ("p", 1, True),
        ("p", 2, False),
        ("p", 3, True),
    ]
    assert [each["difference"] for each in found.by_position] == pytest.approx([0, math.log(2), 0], abs=1e-6)


def test_what_the_engine_does_not_tell_is_not_counted():
    found = Agreement()
    found.add(generation({}, {}, {}), torch.zeros(3, 4))
    assert found.as_dict() == {"positions": 0, "top1_agreement": None, "worst_logprob_difference": 0.0}


def test_a_position_at_which_the_engine_lists_impossible_tokens_alone_differs_by_nothing():
    found = Agreement()
    found.add(generation({}, {0: -math.inf, 2: -math.inf}), torch.tensor([[0.5, 0.25, 0.25]]).log())
    assert found.as_dict() == {"positions": 1, "top1_agreement": 1.0, "worst_logprob_difference": 0.0}
    assert [each["difference"] for each in found.by_position] == [0.0]


def test_infinity_is_no_number_and_impossible_is_one():
    assert generation({}, {0: -math.inf, 1: -1.0}).finite
    assert not generation({}, {0: math.inf}).finite
    assert not generation({0: -1.0}, {0: math.nan}).finite
