# SPDX-License-Identifier: Apache-2.0
"""The gate's policy and the counters."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.method.states import PendingStates
from adadecode_vllm.method.stats import Stats

CONFIDENCES = np.array([0.0, 0.5, 0.75, 0.7500001, 1.0], np.float32)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.0, [False, True, True, True, True]),
        (0.75, [False, False, False, True, True]),
        (1.0, [False] * 5),
    ],
)
def test_confidence_must_exceed_the_threshold(
    threshold: float, expected: list[bool]
) -> None:
    confident = ThresholdPolicy([1.0, threshold], 5).confident(1, CONFIDENCES)
    assert confident.dtype == np.bool_
    assert confident.tolist() == expected


@pytest.mark.parametrize(
    ("threshold", "can"), [(0.0, True), (0.99, True), (1.0, False)]
)
def test_at_one_drafting_is_not_even_started(threshold: float, can: bool) -> None:
    assert ThresholdPolicy([1.0, threshold], 5).can_predict is can


def test_a_request_at_one_predicts_nothing_beside_others() -> None:
    policy = ThresholdPolicy([1.0, 0.75], 5)
    assert policy.may_predict(None) is True
    assert ThresholdPolicy([1.0, 1.0], 5).may_predict(None) is False
    own = np.array([[1.0, 1.0], [0.2, 1.0], [0.75, 0.75]])
    assert np.array_equal(policy.may_predict(own), [False, True, True])


def test_an_unsure_guess_has_a_threshold_of_its_own() -> None:
    policy = ThresholdPolicy([0.75], 5, guess_threshold=0.5)
    assert policy.worth_a_guess(CONFIDENCES).tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert not ThresholdPolicy([0.75], 5).worth_a_guess(CONFIDENCES).any()


def make_stats() -> Stats:
    return Stats(exit_layers=(2, 5), num_layers=8)


def test_segments_count_tokens_times_layers() -> None:
    stats = make_stats()
    for segment, tokens in ((0, 3), (1, 4), (2, 5), (0, 1)):
        stats.count_segment(segment, tokens)
    assert stats.segments_run.tolist() == [2, 1, 1]
    assert stats.token_layers.tolist() == [(3 + 1) * 2, 4 * 3, 5 * 3]


@pytest.mark.parametrize(
    ("exits", "count", "accepted", "rejected"),
    [
        ([0, 1, 0], 3, [2, 1], [0, 0]),
        # The first contradicted draft is rejected, the later ones are neither.
        ([0, 1, 0], 2, [1, 1], [1, 0]),
        ([0, 1, 0], 1, [1, 0], [0, 1]),
        ([1, 1, 0], 0, [0, 0], [0, 1]),
        ([], 0, [0, 0], [0, 0]),
    ],
)
def test_acceptance(
    exits: list[int], count: int, accepted: list[int], rejected: list[int]
) -> None:
    stats = make_stats()
    stats.record_acceptance(np.array(exits, np.int8), count)
    assert stats.accepted.tolist() == accepted
    assert stats.rejected.tolist() == rejected


def test_acceptance_adds_up() -> None:
    stats = make_stats()
    for accepted in (0, 1, 2):
        stats.record_acceptance(np.array([0, 0], np.int8), accepted)
    assert stats.accepted.tolist() == [3, 0]
    assert stats.rejected.tolist() == [2, 0]


def test_as_plain_numbers() -> None:
    stats = make_stats()
    stats.count_segment(1, 4)
    stats.record_acceptance(np.array([1], np.int8), 1)
    stats.resumed_tokens = 3
    values = json.loads(json.dumps(stats.to_dict()))
    assert values.keys() == {field.name for field in dataclasses.fields(Stats)}
    assert values["exit_layers"] == [2, 5]
    assert values["token_layers"] == [0, 12, 0]
    assert values["accepted"] == [0, 1]
    assert values["resumed_tokens"] == 3
    assert values["drafting_seconds"] == 0.0


def test_reset() -> None:
    stats = make_stats()
    untouched = stats.to_dict()
    for name, value in untouched.items():
        if name not in ("exit_layers", "num_layers"):
            setattr(stats, name, getattr(stats, name) + 1)
            assert stats.to_dict()[name] != value
    stats.reset()
    assert stats.to_dict() == untouched


def test_two_workers_do_not_share_counters() -> None:
    first, second = make_stats(), make_stats()
    first.record_acceptance(np.array([0], np.int8), 1)
    assert second.accepted.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    """I4: hidden state and residual apart, in the model's dtype."""
    states = PendingStates(3, 4, 8, dtype, torch.device("cpu"))
    index = torch.tensor([11, 0, 5])
    hidden, residual = torch.randn(2, 3, 8).to(dtype)
    states.write(index, hidden, residual)
    backwards = index.flip(0)
    found = states.read(backwards)
    assert found[0].dtype == found[1].dtype == dtype
    assert torch.equal(found[0], hidden.flip(0))
    assert torch.equal(found[1], residual.flip(0))
    others = torch.tensor([1, 2, 3, 4, 6, 7, 8, 9, 10])
    assert not states.read(others)[0].any()
