# SPDX-License-Identifier: Apache-2.0
"""Exit heads over the model's LM head: what an exit predicts of a hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from adadecode_vllm.engine.exit_heads import ExitHeads
from adadecode_vllm.engine.final_norm import FinalNorm
from adadecode_vllm.engine.packed_linear import PackedLinear
from adadecode_vllm.engine.segments import Decoder
from adadecode_vllm.errors import AdaDecodeError

# A quantized LM head has none of these; float8 counts as floating point in torch.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)

# Copied at a time, so that a refresh fits where the KV cache has taken the rest.
_COPIED_ROWS = 4096


def has_plain_rows(decoder: Decoder) -> bool:
    """Whether a model's LM head has rows to choose from; the same on every rank."""
    weight = getattr(decoder.lm_head, "weight", None)
    return (
        isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.dtype in _PLAIN
    )


class DraftVocabulary(nn.Module):
    """The LM head's rows of some tokens, so that an exit reads fewer weights.

    Under tensor parallelism every rank keeps an equal share of the rows and the logits
    are gathered, as vLLM does for the whole LM head.

    Attributes:
        token_ids: (m,) int64 on the model's device.
    """

    token_ids: torch.Tensor

    def __init__(self, decoder: Decoder, token_ids: torch.Tensor) -> None:
        """Copy the rows.

        Args:
            decoder: The model's parts.
            token_ids: (m,) int64 distinct token ids.

        Raises:
            AdaDecodeError: If the LM head has no plain rows, as a quantized one.
        """
        super().__init__()
        if not has_plain_rows(decoder):
            raise AdaDecodeError(
                "--adadecode-config: draft_vocabulary_size is refused, because the "
                "model's LM head is quantized and has no rows to choose from. Set it "
                "to 0."
            )
        head: Any = decoder.lm_head
        weight: torch.Tensor = head.weight
        self._decoder = decoder
        self._ranks = get_tensor_model_parallel_world_size()
        # Every rank's share has the same number of rows; the last ones repeat a token.
        self._share = -(-len(token_ids) // self._ranks)
        self.register_buffer("token_ids", token_ids.to(decoder.device), False)
        rows = weight.new_empty((self._share, weight.shape[1]))
        self._copy_rows(rows)
        self._head = PackedLinear(rows)
        processor = decoder.logits_processor
        self._scale, self._soft_cap = processor.scale, processor.soft_cap

    def refresh(self) -> None:
        """Copy the rows again, once the LM head has other weights.

        Under tensor parallelism every rank must do so at the same time.
        """
        self._head.refill(self._copy_rows)

    @torch.no_grad()
    def _copy_rows(self, rows: torch.Tensor) -> None:
        """Write this rank's (share, d) rows, which are spread over all ranks."""
        missing = self._share * self._ranks - len(self.token_ids)
        padded = torch.cat((self.token_ids, self.token_ids[:1].expand(missing)))
        shares = padded.view(self._ranks, self._share)
        step = max(1, _COPIED_ROWS // self._ranks)
        for first in range(0, self._share, step):
            part = slice(first, first + step)
            rows[part] = self._gather(shares[:, part])

    def _gather(self, shares: torch.Tensor) -> torch.Tensor:
        """LM head rows of (ranks, n) tokens; (n, d) of this rank's."""
        head: Any = self._decoder.lm_head
        if self._ranks == 1:
            return head.weight[shares[0]]
        first = head.shard_indices.org_vocab_start_index
        last = head.shard_indices.org_vocab_end_index
        wanted = shares.flatten()
        rows = head.weight[(wanted - first).clamp(0, last - first - 1)]
        rows.masked_fill_(((wanted < first) | (wanted >= last))[:, None], 0)
        rows = tensor_model_parallel_all_reduce(rows)
        return rows.unflatten(0, shares.shape)[get_tensor_model_parallel_rank()]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the chosen tokens, (n, m) for (n, d) hidden states."""
        logits = self._head(hidden)
        if self._ranks > 1:
            logits = tensor_model_parallel_all_gather(logits)
        logits = logits[:, : len(self.token_ids)]
        if self._soft_cap is not None:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits if self._scale == 1.0 else logits * self._scale


class ExitScorer(nn.Module):
    """The exits' top tokens and their probabilities.

    Attributes:
        num_exits: K.
    """

    def __init__(
        self,
        decoder: Decoder,
        heads: ExitHeads,
        exit_layers: Sequence[int],
        draft_token_ids: torch.Tensor | None = None,
    ) -> None:
        """Wire the scorer.

        Args:
            decoder: The model's parts.
            heads: The exit heads.
            exit_layers: Layer counts of the K exits.
            draft_token_ids: (m,) int64, the tokens to look at; None for all.
        """
        super().__init__()
        self._decoder = decoder
        self._normalize = FinalNorm(decoder.norm, decoder.dtype)
        self._heads = heads
        self._exit_layers = list(exit_layers)
        self.num_exits = len(self._exit_layers)
        self._vocabulary = (
            None
            if draft_token_ids is None
            else DraftVocabulary(decoder, draft_token_ids)
        )

    def refresh(self) -> None:
        """Follow an LM head that has other weights now; all ranks together."""
        if self._vocabulary is not None:
            self._vocabulary.refresh()

    def lasting(self) -> dict[str, torch.Tensor]:
        """What the model's own weights cannot bring back, by name: storage."""
        tensors = chain(self._heads.named_parameters(), self.named_buffers())
        return {name: tensor.data for name, tensor in tensors}

    @property
    def has_memory(self) -> bool:
        """Whether the heads read a memory beside the hidden state."""
        return self._heads.has_memory

    def forward(
        self,
        exit_index: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        memory: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score the next token with an exit head.

        Every tensor-parallel rank computes the same logits from the same all-gathered
        values, so all take the same decision (I7).

        Args:
            exit_index: Index of the exit, 0 .. K - 1.
            hidden: (n, d) hidden states at the exit; may be overwritten.
            residual: (n, d) residual stream at the exit, which may be overwritten;
                None at the embedding.
            memory: (n, d) the states that the tokens were told from; None for zeros.

        Returns:
            Token ids (n,) int64, their probabilities (n,) float32 under the head's own
            distribution, and what the LM head read, (n, d).
        """
        normed = self._normalize(hidden, residual)
        transformed = self._heads(self._exit_layers[exit_index], normed, memory)
        if self._vocabulary is not None:
            logits = self._vocabulary(transformed)
        else:
            whole = self._decoder.compute_logits(transformed)
            assert whole is not None, "logits are gathered on every rank"
            logits = whole
        confidence, token = logits.softmax(dim=-1, dtype=torch.float32).max(dim=-1)
        if self._vocabulary is not None:
            token = self._vocabulary.token_ids.index_select(0, token)
        return token, confidence, transformed
