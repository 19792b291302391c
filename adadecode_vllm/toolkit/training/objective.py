# SPDX-License-Identifier: Apache-2.0
"""Losses of exit heads and their gradients, a chunk of tokens at a time.

The gradient of a divergence from fixed targets with respect to logits is
``softmax(logits) - target``, so no graph is kept: at any time there are four (chunk, V)
float32 tensors at most. For V = 128 K and 512 tokens a chunk that is 1.1 GB, whatever
the number of tokens and exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Objective = Literal["kl", "greedy"]


@dataclass
class ExitLoss:
    """Sums over tokens for one exit.

    Attributes:
        loss: The objective, in nats.
        agreed: Tokens whose top prediction is the final layer's.
        tokens: Number of tokens.
    """

    loss: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, other: ExitLoss) -> None:
        """Add another sum."""
        self.loss += other.loss
        self.agreed += other.agreed
        self.tokens += other.tokens


def evaluate(
    weights: Mapping[int, torch.Tensor],
    states: Mapping[int, torch.Tensor],
    final: torch.Tensor,
    lm_head: torch.Tensor,
    *,
    objective: Objective,
    chunk_tokens: int,
    gradients: Mapping[int, torch.Tensor] | None = None,
) -> dict[int, ExitLoss]:
    """Compute losses and, if asked, add their gradients.

    Args:
        weights: By exit, T of shape (d, d), or a full-size head of shape (V, d).
        states: By exit, (n, d): residual stream after the final norm.
        final: (n, d): what the LM head reads.
        lm_head: (V, d), in the model's dtype.
        objective: ``kl``: KL(final || exit), the paper's; ``greedy``: cross-entropy
            against the final layer's top token.
        chunk_tokens: Tokens at a time.
        gradients: By exit, a tensor like the weight that receives the gradient of the
            *sum* over tokens; None to compute losses only.

    Returns:
        By exit, sums over the n tokens.
    """
    totals = {layer: ExitLoss() for layer in weights}
    for first in range(0, len(final), chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        teacher = _logits(final[chunk], lm_head)
        top = teacher.argmax(-1)
        log_target = teacher.log_softmax(-1)
        target = log_target.exp()
        # Sum of p log p: what KL has and cross-entropy has not.
        entropy = (target * log_target).sum().item() if objective == "kl" else 0.0
        del log_target, teacher
        for layer, weight in weights.items():
            inputs = states[layer][chunk].to(weight.dtype)
            full_size = weight.shape[0] == lm_head.shape[0] != weight.shape[1]
            head = weight if full_size else lm_head
            hidden = inputs if full_size else inputs @ weight.T
            log_probs = _logits(hidden, head).log_softmax(-1)
            agreed = int((log_probs.argmax(-1) == top).sum())
            if objective == "kl":
                loss = entropy - torch.sum(target * log_probs).item()
            else:
                loss = -log_probs.gather(1, top[:, None]).sum().item()
            totals[layer].add(ExitLoss(loss, agreed, len(top)))
            if gradients is None:
                continue
            slope = log_probs.exp_()
            if objective == "kl":
                slope -= target
            else:
                slope[torch.arange(len(top), device=top.device), top] -= 1
            if full_size:
                gradients[layer].addmm_(slope.T, inputs)
            else:
                back = (slope.to(lm_head.dtype) @ lm_head).to(weight.dtype)
                gradients[layer].addmm_(back.T, inputs)
    return totals


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(n, V) float32."""
    return (hidden.to(head.dtype) @ head.T).float()
