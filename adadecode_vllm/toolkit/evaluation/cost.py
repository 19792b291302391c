# SPDX-License-Identifier: Apache-2.0
"""What decoding costs, in plain steps: the formula of docs/design.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adadecode_vllm.toolkit.evaluation.counters import Counters, StepCosts
from adadecode_vllm.toolkit.evaluation.row_costs import FREE, RowCosts


@dataclass(frozen=True)
class CostModel(StepCosts):
    """Shares of one plain decoding step at batch 1, where reading weights is all.

    Attributes:
        head_share: h, the LM head's.
        transform_share: tau, that of an exit's matrices: T, 0 for T = I, and U.
        overhead: o, everything else that a draft adds.
        gate_head_share: The LM head's where a gate reads it: less than h for a reduced
            draft vocabulary; None for h.
        row_costs: What several rows of a step cost; nothing more by default.
    """

    head_share: float
    transform_share: float
    overhead: float = 0.0
    gate_head_share: float | None = None
    row_costs: RowCosts = FREE

    @classmethod
    def of_model(
        cls,
        model: Any,
        *,
        identity: bool,
        memory: bool = False,
        overhead: float = 0.0,
        draft_vocabulary: int | None = None,
    ) -> CostModel:
        """Count a model's weights.

        Args:
            model: A causal language model with ``model.layers`` and ``lm_head``.
            identity: Whether T = I at every exit.
            memory: Whether exits have U.
            overhead: o.
            draft_vocabulary: Tokens that gates look at; None or 0 for all.

        Returns:
            The shares.
        """
        head = model.lm_head.weight
        in_layers = sum(weight.numel() for weight in model.model.layers.parameters())
        total = in_layers + head.numel()
        transform = (int(not identity) + int(memory)) * head.shape[1] ** 2
        at_gates = None
        if draft_vocabulary:
            at_gates = min(draft_vocabulary, head.shape[0]) * head.shape[1] / total
        return cls(head.numel() / total, transform / total, overhead, at_gates)

    def baseline_steps(self, counters: Counters) -> float:
        """Cost of the counted work, as a number of plain steps.

        Segments that run several tokens cost what they cost for one.

        Args:
            counters: Of a simulation.

        Returns:
            Ordinary steps.
        """
        bounds = (0, *counters.exit_layers, counters.num_layers)
        layers = sum(
            runs * (bounds[segment + 1] - bounds[segment])
            for segment, runs in enumerate(counters.segments_run)
        )
        body = (1 - self.head_share) * layers / counters.num_layers
        gate = self._gate + self.overhead
        return body + gate * sum(counters.gates) + self.head_share * counters.forwards

    @property
    def _gate(self) -> float:
        """What reading an exit's weights costs."""
        at_gates = self.gate_head_share
        head = self.head_share if at_gates is None else at_gates
        return head + self.transform_share

    def drafting(self, share: float, tokens: int, scored: int) -> float:
        """A segment and the exit behind it, in plain steps.

        Args:
            share: The segment's share of the layers; 0 for an exit at the embedding.
            tokens: Tokens that the segment runs.
            scored: Tokens that the exit scores.
        """
        body = (1 - self.head_share) * share * self.row_costs(tokens)
        return body + self._gate * self.row_costs(scored) + self.overhead

    def verifying(self, segments: Sequence[tuple[float, int]]) -> float:
        """A forward, with the LM head, in plain steps.

        Args:
            segments: Each segment's share of the layers, and the tokens that it runs;
                the last one runs all that are verified.
        """
        body = sum(share * self.row_costs(rows) for share, rows in segments if rows)
        head = self.head_share * self.row_costs(segments[-1][1])
        return (1 - self.head_share) * body + head

    def speedup(self, counters: Counters) -> float:
        """Speedup over plain decoding of the same tokens."""
        steps = self.baseline_steps(counters)
        return counters.generated_tokens / steps if steps else 1.0
