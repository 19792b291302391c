# SPDX-License-Identifier: Apache-2.0
"""Heads with memory along a known text, as many drafts at a time as they will make.

A cycle of decoding that starts at position i makes its draft k, counted from 0, at
position i + k: the head's output there is

    h_k(i + k) = T x(i + k) + U g,    g = h_{k-1}(i + k - 1), for k = 0 final(i - 1),

with x the exit's states and final the last layer's. The text is the model's own, and a
cycle goes on only while its drafts are right, so the drafts are the text. All cycles
are computed at once: step k of all positions is one product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Stretch:
    """Consecutive positions, with those before them that their drafts depend on.

    Attributes:
        chosen: The positions that are asked for, as a slice of all.
        wide: The same with those before them, m in all.
        lead: How many those are.
        places: (m,) int64, each position's number in its text.
        before: (m, d) the final states one position earlier; zeros where a text begins,
            since the state there is not known.
    """

    chosen: slice
    wide: slice
    lead: int
    places: torch.Tensor
    before: torch.Tensor

    def drafts(self, step: int) -> torch.Tensor:
        """(n,) bool, at which of the chosen positions there is a draft of a step."""
        return self.places[self.lead :] >= step

    def outputs(
        self,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        memory: torch.Tensor,
        steps: int,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What a head gives to the LM head, and the g that it was given.

        Args:
            inputs: (m, d), the exit's states at the wide positions.
            weight: T, (d, d).
            memory: U, (d, d).
            steps: Drafts of a cycle.

        Returns:
            By step (m, d) outputs and (m, d) memories, which mean something where
            there is a draft of that step.
        """
        own = inputs @ weight.T
        memories = [self.before.to(own.dtype)]
        found: list[torch.Tensor] = []
        for step in range(steps):
            if step:
                memories.append(self.later(found[-1]))
            found.append(own + memories[-1] @ memory.T)
        return found, memories

    def later(self, values: torch.Tensor) -> torch.Tensor:
        """(m, d) values of the position before, zeros where a text begins."""
        moved = torch.zeros_like(values)
        moved[1:] = values[:-1]
        return moved.mul_((self.places > 0)[:, None])

    def earlier(self, slopes: torch.Tensor) -> torch.Tensor:
        """Gradients of `later`'s argument from those of its result, (m, d)."""
        moved = torch.zeros_like(slopes)
        moved[:-1] = (slopes * (self.places > 0)[:, None])[1:]
        return moved


def stretches(
    final: torch.Tensor, lengths: Sequence[int], tokens: int, steps: int
) -> Iterator[Stretch]:
    """Divide texts into stretches.

    Args:
        final: (n, d), the final states of some texts, one after the other.
        lengths: Positions of each text, n in all.
        tokens: Positions of a stretch at most, without those before.
        steps: Drafts of a cycle.

    Yields:
        The stretches, which together choose every position once.
    """
    places = torch.cat([torch.arange(length) for length in lengths]).to(final.device)
    for first in range(0, len(final), tokens):
        end = min(first + tokens, len(final))
        start = max(0, first - (steps - 1))
        wide = slice(start, end)
        before = torch.zeros_like(final[wide])
        known = 1 if start == 0 else 0
        before[known:] = final[start - 1 + known : end - 1]
        here = places[wide]
        before.mul_((here > 0)[:, None])
        yield Stretch(slice(first, end), wide, first - start, here, before)
