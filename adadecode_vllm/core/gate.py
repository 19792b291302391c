# SPDX-License-Identifier: Apache-2.0
"""Exit heads over the model's LM head: what a gate asks of a hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from adadecode_vllm.core.segments import Decoder
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import ExitHeads
from adadecode_vllm.heads.module import PackedLinear

# A quantized LM head has none of these; float8 counts as floating point in torch.
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


class DraftVocabulary(nn.Module):
    """The LM head's rows of some tokens, so that a gate reads fewer weights.

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
        head: Any = decoder.lm_head
        weight = getattr(head, "weight", None)
        if weight is None or weight.ndim != 2 or weight.dtype not in _PLAIN:
            raise AdaDecodeError(
                "--adadecode-config: draft_vocabulary_size is refused, because the "
                "model's LM head is quantized and has no rows to choose from. Remove "
                "draft_vocabulary_size."
            )
        ranks = get_tensor_model_parallel_world_size()
        self._ranks = ranks
        share = -(-len(token_ids) // ranks)
        # Every rank's share has the same number of rows; the last ones repeat a token.
        padded = torch.cat(
            (token_ids, token_ids[:1].repeat(share * ranks - len(token_ids)))
        ).to(decoder.device)
        first, last = 0, weight.shape[0]
        if ranks > 1:
            first = head.shard_indices.org_vocab_start_index
            last = head.shard_indices.org_vocab_end_index
        mine = (padded >= first) & (padded < last)
        rows = weight[(padded - first).clamp(0, last - first - 1)] * mine[:, None]
        if ranks > 1:
            rows = tensor_model_parallel_all_reduce(rows)
            rank = get_tensor_model_parallel_rank()
            rows = rows[rank * share : (rank + 1) * share]
        self._head = PackedLinear(rows.contiguous())
        self.register_buffer("token_ids", token_ids.to(decoder.device), False)
        processor = decoder.logits_processor
        self._scale, self._soft_cap = processor.scale, processor.soft_cap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the chosen tokens, (n, m) for (n, d) hidden states."""
        logits = self._head(hidden)
        if self._ranks > 1:
            logits = tensor_model_parallel_all_gather(logits)
        logits = logits[:, : len(self.token_ids)]
        if self._soft_cap is not None:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits if self._scale == 1.0 else logits * self._scale


class Gate(nn.Module):
    """The exits' top tokens and their probabilities."""

    def __init__(
        self,
        decoder: Decoder,
        heads: ExitHeads,
        exit_layers: Sequence[int],
        draft_token_ids: torch.Tensor | None = None,
    ) -> None:
        """Wire the gate.

        Args:
            decoder: The model's parts.
            heads: The exit heads.
            exit_layers: Layer counts of the K exits.
            draft_token_ids: (m,) int64, the tokens to look at; None for all.
        """
        super().__init__()
        self._decoder = decoder
        self._heads = heads
        self._exit_layers = list(exit_layers)
        self._vocabulary = (
            None
            if draft_token_ids is None
            else DraftVocabulary(decoder, draft_token_ids)
        )

    def forward(
        self, exit_index: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask an exit head for the next token.

        Every tensor-parallel rank computes the same logits from the same all-gathered
        values, so all take the same decision (I7).

        Args:
            exit_index: Index of the exit, 0 .. K - 1.
            hidden: (n, d) hidden states at the exit.
            residual: (n, d) residual stream at the exit.

        Returns:
            Token ids (n,) int64 and their probabilities (n,) float32 under the head's
            own distribution.
        """
        normed, _ = self._decoder.norm(hidden, residual)
        transformed = self._heads(self._exit_layers[exit_index], normed)
        if self._vocabulary is not None:
            logits = self._vocabulary(transformed)
        else:
            whole = self._decoder.compute_logits(transformed)
            assert whole is not None, "logits are gathered on every rank"
            logits = whole
        logits = logits.float()
        top, token = logits.max(dim=-1)
        if self._vocabulary is not None:
            token = self._vocabulary.token_ids[token]
        return token, torch.exp(top - torch.logsumexp(logits, dim=-1))
