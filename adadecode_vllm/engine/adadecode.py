# SPDX-License-Identifier: Apache-2.0
"""The parts of the method, assembled for one worker."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig

from adadecode_vllm.config import AdaDecodeConfig
from adadecode_vllm.engine.device_timer import DeviceTimer
from adadecode_vllm.engine.exit_scorer import ExitScorer
from adadecode_vllm.engine.ngram import NgramLookup
from adadecode_vllm.engine.segments import build_segments, find_decoder
from adadecode_vllm.engine.served_heads import load_served_heads
from adadecode_vllm.engine.settings import Settings
from adadecode_vllm.engine.split_model import SplitModel
from adadecode_vllm.engine.suffix import SuffixLookup
from adadecode_vllm.engine.vllm_executor import Backend, VllmExecutor
from adadecode_vllm.method.admission import AcceptanceRecord
from adadecode_vllm.method.combined import CombinedDrafter, Drafts
from adadecode_vllm.method.cycle import DraftRequests
from adadecode_vllm.method.drafting import Drafter
from adadecode_vllm.method.ledger import REASONS, Ledger, Resumable
from adadecode_vllm.method.lookup import Lookup
from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.method.resume import Resumer, ScheduledBatch
from adadecode_vllm.method.states import PendingStates
from adadecode_vllm.method.stats import Stats


class AdaDecode:
    """Early prediction for one loaded model.

    Attributes:
        model: The model, split at the exits.
        executor: Runs its parts; exists once there is a KV cache, see :meth:`bind`.
        ledger: The pending tokens.
        record: What became of requests' drafts.
        settings: When to predict early, and what requests ask for.
        stats: Counters.
        timer: Measures the device's time, where that was asked for.
    """

    executor: VllmExecutor
    _drafter: Drafter
    _combined: CombinedDrafter
    _resumer: Resumer

    def __init__(
        self, model: nn.Module, config: AdaDecodeConfig, vllm_config: VllmConfig
    ) -> None:
        """Split the model, load the heads and allocate the buffers.

        Args:
            model: The model as vLLM loaded it.
            config: Resolved options: ``exit_layers`` is set.
            vllm_config: The engine's configuration.

        Raises:
            AdaDecodeError: If the model or the heads do not fit.
        """
        assert config.exit_layers is not None, "resolved at start-up"
        decoder = find_decoder(model)
        heads = load_served_heads(config, decoder, vllm_config.model_config.model)
        segments = build_segments(decoder, config.exit_layers, vllm_config)
        scorer = ExitScorer(
            decoder, heads.exits, config.exit_layers, heads.draft_token_ids
        )
        self.model = SplitModel(decoder, segments, scorer, vllm_config)
        self.settings = Settings(config, heads.config)
        self.stats = Stats(config.exit_layers, len(decoder.layers))
        self.ledger = Ledger()
        self.record = AcceptanceRecord()
        self.states = PendingStates(
            vllm_config.scheduler_config.max_num_seqs,
            config.max_early_predictions + 1,
            decoder.hidden_size,
            decoder.dtype,
            decoder.device,
            with_memory=scorer.has_memory,
        )
        self._max_model_len = vllm_config.model_config.max_model_len
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._looks_in = config.lookup
        self._lookup: Lookup | None = None
        if config.ngram != "off":
            # Compiled before anything is served where the engine asks for it.
            self._find_lookup()
        self.timer: DeviceTimer | None = None
        self._drafts: dict[str, Drafts] = {}
        # Of this step's verification; the last ones only, since drafting stops after a
        # token that ends its request.
        self._last_accepted: dict[str, int] = {}
        self._contradicted: set[str] = set()

    def bind(self, backend: Backend) -> None:
        """Run on a KV cache, or on another one, or with other graphs.

        Args:
            backend: What exists by now.
        """
        self.executor = VllmExecutor(self.model, backend)
        self._drafter = Drafter(
            self.executor, self.states, self.settings.policy, self.stats
        )
        self._combined = CombinedDrafter(
            self._drafter, self.record, self.stats, self._find_lookup
        )
        self._resumer = Resumer(self.executor, self.states, self.stats)

    @property
    def scorer(self) -> ExitScorer:
        """The exit heads over the model's LM head."""
        return self.model.scorer

    @property
    def policy(self) -> ThresholdPolicy:
        """When to predict early, where a request leaves that to the engine."""
        return self.settings.policy

    @torch.inference_mode()
    def draft(
        self, step: int, request_ids: Sequence[str], requests: DraftRequests
    ) -> list[list[int]]:
        """Predict early and remember what is pending.

        Args:
            step: Number of the current engine step.
            request_ids: R request ids.
            requests: Their state. Those whose limit is 0, or whose newest token or last
                accepted draft ends them, are left alone.

        Returns:
            R lists of drafts, by exits and by lookup.
        """
        drafts: list[list[int]] = [[] for _ in request_ids]
        drafting = np.array(
            [
                request
                for request in requests.going_on().tolist()
                if self._last_accepted.get(request_ids[request], -1)
                not in requests.stop_token_ids[request]
            ],
            np.int64,
        )
        if not len(drafting):
            return drafts
        if len(drafting) < len(request_ids):
            requests = requests.select(drafting)
        drafting_ids = [request_ids[request] for request in drafting]
        window, found = self._combined.draft(drafting_ids, requests)
        self.ledger.record(step, drafting_ids, window)
        for request, request_id, own in zip(drafting, drafting_ids, found, strict=True):
            drafts[request] = own.token_ids
            self._drafts[request_id] = own
        return drafts

    def _find_lookup(self) -> Lookup:
        """What looks up; made now where a request is the first to ask."""
        if self._lookup is None:
            if self._looks_in == "suffix":
                self._lookup = SuffixLookup(self._vocab_size)
            else:
                self._lookup = NgramLookup(self._max_model_len, self._vocab_size)
        return self._lookup

    def runs_in_steps(self, batch: ScheduledBatch) -> bool:
        """Whether :meth:`forward` can run outside vLLM's forward context."""
        return self._resumer.runs_in_steps(batch)

    def forward(
        self, batch: ScheduledBatch, resumable: Resumable, positions: torch.Tensor
    ) -> torch.Tensor:
        """Run a batch with pending tokens.

        Inside vLLM's own forward context, unless :meth:`runs_in_steps`.

        Args:
            batch: All scheduled tokens, N.
            resumable: Those that have come some way.
            positions: (N,) their positions.

        Returns:
            (N, d) final hidden states.
        """
        with self.executor.within_forward(positions), self.measure("resumed forwards"):
            return self._resumer.forward(batch, resumable)

    def measure(self, name: str) -> AbstractContextManager[None]:
        """Let the device timer, where there is one, see a part of the cycle."""
        return nullcontext() if self.timer is None else self.timer.measure(name)

    def record_acceptance(
        self, sampled: dict[str, int], scheduled: dict[str, int]
    ) -> None:
        """Count what a step's verification said.

        Args:
            sampled: Number of tokens that the step yielded, for each request that
                sampled any.
            scheduled: Number of drafts that were verified, per request with drafts.
        """
        self.stats.request_steps += len(sampled)
        self.stats.generated_tokens += sum(sampled.values())
        self._last_accepted.clear()
        for request_id, num_drafts in scheduled.items():
            drafts = self._drafts.pop(request_id, None)
            tokens = sampled.get(request_id, 0)
            if drafts is not None and tokens:
                verified = drafts.exits[:num_drafts]
                # vLLM's warm-up verifies placeholders that nothing was drafted for.
                accepted = min(tokens - 1, len(verified))
                if accepted:
                    self._last_accepted[request_id] = drafts.token_ids[accepted - 1]
                if drafts.expected is not None:
                    expected = drafts.expected[:num_drafts]
                    self.record.record_acceptance(
                        request_id, verified, expected, accepted
                    )
                self.stats.record_acceptance(verified, accepted)
                contradicted = accepted < len(verified) and verified[accepted] >= 0
                if contradicted and request_id not in self._contradicted:
                    self._contradicted.add(request_id)
                    self.stats.contradicted_requests += 1

    @contextmanager
    def new_weights(self, reason: str) -> Iterator[None]:
        """Around what gives the model other weights; all ranks together.

        What the old ones computed is dropped (I2), and what was copied from them is
        copied again.

        Args:
            reason: One of :data:`adadecode_vllm.method.ledger.REASONS`.
        """
        self.ledger.clear(reason)
        yield
        self.scorer.refresh()

    def counters(self) -> np.ndarray:
        """What the server's metrics show, since the start or the last reset; float64.

        Returns:
            :meth:`Stats.reported`, then the dropped tokens for each of
            :data:`adadecode_vllm.method.ledger.REASONS`.
        """
        dropped = self.ledger.dropped_tokens
        return np.concatenate(
            [self.stats.reported(), [dropped[reason] for reason in REASONS]]
        )

    def reset_counters(self) -> None:
        """Set all counters to zero."""
        self.stats.reset()
        self.ledger.reset_counts()
        if self.timer is not None:
            self.timer.reset()

    def configure(self, options: Mapping[str, Any]) -> None:
        """Change when to predict early; see :meth:`Settings.configure`."""
        self.settings.configure(options)
        self._drafter.decisions.policy = self.settings.policy

    def forget_answers(self) -> None:
        """Look in each request alone from now on; see `SuffixLookup`."""
        if self._looks_in == "suffix":
            lookup = self._find_lookup()
            assert isinstance(lookup, SuffixLookup)
            lookup.forget_answers()

    def drafts(self) -> dict[str, list[tuple[int, int]]]:
        """Drafts that wait for their verification.

        Returns:
            By request, in order, the token and the index of its exit; below 0 for
            n-gram lookup.
        """
        return {
            request_id: list(zip(drafts.token_ids, drafts.exits.tolist(), strict=True))
            for request_id, drafts in self._drafts.items()
        }

    def forget(self, request_ids: Collection[str]) -> None:
        """Release what is remembered of finished requests."""
        for request_id in request_ids:
            self._drafts.pop(request_id, None)
        self._contradicted.difference_update(request_ids)
        self.record.forget(request_ids)
        if self._lookup is not None:
            self._lookup.forget(request_ids)
        self.settings.forget(request_ids)
