# SPDX-License-Identifier: Apache-2.0
"""A larger Llama that computes what a small one computes: the mathematics.

Primes mark the target's sizes. A weight that cannot matter is random, normal with
deviation 0.02, because zeros may run faster than real data. It cannot matter where its
input is exactly zero, so the zeros are put where they are few:

- Residual stream: d real dimensions, then zeros up to d'. RMSNorm divides by a mean
  over d', so its weights are scaled by sqrt(d/d') and its epsilon by d/d'. Columns
  that read padded dimensions are random.
- MLP: extra units have random gates, and up rows that are zero on the real dimensions.
  They give exactly zero, so their down columns are random. Real units write nothing to
  padded dimensions.
- Heads: hd' = m hd. Rotary pair (i, i + hd/2) becomes (m i, hd'/2 + m i), which turns
  at the same frequency theta^(-2i/hd). Query rows are scaled by sqrt(hd'/hd), which the
  attention's 1/sqrt(hd') takes back. In padded dimensions of real key-value heads, keys
  and values are zero and queries random. Extra key-value heads have random keys and
  zero values, so extra queries change nothing, whatever their o_proj columns; where
  they share a real key-value head, their columns are zero.
- Grouped queries: a key-value head whose queries do not fit the target's groups is
  repeated.
- Added layers have value and up projections of zero on the real dimensions: they add
  exactly nothing. They are spread evenly, each behind a layer of the source.
- Vocabulary: dimension z = d is reserved. Every token's embedding holds a small c
  there, nothing reads it (layer norms have weight 0 there) or writes to it, and the
  final norm's weight there is large. Padded rows of the LM head are -B there and zero
  on the real dimensions, so their logits are at most -B while the state's norm is below
  `HEADROOM` times the largest of the source's, and -B HEADROOM where it is that. c is
  2^-12 of the smallest embedding's norm at most, so c^2 is beyond float32.
- Exit heads: T passes z on, T'[z, z] = 1, and gives zero in other padded dimensions. An
  identity, which decoding skips, stays one.

Powers of two and zeros are exact, so with d'/d and hd'/hd powers of 4 the target holds
the source's bfloat16 weights to the last bit. Otherwise norms and queries are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from adadecode_vllm.heads.io import is_identity
from benchmarks.widening_sizes import Sizes, copies_needed

STD = 0.02
# Padded logits are at most -GUARD.
GUARD = 64.0
HEADROOM = 16.0
_PROBE_TOKENS = 64

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Guard:
    """The constants that keep padded tokens from being predicted.

    Attributes:
        constant: c, what every embedding holds at z.
        norm_weight: The final norm's weight at z.
    """

    constant: float
    norm_weight: float


@torch.inference_mode()
def measure_guard(model: LlamaForCausalLM, hidden_size: int, seed: int = 0) -> Guard:
    """Choose the constants from the embeddings and the states of the source.

    Args:
        model: The source, in float32.
        hidden_size: d' of the target.
        seed: Seed of the tokens that the source is run on.

    Returns:
        Powers of two.
    """
    norms = model.get_input_embeddings().weight.norm(dim=-1)
    constant = 2.0 ** math.floor(math.log2(norms[norms > 0].min().item()) - 12)
    generator = torch.Generator().manual_seed(seed)
    length = min(_PROBE_TOKENS, model.config.max_position_embeddings)
    tokens = torch.randint(len(norms), (1, length), generator=generator)
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, output: states.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for layer in model.model.layers
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    largest = max(state.norm(dim=-1).max().item() for state in states)
    # The final norm gives c * weight * sqrt(d') / |state| at z: 1 for the largest.
    weight = HEADROOM * largest / (constant * math.sqrt(hidden_size))
    return Guard(constant, 2.0 ** math.ceil(math.log2(weight)))


class Widener:
    """Makes the target's weights from the source's, one part at a time.

    Random numbers are drawn in the order of the calls.
    """

    def __init__(
        self,
        source: Sizes,
        target: Sizes,
        *,
        dtype: torch.dtype,
        guard: Guard | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take the sizes and seed the random numbers.

        Args:
            source: Sizes of the small model.
            target: Sizes of the large one; `check_sizes` accepts them.
            dtype: Of the weights to make.
            guard: Constants of the padded tokens, for a larger vocabulary.
            seed: Seed of the random weights.
            device: Where the weights are made; another device draws other numbers.
        """
        if (guard is None) != (target.vocab_size == source.vocab_size):
            raise ValueError("a guard belongs to a larger vocabulary, and only there")
        self.source, self.target, self.guard = source, target, guard
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.norm_scale = math.sqrt(source.hidden_size / target.hidden_size)
        step = target.head_dim // source.head_dim
        half = torch.arange(source.head_dim // 2, device=self.device) * step
        # Where a head's dimensions go.
        self.places = torch.cat([half, half + target.head_dim // 2])

    def embedding(self, weight: torch.Tensor) -> torch.Tensor:
        """Widen the embedding; padded tokens get random ones."""
        (vocab, hidden), target = weight.shape, self.target
        wide = self._zeros(target.vocab_size, target.hidden_size)
        wide[:vocab, :hidden] = self._cast(weight)
        if self.guard is not None:
            padded = self._random(target.vocab_size - vocab, hidden)
            wide[vocab:, :hidden] = padded * (weight.std().item() / STD)
            wide[:, hidden] = self.guard.constant
        return wide

    def lm_head(self, weight: torch.Tensor) -> torch.Tensor:
        """Widen the LM head."""
        (vocab, hidden), target = weight.shape, self.target
        wide = self._random(target.vocab_size, target.hidden_size)
        wide[:, : self._live] = 0
        wide[:vocab, :hidden] = self._cast(weight)
        if self.guard is not None:
            wide[vocab:, hidden] = -GUARD
        return wide

    def final_norm(self, weight: torch.Tensor) -> torch.Tensor:
        """Widen the weight of the final norm."""
        return self._norm(weight, 0.0 if self.guard is None else self.guard.norm_weight)

    def transform(self, weight: torch.Tensor) -> torch.Tensor:
        """Widen an exit's T."""
        hidden, size = len(weight), self.target.hidden_size
        if is_identity(weight):
            return torch.eye(size, dtype=self.dtype, device=self.device)
        wide = self._random(size, size)
        wide[:, : self._live] = 0
        wide[:hidden, :hidden] = self._cast(weight)
        if self.guard is not None:
            wide[hidden, hidden] = 1
        return wide

    def memory(self, weight: torch.Tensor) -> torch.Tensor:
        """Widen an exit's U; the guard comes from T alone."""
        wide = self.transform(weight)
        wide[len(weight) :, : self._live] = 0
        return wide

    def layer(self, weights: Mapping[str, torch.Tensor] | None) -> Tensors:
        """Widen a decoder layer.

        Args:
            weights: The source's, by their names within the layer; None for a layer
                that adds nothing.

        Returns:
            The target's, by the same names.
        """
        hidden, units = self.source.hidden_size, self.source.intermediate_size
        size, wide_units = self.target.hidden_size, self.target.intermediate_size
        wide = self._attention(weights)
        gate = self._random(wide_units, size)
        up = self._random(wide_units, size)
        up[:, :hidden] = 0
        down = self._random(size, wide_units)
        norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"))
        if weights is not None:
            gate[:units, :hidden] = self._cast(weights["mlp.gate_proj.weight"])
            up[:units, :hidden] = self._cast(weights["mlp.up_proj.weight"])
            down[:, :units] = 0
            down[:hidden, :units] = self._cast(weights["mlp.down_proj.weight"])
            norms = {name: weights[f"{name}.weight"] for name in norms}
        wide |= {f"{name}.weight": self._norm(norms[name]) for name in norms}
        return wide | {
            "mlp.gate_proj.weight": gate,
            "mlp.up_proj.weight": up,
            "mlp.down_proj.weight": down,
        }

    def _attention(self, weights: Mapping[str, torch.Tensor] | None) -> Tensors:
        """Widen the attention; heads first, so that a head is one index."""
        source, target = self.source, self.target
        hidden, size, head_dim = source.hidden_size, target.hidden_size, target.head_dim
        query = self._random(target.num_heads, head_dim, size)
        key = self._random(target.num_kv_heads, head_dim, size)
        value = self._random(target.num_kv_heads, head_dim, size)
        value[..., :hidden] = 0
        # (d', heads, hd'): its columns are the heads' dimensions.
        out = self._random(size, target.num_heads, head_dim)
        if weights is not None:
            wide_group, copies = target.group_size, copies_needed(source, target)
            split = (-1, source.head_dim, hidden)
            old_query = weights["self_attn.q_proj.weight"].reshape(split)
            old_query = old_query * math.sqrt(head_dim / source.head_dim)
            old_key = weights["self_attn.k_proj.weight"].reshape(split)
            old_value = weights["self_attn.v_proj.weight"].reshape(split)
            old_out = weights["self_attn.o_proj.weight"].reshape(
                hidden, -1, source.head_dim
            )
            for head in range(source.num_kv_heads * copies):
                old = head // copies
                key[head, :, :hidden] = 0
                key[head, self.places, :hidden] = self._cast(old_key[old])
                value[head, self.places, :hidden] = self._cast(old_value[old])
                for query_head in range(head * wide_group, (head + 1) * wide_group):
                    out[:, query_head, self.places] = 0
            for head in range(source.num_heads):
                old, place = divmod(head, source.group_size)
                first = (old * copies + place // wide_group) * wide_group
                new = first + place % wide_group
                query[new, self.places, :hidden] = self._cast(old_query[head])
                out[:hidden, new, self.places] = self._cast(old_out[:, head])
        return {
            "self_attn.q_proj.weight": query.flatten(0, 1),
            "self_attn.k_proj.weight": key.flatten(0, 1),
            "self_attn.v_proj.weight": value.flatten(0, 1),
            "self_attn.o_proj.weight": out.flatten(1, 2),
        }

    @property
    def _live(self) -> int:
        """First residual dimensions that the final norm does not give as zero."""
        return self.source.hidden_size + (self.guard is not None)

    def _norm(self, weight: torch.Tensor | None, at_z: float = 0.0) -> torch.Tensor:
        """Widen a norm's weight; None for that of an added layer."""
        size = self.target.hidden_size
        wide = torch.full(
            (size,), self.norm_scale, dtype=self.dtype, device=self.device
        )
        if weight is not None:
            wide[: len(weight)] = self._cast(weight.float() * self.norm_scale)
        if self.guard is not None:
            wide[self.source.hidden_size] = at_z
        return wide

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(
            0.0, STD, generator=self.generator
        )

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _cast(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.device, self.dtype)


def layer_weights(tensors: Mapping[str, torch.Tensor], layer: int) -> Tensors:
    """The weights of one decoder layer, by their names within it."""
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def map_layers(layers: Iterable[int], source: Sizes, target: Sizes) -> list[int]:
    """Layer counts of the target that compute what those of the source compute."""
    return [layer * target.num_layers // source.num_layers for layer in layers]
