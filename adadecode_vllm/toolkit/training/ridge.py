# SPDX-License-Identifier: Apache-2.0
"""Heads by least squares, which cost one linear solve each.

T, and U of heads with memory, are the ridge regression from an exit's states, and from
the final ones of the token before, to the final ones. They stand in for trained heads
where exit layers are chosen, and are a start for training that is nearer than T = I,
above all at layer 0, where the identity says of every token that it follows itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adadecode_vllm.toolkit.evaluation.unrolled import stretches
from adadecode_vllm.toolkit.states.cache import StateSource, first_texts

# Of the mean diagonal; keeps the solve stable where states are nearly collinear.
_RIDGE = 1e-2

MOST_TOKENS = 65_536
"""Tokens that heads are fitted to: their matrices have far fewer numbers a column."""


def ridge_heads(
    source: StateSource, layers: Sequence[int], *, memory: bool
) -> dict[int, tuple[torch.Tensor, torch.Tensor | None]]:
    """Fit heads to the first texts of a source, `MOST_TOKENS` of them or a text more.

    Args:
        source: States of the texts.
        layers: Layer counts of the exits; the source has them.
        memory: Whether heads have U.

    Returns:
        By exit, T and U, (d, d) float32; None for U without memory.
    """
    indices = first_texts(source, MOST_TOKENS)
    states = dict(zip(source.layers, source.states(indices), strict=True))
    final = states[source.layers[-1]].float()
    lengths = source.lengths(indices)
    (whole,) = stretches(final, lengths, len(final), 1)
    heads: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for layer in layers:
        inputs = states[layer].float()
        if memory:
            inputs = torch.cat((inputs, whole.before), dim=1)
        gram = inputs.T @ inputs
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        head = torch.linalg.solve(gram, inputs.T @ final).T
        if memory:
            weight, matrix = head.chunk(2, dim=1)
            heads[layer] = weight.contiguous(), matrix.contiguous()
        else:
            heads[layer] = head.contiguous(), None
    return heads
