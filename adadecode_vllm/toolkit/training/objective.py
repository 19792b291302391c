# SPDX-License-Identifier: Apache-2.0
"""Losses of exit heads and their gradients, a chunk of tokens at a time.

The gradient of a divergence from fixed targets with respect to logits is
``softmax(logits) - target``, so no graph is kept: at any time there are four (chunk, V)
float32 tensors at most. For V = 128 K and 512 tokens a chunk that is 1.1 GB, whatever
the number of tokens and exits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from adadecode_vllm.toolkit.evaluation.unrolled import stretches

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

    @property
    def agreement(self) -> float:
        """Share of the tokens that agreed."""
        return self.agreed / max(1, self.tokens)

    def add(self, other: ExitLoss) -> None:
        """Add another sum."""
        self.loss += other.loss
        self.agreed += other.agreed
        self.tokens += other.tokens


class _Targets:
    """What a chunk of tokens shall be predicted as."""

    def __init__(
        self, final: torch.Tensor, lm_head: torch.Tensor, objective: Objective
    ) -> None:
        """Read the final layer.

        Args:
            final: (n, d), what the LM head reads.
            lm_head: (V, d).
            objective: See `evaluate`.
        """
        teacher = _logits(final, lm_head)
        self.top = teacher.argmax(-1)
        self._target: torch.Tensor | None = None
        if objective == "kl":
            log_target = teacher.log_softmax(-1)
            del teacher
            self._target = log_target.exp()
            # Sum of p log p: what KL has and cross-entropy has not.
            self._entropy = (self._target * log_target).sum(-1)

    def compare(
        self, hidden: torch.Tensor, head: torch.Tensor, kept: torch.Tensor | None = None
    ) -> tuple[ExitLoss, torch.Tensor]:
        """Loss of predictions and its gradient.

        Args:
            hidden: (n, d), what the head reads.
            head: (V, d).
            kept: (n,) bool, which tokens count; None for all.

        Returns:
            Sums over the tokens, and (n, V) the gradient of the loss with respect to
            the logits.
        """
        log_probs = _logits(hidden, head).log_softmax(-1)
        right = log_probs.argmax(-1) == self.top
        if self._target is None:
            losses = -log_probs.gather(1, self.top[:, None])[:, 0]
        else:
            losses = self._entropy - (self._target * log_probs).sum(-1)
        slope = log_probs.exp_()
        if self._target is None:
            slope[torch.arange(len(slope), device=slope.device), self.top] -= 1
        else:
            slope -= self._target
        if kept is None:
            return ExitLoss(losses.sum().item(), int(right.sum()), len(right)), slope
        slope.mul_(kept[:, None])
        loss = losses[kept].sum().item()
        return ExitLoss(loss, int(right[kept].sum()), int(kept.sum())), slope


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
        targets = _Targets(final[chunk], lm_head, objective)
        for layer, weight in weights.items():
            inputs = states[layer][chunk].to(weight.dtype)
            full_size = weight.shape[0] == lm_head.shape[0] != weight.shape[1]
            head = weight if full_size else lm_head
            hidden = inputs if full_size else inputs @ weight.T
            loss, slope = targets.compare(hidden, head)
            totals[layer].add(loss)
            if gradients is None:
                continue
            if full_size:
                gradients[layer].addmm_(slope.T, inputs)
            else:
                back = (slope.to(lm_head.dtype) @ lm_head).to(weight.dtype)
                gradients[layer].addmm_(back.T, inputs)
    return totals


def evaluate_unrolled(
    weights: Mapping[int, torch.Tensor],
    memory: Mapping[int, torch.Tensor],
    states: Mapping[int, torch.Tensor],
    final: torch.Tensor,
    lengths: Sequence[int],
    lm_head: torch.Tensor,
    *,
    objective: Objective,
    chunk_tokens: int,
    unroll: int,
    gradients: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> dict[int, list[ExitLoss]]:
    """The same of heads with memory, over the drafts of a cycle.

    See :mod:`adadecode_vllm.toolkit.evaluation.unrolled`. The gradient goes back
    through all drafts of a cycle.

    Args:
        weights: By exit, T of shape (d, d).
        memory: By exit, U of shape (d, d).
        states: By exit, (n, d): residual stream after the final norm.
        final: (n, d): what the LM head reads.
        lengths: Tokens of each text, n in all; no cycle goes from one to the next.
        lm_head: (V, d), in the model's dtype.
        objective: See `evaluate`.
        chunk_tokens: Tokens at a time.
        unroll: Drafts of a cycle.
        gradients: By exit, two tensors like T and U that receive the gradients of the
            *sum* over all tokens and drafts; None to compute losses only.

    Returns:
        By exit and draft, sums over the tokens: all n for the first draft; for each
        further one a token less of every text.
    """
    totals = {layer: [ExitLoss() for _ in range(unroll)] for layer in weights}
    for stretch in stretches(final, lengths, chunk_tokens, unroll):
        targets = _Targets(final[stretch.chosen], lm_head, objective)
        for layer, weight in weights.items():
            inputs = states[layer][stretch.wide].to(weight.dtype)
            outputs, memories = stretch.outputs(inputs, weight, memory[layer], unroll)
            slopes = []
            for step, hidden in enumerate(outputs):
                kept = stretch.drafts(step) if step else None
                loss, slope = targets.compare(hidden[stretch.lead :], lm_head, kept)
                totals[layer][step].add(loss)
                if gradients is None:
                    continue
                back = torch.zeros_like(hidden)
                back[stretch.lead :] = slope.to(lm_head.dtype) @ lm_head
                slopes.append(back)
            if gradients is None:
                continue
            of_weight, of_memory = gradients[layer]
            # From the last draft to the first: h_k = T x + U later(h_{k-1}).
            for step in reversed(range(unroll)):
                of_weight.addmm_(slopes[step].T, inputs)
                of_memory.addmm_(slopes[step].T, memories[step])
                if step:
                    slopes[step - 1] += stretch.earlier(slopes[step] @ memory[layer])
    return totals


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(n, V) float32; float64 where the head is."""
    logits = hidden.to(head.dtype) @ head.T
    return logits if logits.dtype == torch.float64 else logits.float()
