# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Transformers' generate, answering jobs of a measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.variants import EngineSettings, Variant


class TransformersBackend:
    """A model in Transformers, plain or drafting with its own first layers."""

    def __init__(self, variant: Variant, settings: EngineSettings) -> None:
        """Load the model.

        Args:
            variant: ``transformers`` or ``transformers-early-exit``.
            settings: The comparison's settings.
        """
        from transformers import AutoModelForCausalLM

        from adadecode_vllm.heads import load_heads_config

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=settings.dtype, trust_remote_code=False
        )
        self._model: Any = model.to(device).eval()
        self._early_exit = None
        if variant.kind == "transformers-early-exit":
            self._early_exit = load_heads_config(settings.heads).exit_layers[0]
        self._layers = self._model.config.num_hidden_layers
        self._forwards = 0
        self._model.register_forward_pre_hook(self._count_forward, with_kwargs=True)

    def configure(self, **policy: Any) -> None:
        """Nothing to change: threshold and cap are AdaDecode's."""

    @torch.inference_mode()
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
        """Generate greedily, batch after batch.

        Args:
            prompts: Token ids.
            batch_size: Requests at a time; Transformers has no continuous batching
                here, so a batch takes as long as its longest answer.
            output_tokens: Most tokens to generate for a prompt.
            ignore_eos: Generate all of them.
            oscillate_to: Not supported.
            top_logits: Not supported.

        Returns:
            See :meth:`benchmarks.process.VariantProcess.generate`.
        """
        assert oscillate_to is None, "refused by the benchmark"
        assert not top_logits, "asked of the baseline only, which is a vLLM engine"
        if self._early_exit is not None and batch_size > 1:
            raise RuntimeError("assistant_early_exit generates for one request only")
        token_ids: list[list[int]] = []
        ttft: list[float] = []
        tpot: list[float | None] = []
        self._forwards = 0
        started = time.perf_counter()
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            answers, times = self._generate(batch, output_tokens, ignore_eos)
            token_ids += answers
            ttft += [times[0] - times[-1]] * len(batch)
            for answer in answers:
                spread = times[-2] - times[0]
                tpot.append(spread / (len(answer) - 1) if len(answer) > 1 else None)
        return {
            "seconds": time.perf_counter() - started,
            "token_ids": token_ids,
            "ttft_s": ttft,
            "tpot_s": tpot,
            "forwards": self._forwards,
            "speculation": None,
            "stats": None,
        }

    def close(self) -> None:
        """Nothing to end."""

    def _generate(
        self, batch: Sequence[Sequence[int]], output_tokens: int, ignore_eos: bool
    ) -> tuple[list[list[int]], list[float]]:
        """One batch.

        Returns:
            The answers, and the times after each step with the start's at the end.
        """
        from transformers import GenerationConfig, StoppingCriteriaList

        times: list[float] = []

        def note_time(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        width = max(map(len, batch))
        eos = self._model.generation_config.eos_token_id
        padding = self._model.config.pad_token_id or 0
        ids = torch.full((len(batch), width), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=output_tokens,
            eos_token_id=None if ignore_eos else eos,
            pad_token_id=padding,
            assistant_early_exit=self._early_exit,
        )
        started = time.perf_counter()
        output = self._model.generate(
            ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([note_time]),
        )
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        answers = [
            _cut(row[width:].tolist(), set() if ignore_eos else ends) for row in output
        ]
        return answers, [*times, started]

    def _count_forward(
        self, module: Any, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> None:
        """Count a forward of the whole model once for each request in its batch."""
        # While drafting, assistant_early_exit lowers the number of layers.
        if module.config.num_hidden_layers == self._layers:
            self._forwards += len(inputs["input_ids"])


def _cut(tokens: list[int], ends: set[int]) -> list[int]:
    """Drop the padding after the end of the text; the end stays, as in vLLM."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens
