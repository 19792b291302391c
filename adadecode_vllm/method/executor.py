# SPDX-License-Identifier: Apache-2.0
"""What drafting and resumption need of a model, and of nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class TokenSubset:
    """Consecutive tokens of some requests, the unit that a segment runs on.

    By I1 the tokens that a segment runs are a suffix of each request, so a first
    position and a count describe them.

    Attributes:
        rows: (R,) int64, the requests' rows in the block tables.
        first: (R,) int64, position of each request's first token.
        count: (R,) int64, number of tokens of each request, all positive.
    """

    rows: np.ndarray
    first: np.ndarray
    count: np.ndarray

    @property
    def num_requests(self) -> int:
        """Number of requests with at least one token."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Number of tokens over all requests."""
        return int(self.count.sum())


class ExitAnswer(NamedTuple):
    """What an exit head says of n tokens.

    Attributes:
        token_ids: (n,) int64, its top tokens.
        confidence: (n,) float32, their probabilities under the head's own distribution.
        output: (n, d) on the device, what the LM head read: the memory of the tokens
            that are predicted here. None for heads without memory.
    """

    token_ids: np.ndarray
    confidence: np.ndarray
    output: torch.Tensor | None = None


class StepRunner(Protocol):
    """Runs whole steps that were prepared for, such as CUDA graphs.

    A step reads and writes the pending states itself, where `SegmentExecutor.run`
    leaves that to its caller.

    Attributes:
        max_tokens: Most tokens of a resumed forward; 0 where it must be taken apart.
    """

    max_tokens: int

    def draft(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Run a segment and score with the exit head behind it.

        Args:
            segment: Index j of the segment; -1 to run none and score with the exit
                that reads the embedding.
            subset: The n tokens of r requests.
            states: (n,) int64, where their hidden states are kept.
            token_ids: (n,) int64.

        Returns:
            Token ids (r,) int64 and probabilities (r,) float32 for each request's last
            token, or None for the caller to take the step apart.
        """

    def prefetch_segment(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> torch.Tensor:
        """Run a segment of the next forward before it is scheduled; nobody waits.

        Args:
            segment: Index j of the segment.
            subset: The n tokens of r requests; n is at most :attr:`max_tokens`.
            states: (n,) int64, where their hidden states are kept.
            token_ids: (n,) int64; segment 0 alone reads them.

        Returns:
            What `resume` returns; it stays until the next `resume` or
            `prefetch_segment` of the last segment.
        """

    def resume(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run a segment of a resumed forward.

        Args:
            segment: Index j of the segment.
            subset: The n tokens of r requests; n is at most :attr:`max_tokens`.
            states: (n,) int64, where their hidden states are kept.
            token_ids: (n,) int64 on the device for segment 0, otherwise None.

        Returns:
            (n, d) the final norm's output after the last segment; undefined before.
        """


class SegmentExecutor(Protocol):
    """Runs segments and exit heads: for vLLM and, in tests, in plain torch."""

    @property
    def steps(self) -> StepRunner | None:
        """Runs whole steps, where that was prepared for."""

    @property
    def num_segments(self) -> int:
        """Segments with layers: K + 1 for K exits, K where one reads the embedding."""

    @property
    def exits_at_embedding(self) -> int:
        """1 where the first exit reads the embedding, before any layer, else 0.

        Segment j ends at exit j plus this.
        """

    def to_device(self, values: np.ndarray) -> torch.Tensor:
        """Copy values to the model's device without waiting.

        Args:
            values: (n,) int64; not changed afterwards.

        Returns:
            (n,) int64.
        """

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embed tokens.

        Args:
            token_ids: (n,) int64.

        Returns:
            (n, d) in the model's dtype: the hidden states before the first layer.
        """

    def run(
        self,
        segment: int,
        subset: TokenSubset,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run one segment's layers for a subset of tokens, writing their KV.

        Args:
            segment: Index j of the segment.
            subset: The tokens, request by request, n in all.
            hidden: (n, d) hidden states before the segment.
            residual: (n, d) residual stream before the segment; None for segment 0.

        Returns:
            Hidden states and residual, (n, d) each, after the segment. The last
            segment returns the final norm's output and None.
        """

    def score_exit(
        self,
        exit_index: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        memory: torch.Tensor | None,
    ) -> ExitAnswer:
        """Score the next token with an exit head.

        Args:
            exit_index: Index of the exit, 0 .. K - 1.
            hidden: (n, d) hidden states at the exit; may be overwritten.
            residual: (n, d) residual stream at the exit; None at the embedding.
            memory: (n, d) the memory of the tokens; None for heads without.

        Returns:
            Its answer.
        """
