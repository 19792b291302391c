# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine that answers jobs of a measurement."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from benchmarks import parity
from benchmarks.closed_loop import Concurrency
from benchmarks.variants import EngineSettings, Variant, llm_arguments

_DRAFTS = "vllm:spec_decode_num_drafts"
_DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


class VllmBackend:
    """One engine, kept loaded."""

    def __init__(self, variant: Variant, settings: EngineSettings) -> None:
        """Start the engine.

        Args:
            variant: The variant.
            settings: The comparison's settings.
        """
        from vllm import LLM

        self._counts = variant.predicts_early
        self._llm = LLM(**llm_arguments(variant, settings))
        self._ids = count()
        if self._counts:
            self._llm.collective_rpc("adadecode_profile")
            # As vLLM's suffix decoding here: every repeat asks for the same texts.
            self._llm.collective_rpc("adadecode_forget_answers")

    def configure(self, **policy: Any) -> None:
        """Change threshold or cap; a no-op for variants that do not predict early."""
        if self._counts:
            self._llm.collective_rpc("adadecode_configure", kwargs=policy)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int,
        output_tokens: int,
        ignore_eos: bool,
        oscillate_to: int | None = None,
        top_logits: bool = False,
    ) -> dict[str, Any]:
        """Generate greedily with a fixed number of requests at a time.

        Args:
            prompts: Token ids.
            batch_size: A request that ends makes room for the next one.
            output_tokens: Most tokens to generate for a prompt.
            ignore_eos: Generate all of them.
            oscillate_to: Requests at a time in every other phase of the run.
            top_logits: Also return the best logits at every token.

        Returns:
            See :meth:`benchmarks.process.VariantProcess.generate`.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=output_tokens,
            ignore_eos=ignore_eos,
            detokenize=False,
            logprobs=parity.NUM_TOP_LOGITS if top_logits else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if self._counts:
            self._llm.collective_rpc("adadecode_stats", kwargs={"reset": True})
        before = self._speculation()
        started = time.perf_counter()
        outputs = self._run(prompts, params, Concurrency(batch_size, oscillate_to))
        seconds = time.perf_counter() - started
        after = self._speculation()
        answer: dict[str, Any] = {
            "seconds": seconds,
            "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
            "ttft_s": [output.metrics.first_token_latency for output in outputs],
            "tpot_s": [_tpot(output) for output in outputs],
            "speculation": {name: after[name] - before[name] for name in after},
            "stats": (
                self._llm.collective_rpc("adadecode_stats")[0] if self._counts else None
            ),
        }
        if top_logits:
            answer["top_logits"] = [
                parity.top_logits(output.outputs[0].logprobs) for output in outputs
            ]
        return answer

    def stream(
        self, prompt: Sequence[int], output_tokens: int
    ) -> Iterator[dict[str, Any]]:
        """Generate one text; see :meth:`benchmarks.process.VariantProcess.stream`."""
        return stream(
            self._llm, str(next(self._ids)), prompt, output_tokens, self._counts
        )

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.llm_engine.engine_core.shutdown()

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Any, concurrency: Concurrency
    ) -> list[Any]:
        """A closed loop: `LLM.generate` would start all requests at once."""
        engine = self._llm.llm_engine
        waiting = list(enumerate(prompts))[::-1]
        numbers: dict[str, int] = {}
        outputs: list[Any] = [None] * len(prompts)

        while waiting or numbers:
            while waiting and len(numbers) < concurrency.limit:
                number, prompt = waiting.pop()
                request_id = str(next(self._ids))
                engine.add_request(
                    request_id, {"prompt_token_ids": list(prompt)}, params.clone()
                )
                numbers[request_id] = number
            for output in engine.step():
                if output.finished:
                    outputs[numbers.pop(output.request_id)] = output
                    concurrency.finished()
        return outputs

    def _speculation(self) -> dict[str, float]:
        totals = {"drafts": 0.0, "draft_tokens": 0.0, "accepted": 0.0}
        names = {
            _DRAFTS: "drafts",
            _DRAFT_TOKENS: "draft_tokens",
            _ACCEPTED: "accepted",
        }
        for metric in self._llm.get_metrics():
            if metric.name in names:
                totals[names[metric.name]] += metric.value
        return totals


def stream(
    llm: Any,
    request_id: str,
    prompt: Sequence[int],
    output_tokens: int,
    predicts_early: bool,
) -> Iterator[dict[str, Any]]:
    """Generate one text greedily, step by step.

    Args:
        llm: A ``vllm.LLM`` whose engine runs in this process, with nothing else to do.
        request_id: Of the request.
        prompt: Token ids.
        output_tokens: Most tokens to generate.
        predicts_early: Whether it has AdaDecode.

    Yields:
        See :meth:`benchmarks.process.VariantProcess.stream`.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=output_tokens,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    engine = llm.llm_engine
    started = time.perf_counter()
    engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, params)
    drafts: list[tuple[int, int]] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        seconds = time.perf_counter() - started
        new = [token for output in outputs for token in output.outputs[0].token_ids]
        # The step verified the drafts: the first ones are what the model says itself.
        accepted = 0
        for (draft, _), token in zip(drafts, new, strict=False):
            if draft != token:
                break
            accepted += 1
        layers = [layer for _, layer in drafts[:accepted]]
        layers += [None] * (len(new) - accepted)
        yield {
            "seconds": seconds,
            "tokens": list(zip(new, layers, strict=True)),
            # A text that ends needs no further drafts, right or wrong.
            "rejected": drafts[accepted:] if len(new) > accepted else [],
        }
        drafts = []
        if predicts_early:
            (found,) = llm.collective_rpc("adadecode_drafts")
            drafts = next(iter(found.values()), [])


def _tpot(output: Any) -> float | None:
    """Seconds per token after the first; None for a single token."""
    metrics, tokens = output.metrics, len(output.outputs[0].token_ids)
    if tokens < 2:
        return None
    return (metrics.last_token_ts - metrics.first_token_ts) / (tokens - 1)
