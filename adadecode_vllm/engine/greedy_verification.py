# SPDX-License-Identifier: Apache-2.0
"""Verification by the largest logits alone, where nothing else counts.

vLLM's rejection sampler copies the logits of drafts several times, so that processors
and the softmax may write into them. For greedy requests without any it then looks for
the largest one, and on CPUs all that takes longer than many a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler

if TYPE_CHECKING:
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


def only_largest_logits_count(sampling: SamplingMetadata) -> bool:
    """Whether a step's tokens are those with the largest logits, and nobody asks more.

    Args:
        sampling: What vLLM knows of the step's requests.
    """
    budgets = sampling.thinking_budget_state_holder
    return (
        sampling.all_greedy
        and sampling.no_penalties
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.allowed_token_ids_mask is None
        and not sampling.bad_words_token_ids
        and (budgets is None or not budgets.has_tracked_requests())
        and not any(map(_changes, sampling.logitsprocs.non_argmax_invariant))
    )


def _changes(processor: LogitsProcessor) -> bool:
    """Whether a processor may change some request's largest logit."""
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    if isinstance(processor, LogitBiasLogitsProcessor):
        return bool(processor.biases)
    return True


def verify_greedily(
    logits: torch.Tensor, metadata: SpecDecodeMetadata
) -> SamplerOutput:
    """Accept drafts up to the first that has not the largest logit.

    Args:
        logits: (N + R, V), request by request those that follow the token before its
            drafts and each of these; on the CPU.
        metadata: The drafts, N of R requests.

    Returns:
        What vLLM's rejection sampler does: (R, W) int32, the tokens of each request,
        then its placeholder.
    """
    # The same function as in steps without drafts.
    largest = Sampler.greedy_sample(logits.to(torch.float32)).numpy()
    drafts = metadata.draft_token_ids.numpy()
    sampled = np.full(
        (len(metadata.num_draft_tokens), metadata.max_spec_len + 1),
        PLACEHOLDER_TOKEN_ID,
        np.int32,
    )
    first = 0
    for request, count in enumerate(metadata.num_draft_tokens):
        own = largest[first + request :][: count + 1]
        wrong = np.flatnonzero(own[:count] != drafts[first : first + count])
        kept = int(wrong[0]) + 1 if len(wrong) else count + 1
        sampled[request, :kept] = own[:kept]
        first += count
    return SamplerOutput(torch.from_numpy(sampled), logprobs_tensors=None)
