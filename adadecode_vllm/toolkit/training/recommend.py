# SPDX-License-Identifier: Apache-2.0
"""Options of the engine that suit trained heads, from what they do on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adadecode_vllm.config import DEFAULT_CAP
from adadecode_vllm.heads.io import HeadsTensors
from adadecode_vllm.toolkit.states.cache import StateSource, first_texts
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.training.exit_sets import (
    MOST_EXITS,
    PROBE_TOKENS,
    Choice,
    ExitSets,
)

ACCEPTANCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Probabilities of acceptance from which on a set of exits may draft."""


@dataclass(frozen=True)
class Recommendation:
    """What to serve heads with.

    Attributes:
        options: Of the engine, as `recommended` in the heads' configuration has them.
        choice: The exits among them, and what the formula says of them.
    """

    options: dict[str, Any]
    choice: Choice

    @property
    def sentence(self) -> str:
        """The same for a person."""
        exits = ", ".join(map(str, self.choice.exit_layers))
        return (
            f"Recommended for serving: exits {exits} with the policy cost (by the "
            f"formula {self.choice.speedup:.2f}x on the held-out text)"
        )


def recommend(
    teacher: Teacher,
    tensors: HeadsTensors,
    source: StateSource,
    calibration: Mapping[str, Mapping[str, float]],
    *,
    drafts: int,
    max_draft_tokens: int,
) -> Recommendation:
    """Choose among the trained exits.

    The policy is `cost`: it drafts as far as a draft probably pays on the machine that
    serves. What stands in for it here is the best one of several thresholds on the
    calibrated probability of acceptance. Exits are added one at a time.

    Args:
        teacher: The model.
        tensors: The heads; their ranking holds the tokens that gates will look at.
        source: States of held-out text.
        calibration: By exit, `slope` and `intercept` of its acceptance.
        drafts: Drafts of a cycle that heads with memory are trained on.
        max_draft_tokens: The cap.

    Returns:
        The fastest, by the cost formula.
    """
    weights = tensors.weights
    heads = {
        layer: (weight, None if tensors.memory is None else tensors.memory[layer])
        for layer, weight in weights.items()
    }
    sets = ExitSets(
        teacher,
        source,
        first_texts(source, PROBE_TOKENS),
        heads,
        drafts=drafts,
        draft_token_ids=tensors.draft_token_ids,
        max_draft_tokens=max_draft_tokens,
    )
    gates = [_least(acceptance, calibration) for acceptance in ACCEPTANCES]

    def best(candidates: Iterable[tuple[int, ...]]) -> Choice:
        rated = (sets.rate(exits, least) for exits in candidates for least in gates)
        return max(rated, key=lambda choice: choice.speedup)

    choice = best((layer,) for layer in weights)
    while len(choice.exit_layers) < min(MOST_EXITS, len(weights)):
        others = weights.keys() - choice.exit_layers
        grown = best(tuple(sorted((*choice.exit_layers, k))) for k in sorted(others))
        if grown.speedup <= choice.speedup:
            break
        choice = grown
    # The engine's defaults are left to the engine, whose next version may know better.
    options: dict[str, Any] = {"exit_layers": list(choice.exit_layers)}
    if max_draft_tokens != DEFAULT_CAP:
        options["max_early_predictions"] = max_draft_tokens
    return Recommendation(options, choice)


def _least(
    acceptance: float, calibration: Mapping[str, Mapping[str, float]]
) -> dict[int, float]:
    """By exit, the log-odds from which on it is right with a probability."""
    wanted = float(np.log(acceptance / (1 - acceptance)))
    least = {}
    for layer, row in calibration.items():
        slope, above = row["slope"], wanted - row["intercept"]
        if slope:
            least[int(layer)] = above / slope
        else:  # as sure of every token as of any other
            least[int(layer)] = -np.inf if above < 0 else np.inf
    return least
