# SPDX-License-Identifier: Apache-2.0
"""From an exit's confidence to the probability that its prediction is accepted.

At temperature 0 an early prediction is accepted when it is the final layer's top token,
which can be likely although the exit gives it a low probability: the model itself may
be unsure and the two agree. A logistic map of the head's log-odds, two numbers an exit,
is monotone, so that thresholding the mapped value is thresholding the probability at
another place and costs nothing when decoding.
"""

from __future__ import annotations

import numpy as np

# A prior of one wrong and one right token far out, so that exits that are always right
# on the held-out text get a finite map.
_RIDGE = 1e-3
_ITERATIONS = 50


def fit_logistic(log_odds: np.ndarray, agreed: np.ndarray) -> tuple[float, float]:
    """Fit ``P(agreed) = sigmoid(slope * log_odds + intercept)`` with slope >= 0.

    Args:
        log_odds: (n,) float.
        agreed: (n,) bool.

    Returns:
        Slope and intercept. A slope that would be negative is 0.
    """
    log_odds = np.asarray(log_odds, np.float64)
    mean, scale = log_odds.mean(), log_odds.std() + 1e-9
    design = np.array([(log_odds - mean) / scale, np.ones(len(log_odds))]).T
    target = np.asarray(agreed, np.float64)
    weight, intercept = _newton(design, target)
    if weight < 0:
        weight, (intercept,) = 0.0, _newton(design[:, 1:], target)
    slope = weight / scale
    return float(slope), float(intercept - slope * mean)


def _newton(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Newton's method for ridge-penalised logistic regression."""
    count = len(target)
    weights = np.zeros(design.shape[1])
    penalty = _RIDGE * np.eye(design.shape[1])
    for _ in range(_ITERATIONS):
        probability = sigmoid(design @ weights)
        gradient = design.T @ (probability - target) / count + penalty @ weights
        curvature = probability * (1 - probability)
        hessian = (design * curvature[:, None]).T @ design / count + penalty
        step = np.linalg.solve(hessian, gradient)
        # Bounded, because a nearly separable set has a flat likelihood.
        step *= min(1.0, 5.0 / (np.abs(step).max() + 1e-12))
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Logistic function, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(values, np.float64)))


def reliability(
    probability: np.ndarray, agreed: np.ndarray, bins: int = 15
) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error over bins of equal width.

    Args:
        probability: (n,) claimed probability of being right.
        agreed: (n,) bool, whether it was.
        bins: Number of bins.

    Returns:
        The error, and mean confidence, accuracy and count of each bin that has tokens.
    """
    index = np.minimum((np.asarray(probability) * bins).astype(int), bins - 1)
    table, error = [], 0.0
    for number in range(bins):
        chosen = index == number
        count = int(chosen.sum())
        if not count:
            continue
        confidence = float(np.mean(probability[chosen]))
        accuracy = float(np.mean(agreed[chosen]))
        error += count * abs(confidence - accuracy)
        table.append({"confidence": confidence, "accuracy": accuracy, "count": count})
    return error / max(1, len(agreed)), table
