# SPDX-License-Identifier: Apache-2.0
"""How right and how sure each exit is, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adadecode_vllm.toolkit.evaluation.calibration import reliability, sigmoid
from adadecode_vllm.toolkit.evaluation.unrolled import stretches
from adadecode_vllm.toolkit.states.cache import StateSource

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class ExitMeasure:
    """One exit on n tokens; with memory, on every token as each draft of a cycle.

    Attributes:
        token: (n,) int64, the head's top token, of those that gates look at.
        log_odds: (n,) float64, log(p / (1 - p)) of its probability p.
        agreed: (n,) bool, whether it is the final layer's top token.
        kl: (n,) float64, KL(final || exit) in nats.
        draft: (n,) int64, the number of the draft within its cycle, from 0.
    """

    token: np.ndarray
    log_odds: np.ndarray
    agreed: np.ndarray
    kl: np.ndarray
    draft: np.ndarray

    @property
    def agreement_by_draft(self) -> list[float]:
        """Share of tokens that agreed, by draft."""
        drafts = range(int(self.draft.max()) + 1)
        return [float(self.agreed[self.draft == number].mean()) for number in drafts]

    @property
    def probability(self) -> np.ndarray:
        """(n,) float64, the top token's probability."""
        return sigmoid(self.log_odds)


