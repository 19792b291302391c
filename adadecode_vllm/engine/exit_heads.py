# SPDX-License-Identifier: Apache-2.0
"""The exit heads as a torch module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from adadecode_vllm.engine.packed_linear import PackedLinear
from adadecode_vllm.heads.io import is_identity


class ExitHeads(nn.Module):
    """The matrices T, and U where there is memory, of all exits, for inference.

    They are replicated on every tensor-parallel rank: a (d, d) product is small beside
    the all-reduce that sharding it would need. They are not vLLM's linear layers and so
    never inherit the base model's quantization.

    An exit whose T is exactly the identity has no T, and costs nothing without memory.

    Attributes:
        exit_layers: Layer counts of the exits, strictly increasing.
        identity_layers: Those whose T is the identity.
        has_memory: Whether the exits have U.
    """

    def __init__(
        self,
        weights: Mapping[int, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        memory: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """Cast the matrices to the model's dtype and place them.

        Args:
            weights: T of shape (d, d) for every exit.
            dtype: The base model's dtype.
            device: The base model's device.
            memory: U of shape (d, d) for every exit; None for heads without memory.

        Raises:
            ValueError: There are U of other exits than T.
        """
        super().__init__()
        if memory is not None and memory.keys() != weights.keys():
            raise ValueError(
                f"weights of the exits {sorted(weights)}, but memory of "
                f"{sorted(memory)}"
            )
        self.exit_layers = tuple(sorted(weights))
        self.has_memory = memory is not None
        # By exit one matrix: T, (T U) side by side, or U alone where T is the identity.
        self.transforms = nn.ModuleDict()
        identity = []
        for layer in self.exit_layers:
            weight = weights[layer].detach().to(dtype)
            parts = []
            # After the cast: what rounds to the identity computes the identity.
            if is_identity(weight):
                identity.append(layer)
            else:
                parts.append(weight)
            if memory is not None:
                parts.append(memory[layer].detach().to(weight))
            if parts:
                matrix = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
                self.transforms[str(layer)] = PackedLinear(matrix.to(device))
        self.identity_layers = frozenset(identity)

    def forward(
        self,
        layer: int,
        hidden: torch.Tensor,
        memory: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Transform normed hidden states for the LM head.

        Args:
            layer: The exit's layer count, one of `exit_layers`.
            hidden: final_norm(hidden + residual) after `layer` layers, shape (n, d), in
                the model's dtype.
            memory: Of the tokens before, shape (n, d), in the model's dtype: the final
                layer's normed states or, where those are not known yet, what this
                module returned for them; zeros where there is neither. None for zeros
                everywhere. Heads without memory do not look at it.

        Returns:
            T @ hidden + U @ memory, shape (n, d); without memory `hidden` itself, not a
            copy, where T is the identity.
        """
        identity = layer in self.identity_layers
        if not self.has_memory:
            return hidden if identity else self.transforms[str(layer)](hidden)
        if memory is None:
            memory = torch.zeros_like(hidden)
        if identity:
            return hidden + self.transforms[str(layer)](memory)
        return self.transforms[str(layer)](torch.cat((hidden, memory), dim=-1))
