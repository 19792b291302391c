# SPDX-License-Identifier: Apache-2.0
"""The exit heads as a torch module."""

from collections.abc import Callable, Mapping

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A matrix that is multiplied by the kernel which vLLM's own layers use.

    On CPU vLLM packs weights for a faster kernel than torch's; elsewhere torch's is
    the kernel.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """Take the weight, and pack it where it is on the CPU.

        Args:
            weight: (m, d), in the model's dtype, on its device.
        """
        super().__init__()
        self._shape = weight.shape
        self.cpu_linear: Callable[..., torch.Tensor] | None = None
        self._hold(weight)

    def _hold(self, weight: torch.Tensor) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        if weight.device.type == "cpu":
            # Imported here: reading and writing heads needs no vLLM.
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def refill(self, fill: Callable[[torch.Tensor], None]) -> None:
        """Change the weight.

        Where it is not packed it stays where it is in memory, since CUDA graphs know
        the address.

        Args:
            fill: Writes the new (m, d) weight into the tensor that it is given.
        """
        if self.cpu_linear is None:
            fill(self.weight.data)
            return
        weight = self.weight.new_empty(self._shape)
        fill(weight)
        self._hold(weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (n, m) for (n, d) hidden states."""
        if self.cpu_linear is not None:
            return self.cpu_linear(hidden, self.weight, None)
        return nn.functional.linear(hidden, self.weight)


class ExitHeads(nn.Module):
    """The transformations T of all exits, for inference.

    The weights are replicated on every tensor-parallel rank: a (d, d) product is small
    beside the all-reduce that sharding it would need. They are not vLLM's linear
    layers and so never inherit the base model's quantization.

    An exit whose T is exactly the identity has no weight and costs nothing.

    Attributes:
        exit_layers: Layer counts of the exits, strictly increasing.
        identity_layers: Those whose T is the identity.
    """

    def __init__(
        self,
        weights: Mapping[int, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """Cast the weights to the model's dtype and place them.

        Args:
            weights: T of shape (d, d) for every exit.
            dtype: The base model's dtype.
            device: The base model's device.
        """
        super().__init__()
        self.exit_layers = tuple(sorted(weights))
        self.transforms = nn.ModuleDict()
        identity = []
        for layer in self.exit_layers:
            weight = weights[layer].detach().to(dtype)
            # After the cast: what rounds to the identity computes the identity.
            if torch.equal(weight, torch.eye(len(weight)).to(weight)):
                identity.append(layer)
                continue
            self.transforms[str(layer)] = PackedLinear(weight.to(device))
        self.identity_layers = frozenset(identity)

    def forward(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Transform normed hidden states for the LM head.

        Args:
            layer: The exit's layer count, one of `exit_layers`.
            hidden: final_norm(hidden + residual) after `layer` layers, shape (n, d), in
                the model's dtype.

        Returns:
            T @ hidden, shape (n, d); `hidden` itself, not a copy, where T is the
            identity.
        """
        if layer in self.identity_layers:
            return hidden
        return self.transforms[str(layer)](hidden)
