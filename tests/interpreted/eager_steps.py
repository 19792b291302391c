# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs of steps hold, called instead of replayed.

Everything but the capture is the product's: packed inputs, padding, slots, block
tables, states and the order of it all, on vLLM's own attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context

from adadecode_vllm.engine.segment_graphs import MAX_TOKENS, StepKind, Steps
from adadecode_vllm.engine.step_buffers import StepBuffers
from adadecode_vllm.method.executor import TokenSubset

# Like graphs that were captured for a few more.
_MORE_TOKENS = 3
_MORE_REQUESTS = 2


class EagerSteps:
    """A `StepRunner` without graphs.

    Attributes:
        drafted: Draft steps by number of tokens a request, one or several.
        resumed: Steps of resumed forwards.
        prefetched: Tokens that ran the last segment, or another one, before the step
            that verifies them.
    """

    def __init__(self, runner: Any) -> None:
        """Allocate buffers as the speculator does.

        Args:
            runner: The model runner, with its KV cache.
        """
        adadecode = runner.adadecode
        self._window = adadecode.states.window
        self._buffers = StepBuffers(
            runner,
            adadecode.states,
            MAX_TOKENS + _MORE_TOKENS,
            adadecode.model.num_segments,
        )
        self._steps = Steps(self._buffers, adadecode.model)
        self._vllm_config = runner.vllm_config
        # A single segment is the whole model, which only vLLM runs.
        self.max_tokens = MAX_TOKENS if adadecode.model.num_segments > 1 else 0
        self.drafted = {"one": 0, "several": 0}
        self.resumed = 0
        self.prefetched = {"whole": 0, "parts": 0}

    def draft(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Run a draft step."""
        if len(states) > MAX_TOKENS:
            return None
        single = len(states) == len(subset.rows)
        self.drafted["one" if single else "several"] += 1
        kind = StepKind(segment, True, 1 if single else self._window)
        self._run(kind, subset, states, token_ids)
        answer = self._buffers.to_host(self._buffers.answers[: len(states)])
        answer = answer[np.cumsum(subset.count) - 1]
        return answer[:, 0].astype(np.int64), answer[:, 1].astype(np.float32)

    def prefetch_segment(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray,
    ) -> torch.Tensor:
        """Run a segment of the next forward."""
        last = segment == self._steps.model.num_segments - 1
        self.prefetched["whole" if last else "parts"] += len(states)
        self._run(
            StepKind(segment, False, self._window),
            subset,
            states,
            token_ids if segment == 0 else None,
        )
        return self._buffers.normed[: len(states)]

    def resume(
        self,
        segment: int,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run a step of a resumed forward."""
        self.resumed += 1
        self._run(StepKind(segment, False, self._window), subset, states, token_ids)
        return self._buffers.normed[: len(states)]

    def _run(
        self,
        kind: StepKind,
        subset: TokenSubset,
        states: np.ndarray,
        token_ids: np.ndarray | torch.Tensor | None,
    ) -> None:
        buffers = self._buffers
        tokens = len(states) + _MORE_TOKENS
        most = buffers.runner.max_num_reqs
        requests = min(len(subset.rows) + _MORE_REQUESTS, most)
        buffers.send(subset, states, token_ids, tokens, requests)
        buffers.refresh(tokens, requests)
        starts = np.full(requests + 1, len(states))
        starts[: len(subset.rows)] = np.cumsum(subset.count) - subset.count
        metadata = buffers.metadata(
            tokens, requests, kind.max_query_len, starts, for_capture=False
        )
        with set_forward_context(
            metadata,
            self._vllm_config,
            num_tokens=tokens,
            slot_mapping=buffers.slots_by_layer(tokens),
        ):
            self._steps.run(kind, tokens)
