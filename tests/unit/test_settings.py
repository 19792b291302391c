# SPDX-License-Identifier: Apache-2.0
"""What a running engine makes of its options and of its requests' own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from adadecode_vllm.config import AdaDecodeConfig, parse_config
from adadecode_vllm.engine.settings import Settings
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import ExitHeadsConfig, load_heads_config
from adadecode_vllm.heads.config import ExitCalibration
from adadecode_vllm.request_options import (
    ENGINES,
    NOTHING,
    RequestOptions,
    max_draft_tokens,
)
from tests.harness import HEADS

EXITS = [2, 4, 8]


def config(**options: Any) -> AdaDecodeConfig:
    return parse_config({"heads": HEADS, "exit_layers": EXITS, **options})


def settings(threshold: float = 0.75, **options: Any) -> Settings:
    resolved = config(threshold=threshold, **options)
    return Settings(resolved, load_heads_config(HEADS))


def ask(**options: Any) -> RequestOptions:
    return RequestOptions(**options)


def test_caps_of_a_mixed_batch() -> None:
    batch = [
        ENGINES,
        ask(enabled=False),
        ask(threshold=1),
        ask(threshold=0.5),
        ask(max_early_predictions=2),
    ]

    def caps(threshold: float, most: int) -> Any:
        found = settings(threshold).caps(batch, len(batch), most)
        return None if found is None else found.tolist()

    assert caps(0.75, 5) == [5, 0, 0, 5, 2]
    # The scheduler's bound holds for all, and an engine that never predicts does for
    # those that ask.
    assert caps(0.75, 1) == [1, 0, 0, 1, 1]
    assert caps(1.0, 5) == [0, 0, 0, 5, 0]
    assert caps(0.75, 0) is None


def test_caps_where_nobody_asks() -> None:
    caps = settings().caps(None, 3, 2)
    assert caps is not None
    assert caps.tolist() == [2, 2, 2]
    assert settings().caps(None, 3, 0) is None
    assert settings(1.0).caps(None, 3, 5) is None


def test_who_drafts_by_ngram_lookup() -> None:
    batch = [ENGINES, ask(ngram="tail"), ask(ngram="off"), ask(ngram="first")]
    assert settings().lookups(None, 2) is None
    assert settings(ngram="tail").lookups(None, 2) == ["tail", "tail"]
    assert settings().lookups(batch, 4) == ["off", "tail", "off", "first"]
    assert settings().lookups([ENGINES, ask(ngram="off")], 2) is None
    running = settings(ngram="first")
    assert running.lookups(batch, 4) == ["first", "tail", "off", "first"]
    running.configure({"ngram": "off"})
    assert running.lookups(None, 2) is None


def test_ngram_drafts_need_no_exit() -> None:
    """At threshold 1 they are all there is."""
    caps = settings(1.0, ngram="tail").caps(None, 2, 5)
    assert caps is not None
    assert caps.tolist() == [5, 5]
    batch = [ask(ngram="tail"), ENGINES, ask(ngram="tail", enabled=False)]
    found = settings(1.0).caps(batch, 3, 5)
    assert found is not None
    assert found.tolist() == [5, 0, 0]


def test_thresholds_of_a_mixed_batch() -> None:
    running = settings()
    assert running.thresholds(None) is None
    assert running.thresholds([ENGINES, ask(enabled=False)]) is None
    found = running.thresholds([ENGINES, ask(threshold=0.5)])
    assert np.array_equal(found, [[0.75] * 3, [0.5] * 3])


def test_options_are_forgotten_with_the_request() -> None:
    running = settings()
    running.admit("a", None)
    running.admit("b", SamplingParams(extra_args={"other": 1}))
    assert running.options(["a", "b"]) == [NOTHING, ENGINES]
    running.admit("a", SamplingParams(extra_args={"adadecode_threshold": 0.5}))
    found = running.options(["b", "a"])
    assert found is not None
    assert found[0] is ENGINES
    assert found[1].threshold == 0.5
    running.forget({"a"})
    assert running.options(["a", "b"]) is None
    # A front door without the plugin may let anything in.
    running.admit("b", SamplingParams(extra_args={"adadecode_threshold": 9}))
    assert running.options(["b"]) is None


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.1},
        {"logit_bias": {3: 1.0}},
        {"logprobs": 1, "logprob_token_ids": [3]},
        {"thinking_token_budget": 4},
        {"temperature": 0.5, "seed": 3},
    ],
)
def test_what_vllm_cannot_verify_gets_no_drafts(options: dict[str, Any]) -> None:
    params = SamplingParams(**options, extra_args={"adadecode_threshold": 0.1})
    running = settings()
    running.admit("a", params)
    assert running.options(["a", "b"]) == [NOTHING, ENGINES]
    assert max_draft_tokens(params, config()) == 0


def test_a_seed_keeps_drafts_from_what_is_sampled_alone() -> None:
    most = config().max_early_predictions
    for params, drafts in (
        (SamplingParams(temperature=1.0, seed=0), 0),
        (SamplingParams(temperature=0, seed=0), most),
        (SamplingParams(temperature=1.0), most),
        (SamplingParams(temperature=1.0, seed=-1), most),  # none, says vLLM
    ):
        assert max_draft_tokens(params, config()) == drafts


@pytest.mark.parametrize(
    "options",
    [{"thinking_token_budget": 4}, {"logprobs": 1, "logprob_token_ids": [3]}],
)
def test_a_session_whose_next_turn_needs_no_plain_steps(
    options: dict[str, Any],
) -> None:
    running = settings()
    running.admit("a", SamplingParams(**options))
    running.admit("b", SamplingParams())
    assert running.forbid_drafts(["a", "b"])
    assert not running.forbid_drafts(["b"])
    running.admit("a", SamplingParams())
    assert not running.forbid_drafts(["a", "b"])
    assert running.options(["a", "b"]) is None


def test_max_draft_tokens_of_a_request() -> None:
    def most(**asked: Any) -> int:
        extra_args = {f"adadecode_{name}": value for name, value in asked.items()}
        params = SamplingParams(extra_args=extra_args)
        return max_draft_tokens(params, config(threshold=1.0))

    cap = config().max_early_predictions
    assert most() == most(threshold=0.5) == cap
    assert most(max_early_predictions=2) == 2
    assert most(enabled=False) == most(threshold=1) == 0
    assert most(max_early_predictions=0) == 0


def test_nothing_is_read_from_heads_that_are_gone(tmp_path: Path) -> None:
    """Not for a request's own threshold, nor for a change of the engine's."""
    heads = tmp_path / "heads"
    shutil.copytree(HEADS, heads)
    description = load_heads_config(heads)
    resolved = config(heads=str(heads), gate="acceptance")
    running = Settings(resolved, description)
    shutil.rmtree(heads)
    own = description.thresholds("acceptance", 0.4, EXITS)
    assert len(set(own)) == len(EXITS), "calibrated exit by exit"
    found = running.thresholds([ENGINES, ask(threshold=0.4)])
    assert np.array_equal(found, [running.policy.thresholds, own])
    running.configure({"threshold": 0.4, "last_guess": True})
    assert running.policy.thresholds == own
    running.configure({"gate": "probability"})
    assert running.policy.thresholds == [0.4] * 3


def calibrated(intercept: float) -> ExitHeadsConfig:
    one = ExitCalibration(slope=1.0, intercept=intercept, tokens=1)
    exits = dict.fromkeys(map(str, EXITS), one)
    return load_heads_config(HEADS).model_copy(update={"calibration": exits})


def test_engines_with_other_heads_at_the_same_path() -> None:
    """One after the other in the same process, the directory changed in between."""
    resolved = config(gate="acceptance")
    first = Settings(resolved, calibrated(0.0))
    second = Settings(resolved, calibrated(1.0))
    before = first.thresholds([ask(threshold=0.5)])
    after = second.thresholds([ask(threshold=0.5)])
    assert np.allclose(before, 0.5)
    assert np.allclose(after, 1 / (1 + np.exp(1.0)))
    assert np.array_equal(first.thresholds([ask(threshold=0.5)]), before)


def test_what_cannot_be_changed_changes_nothing() -> None:
    uncalibrated = load_heads_config(HEADS).model_copy(update={"calibration": None})
    running = Settings(config(), uncalibrated)
    before = running.policy
    for options, sentence in (
        ({"gate": "acceptance"}, "the heads are not calibrated"),
        ({"max_early_predictions": 9}, "reserved room for 8"),
        ({"threshold": 2}, "threshold = 2 is refused"),
        ({"heads": "H"}, "heads cannot be changed"),
    ):
        with pytest.raises(AdaDecodeError, match=sentence):
            running.configure(options)
        assert running.policy is before
    running.configure({"threshold": 0.5})
    assert running.policy.thresholds == [0.5] * 3


def test_a_threshold_that_is_set_decides_in_place_of_costs() -> None:
    heads = load_heads_config(HEADS)
    running = Settings(parse_config({"heads": HEADS, "exit_layers": EXITS}), heads)
    assert running.by_costs
    running.configure({"max_early_predictions": 2})
    assert running.by_costs
    running.configure({"threshold": 0.5})
    assert not running.by_costs
    assert running.policy.thresholds == [0.5] * 3
    running.configure({"threshold": 0.75, "policy": "cost"})
    assert running.by_costs
    assert running.policy.thresholds == [0.75] * 3


def test_costs_that_nobody_measures_cannot_decide() -> None:
    """The scheduler times steps only where costs decide from the start."""
    running = settings(0.5)
    with pytest.raises(AdaDecodeError, match="started with thresholds"):
        running.configure({"policy": "cost"})
    assert not running.by_costs
    running.configure({"policy": "threshold", "threshold": 0.4})
    assert running.policy.thresholds == [0.4] * 3