@torch.inference_mode()
def read_exit(
    hidden: torch.Tensor, weight: torch.Tensor | None, lm_head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and log-odds of an exit head.

    Args:
        hidden: (n, d), residual stream after the final norm.
        weight: T of shape (d, d), a full-size head (V, d), or None for the identity.
        lm_head: (V, d).

    Returns:
        (n, V) float32 logits, and (n,) float32 log-odds of their top token.
    """
    head = lm_head
    if weight is not None:
        weight = weight.to(hidden.dtype)
        if weight.shape[0] == lm_head.shape[0] != weight.shape[1]:
            head = weight
        else:
            hidden = hidden @ weight.T
    logits = (hidden @ head.T).float()
    return logits, _top_log_odds(logits)


def _top_log_odds(logits: torch.Tensor) -> torch.Tensor:
    """(n,) log-odds of the top token of (n, V) logits."""
    top, token = logits.max(-1, keepdim=True)
    others = logits.scatter(-1, token, -torch.inf).logsumexp(-1)
    return top[:, 0] - others


@torch.inference_mode()
def measure(
    weights: Mapping[int, torch.Tensor],
    source: StateSource,
    lm_head: torch.Tensor,
    *,
    memory: Mapping[int, torch.Tensor] | None = None,
    drafts: int = 1,
    draft_token_ids: torch.Tensor | None = None,
    chunk_tokens: int = 512,
    batch: int = 32,
    advance: Callable[[int], None] = lambda texts: None,
) -> dict[int, ExitMeasure]:
    """Compare every exit with the final layer on all tokens of a source.

    Args:
        weights: By exit, T or a full-size head.
        source: States of the texts.
        lm_head: (V, d).
        memory: By exit, U; None for heads without memory.
        drafts: Drafts of a cycle that heads with memory are asked for.
        draft_token_ids: (m,) int64, the tokens that gates look at, two or more; None
            for all. The divergence is over all tokens in any case.
        chunk_tokens: Tokens whose distributions are in memory at a time.
        batch: Texts read at a time.
        advance: Called with how many further texts were measured.

    Returns:
        By exit, what was found.
    """
    parts: dict[int, list[tuple[torch.Tensor, ...]]] = {layer: [] for layer in weights}
    if memory is None:
        drafts = 1
    if draft_token_ids is not None:
        draft_token_ids = draft_token_ids.to(lm_head.device)
    for first in range(0, len(source), batch):
        indices = range(first, min(first + batch, len(source)))
        states = source.states(list(indices))
        by_layer = dict(zip(source.layers, states, strict=True))
        lengths = source.lengths(list(indices))
        for stretch in stretches(states[-1], lengths, chunk_tokens, drafts):
            final = (states[-1][stretch.chosen] @ lm_head.T).float()
            top, log_target = final.argmax(-1), final.log_softmax(-1)
            target = log_target.exp()
            for layer, weight in weights.items():
                inputs = by_layer[layer][stretch.wide]
                if memory is None:
                    hidden, matrix = [inputs], weight
                else:
                    matrices = weight.to(inputs.dtype), memory[layer].to(inputs.dtype)
                    hidden, matrix = stretch.outputs(inputs, *matrices, drafts)[0], None
                for draft in range(drafts):
                    kept = stretch.drafts(draft)
                    logits, log_odds = read_exit(
                        hidden[draft][stretch.lead :][kept], matrix, lm_head
                    )
                    log_probs = logits.log_softmax(-1)
                    kl = (target[kept] * (log_target[kept] - log_probs)).sum(-1)
                    if draft_token_ids is not None:
                        logits = logits[:, draft_token_ids]
                        log_odds = _top_log_odds(logits)
                    # Not argmax, which orders equal logits in another way: 16-bit
                    # logits often are equal, and the maps were fitted like this.
                    token = logits.topk(2, dim=-1).indices[:, 0]
                    if draft_token_ids is not None:
                        token = draft_token_ids[token]
                    number = torch.full_like(token, draft)
                    row = (token, log_odds, token == top[kept], kl, number)
                    parts[layer].append(row)
        advance(len(indices))
    measures = {}
    for layer, rows in parts.items():
        columns = [
            torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True)
        ]
        measures[layer] = ExitMeasure(
            token=columns[0],
            log_odds=columns[1].astype(np.float64),
            agreed=columns[2],
            kl=columns[3].astype(np.float64),
            draft=columns[4],
        )
    return measures


def summarize(
    found: ExitMeasure,
    calibration: tuple[float, float] | None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, Any]:
    """One exit's row of the report.

    Args:
        found: The measure.
        calibration: Slope and intercept of the map to the probability of acceptance.
        thresholds: Where coverage and precision are given.

    Returns:
        ``agreement``, of the first draft of a cycle, ``kl``, ``thresholds``,
        ``reliability`` and, where there are several drafts, ``agreement_by_draft``.
    """
    probability = found.probability
    error, bins = reliability(probability, found.agreed)
    row: dict[str, Any] = {
        "agreement": found.agreement_by_draft[0],
        "kl": float(found.kl.mean()),
        "thresholds": [
            {
                "threshold": threshold,
                "coverage": float((probability > threshold).mean()),
                "precision": _precision(probability > threshold, found.agreed),
            }
            for threshold in thresholds
        ],
        "reliability": {
            "probability": {"ece": error, "bins": bins},
            "acceptance": None,
        },
    }
    if len(found.agreement_by_draft) > 1:
        row["agreement_by_draft"] = found.agreement_by_draft
    if calibration is not None:
        slope, intercept = calibration
        acceptance = sigmoid(slope * found.log_odds + intercept)
        error, bins = reliability(acceptance, found.agreed)
        row["reliability"]["acceptance"] = {"ece": error, "bins": bins}
    return row


def equal_acceptance(
    measures: Mapping[int, ExitMeasure],
    calibrations: Mapping[int, tuple[float, float]],
    precisions: Sequence[float] = (0.8, 0.85, 0.9, 0.95, 0.98, 0.99),
) -> list[dict[str, Any]]:
    """Coverage of the two gates where they are equally often right.

    One threshold serves all exits, as in the engine. A token is covered by the first
    exit that is confident. For one exit alone both gates have the same order of tokens;
    they differ in how they weigh the exits against each other.

    Args:
        measures: By exit.
        calibrations: By exit, slope and intercept.
        precisions: Shares of right predictions to reach at least.

    Returns:
        For each precision the largest coverage of either gate, None out of reach.
    """
    layers = sorted(measures)
    claims = {
        "probability": {layer: measures[layer].probability for layer in layers},
        "acceptance": {
            layer: sigmoid(
                calibrations[layer][0] * measures[layer].log_odds
                + calibrations[layer][1]
            )
            for layer in layers
        },
    }
    curves = {
        gate: [_first_exit(claim, measures, threshold) for threshold in _FINE]
        for gate, claim in claims.items()
    }
    table = []
    for precision in precisions:
        row: dict[str, Any] = {"precision": precision}
        for gate, curve in curves.items():
            reached = [cover for cover, right in curve if cover and right >= precision]
            row[f"coverage_{gate}"] = max(reached, default=None)
        table.append(row)
    return table


_FINE = (*(i / 40 for i in range(2, 38)), *(i / 200 for i in range(190, 200)), 0.999)


def _first_exit(
    claims: Mapping[int, np.ndarray],
    measures: Mapping[int, ExitMeasure],
    threshold: float,
) -> tuple[float, float]:
    """Coverage and precision when each token is taken at the first confident exit."""
    first = next(iter(measures.values()))
    open_tokens = np.ones(len(first.agreed), bool)
    covered = right = 0
    for layer in sorted(measures):
        fires = open_tokens & (claims[layer] > threshold)
        covered += int(fires.sum())
        right += int((fires & measures[layer].agreed).sum())
        open_tokens &= ~fires
    return covered / len(open_tokens), right / max(1, covered)


def _precision(fires: np.ndarray, agreed: np.ndarray) -> float | None:
    return float(agreed[fires].mean()) if fires.any() else None
