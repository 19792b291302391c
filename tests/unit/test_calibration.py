# SPDX-License-Identifier: Apache-2.0
"""The map from confidence to acceptance."""

from __future__ import annotations

import numpy as np
import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads.config import ExitCalibration, ExitHeadsConfig
from adadecode_vllm.toolkit.evaluation.calibration import (
    fit_logistic,
    reliability,
    sigmoid,
)
from tests.tiny import FINGERPRINT


def draw(slope: float, intercept: float, n: int = 40_000) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(0)
    log_odds = generator.normal(1, 2, n)
    agreed = generator.random(n) < sigmoid(slope * log_odds + intercept)
    return log_odds, agreed


def test_recovers_the_map() -> None:
    log_odds, agreed = draw(0.7, 1.5)
    slope, intercept = fit_logistic(log_odds, agreed)
    assert slope == pytest.approx(0.7, abs=0.05)
    assert intercept == pytest.approx(1.5, abs=0.05)
    before, _ = reliability(sigmoid(log_odds), agreed)
    after, _ = reliability(sigmoid(slope * log_odds + intercept), agreed)
    assert before > 0.1
    assert after < 0.02


def test_a_falling_map_becomes_flat() -> None:
    log_odds, agreed = draw(-0.7, 0.0)
    slope, intercept = fit_logistic(log_odds, agreed)
    assert slope == 0
    assert sigmoid(np.array(intercept)) == pytest.approx(agreed.mean(), abs=0.01)


@pytest.mark.parametrize("agreed", [True, False])
def test_one_outcome_only_stays_finite(agreed: bool) -> None:
    log_odds, _ = draw(1, 0, 100)
    slope, intercept = fit_logistic(log_odds, np.full(100, agreed))
    assert np.isfinite(slope)
    assert (intercept > 0) == agreed


def test_reliability_of_known_bins() -> None:
    probability = np.array([0.1, 0.1, 0.9, 0.9])
    agreed = np.array([False, True, True, True])
    error, bins = reliability(probability, agreed, bins=2)
    assert [row["count"] for row in bins] == [2, 2]
    assert error == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)


def config(**rows: ExitCalibration) -> ExitHeadsConfig:
    return ExitHeadsConfig(
        exit_layers=[1, 3],
        hidden_size=4,
        vocab_size=8,
        num_hidden_layers=4,
        base_model="m",
        lm_head_fingerprint=FINGERPRINT,
        calibration=rows or None,
    )


def test_acceptance_thresholds_invert_the_map() -> None:
    heads = config(
        **{
            "1": ExitCalibration(slope=0.5, intercept=1.0, tokens=10),
            "3": ExitCalibration(slope=0.0, intercept=2.0, tokens=10),
        }
    )
    low, constant = heads.thresholds("acceptance", 0.75)
    log_odds = np.log(low / (1 - low))
    assert sigmoid(np.array(0.5 * log_odds + 1.0)) == pytest.approx(0.75)
    assert constant == 0.0  # always 0.88: every token passes
    assert heads.thresholds("acceptance", 0.95)[1] == 1.0  # and none here
    assert heads.thresholds("acceptance", 1.0) == [1.0, 1.0]
    assert heads.thresholds("acceptance", 0.0) == [0.0, 0.0]


def test_heads_without_calibration_are_refused() -> None:
    with pytest.raises(AdaDecodeError, match=r"gate = .*not calibrated"):
        config().thresholds("acceptance", 0.5)


def test_calibration_must_name_the_exits() -> None:
    with pytest.raises(ValueError, match="calibration"):
        config(**{"1": ExitCalibration(slope=1.0, intercept=0.0, tokens=1)})


def heads(calibration: dict[str, ExitCalibration] | None) -> ExitHeadsConfig:
    return ExitHeadsConfig(
        exit_layers=[2, 6],
        hidden_size=4,
        vocab_size=8,
        num_hidden_layers=8,
        base_model="M",
        lm_head_fingerprint=FINGERPRINT,
        calibration=calibration,
    )


def test_a_guess_must_be_right_more_often_than_it_costs() -> None:
    """Layers up to exit 6 of 8 are read for it: three quarters of a step."""
    assert heads(None).guess_threshold(6) == 0.75
    fitted = ExitCalibration(slope=0.5, intercept=1.0, tokens=100)
    threshold = heads({"2": fitted, "6": fitted}).guess_threshold(6)
    log_odds = np.log(threshold / (1 - threshold))
    assert sigmoid(0.5 * log_odds + 1.0) == pytest.approx(0.75)
    assert threshold < 0.75
