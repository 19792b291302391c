# SPDX-License-Identifier: Apache-2.0
"""The parts of the method, assembled for one worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from adadecode_vllm.config import AdaDecodeConfig, parse_config
from adadecode_vllm.core.device_timer import DeviceTimer
from adadecode_vllm.core.drafting import Drafter, DraftRequests
from adadecode_vllm.core.gate import Gate
from adadecode_vllm.core.ledger import REASONS, Ledger, Resumable
from adadecode_vllm.core.policy import ThresholdPolicy
from adadecode_vllm.core.resume import Resumer, ScheduledBatch
from adadecode_vllm.core.segments import Decoder, build_segments, find_decoder
from adadecode_vllm.core.states import PendingStates
from adadecode_vllm.core.stats import Stats
from adadecode_vllm.core.vllm_executor import VllmExecutor
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.features import fingerprint_mismatch
from adadecode_vllm.heads import (
    ExitHeads,
    check_fingerprint,
    load_draft_token_ids,
    load_heads_config,
)
from adadecode_vllm.request_options import (
    ENGINES,
    RequestOptions,
    parse_request_options,
)

logger = init_logger("vllm.adadecode")

# What the policy alone depends on; everything else is built at start-up.
_CHANGEABLE = {
    "threshold",
    "max_early_predictions",
    "gate",
    "last_guess",
    "synthetic_acceptance_rate",
}


class AdaDecode:
    """Early prediction for one loaded model.

    Attributes:
        executor: Runs segments and gates on vLLM.
        ledger: The pending tokens.
        policy: When to predict early.
        stats: Counters.
        timer: Measures the device's time, where that was asked for.
    """

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
        _check_lm_head(decoder, config, vllm_config)
        heads = ExitHeads.from_directory(
            config.heads, decoder.dtype, decoder.device, config.exit_layers
        )
        segments = build_segments(decoder, config.exit_layers, vllm_config)
        gate = Gate(decoder, heads, config.exit_layers, _draft_token_ids(config))
        self.executor = VllmExecutor(decoder, segments, gate, vllm_config)
        self._gate = gate
        self._config = config
        self.policy = _policy(config)
        self.stats = Stats(config.exit_layers, len(decoder.layers))
        self.ledger = Ledger()
        self.states = PendingStates(
            vllm_config.scheduler_config.max_num_seqs,
            config.max_early_predictions + 1,
            decoder.hidden_size,
            decoder.dtype,
            decoder.device,
        )
        self._drafter = Drafter(self.executor, self.states, self.policy, self.stats)
        self._resumer = Resumer(self.executor, self.states, self.stats)
        self.timer: DeviceTimer | None = None
        self._exits: dict[str, np.ndarray] = {}
        self._options: dict[str, RequestOptions] = {}
        self._contradicted: set[str] = set()

    @torch.inference_mode()
    def draft(
        self, step: int, request_ids: Sequence[str], requests: DraftRequests
    ) -> list[list[int]]:
        """Predict early and remember what is pending.

        Args:
            step: Number of the current engine step.
            request_ids: R request ids.
            requests: Their state. Those whose limit is 0 or whose newest token ends
                them are left alone.

        Returns:
            R lists of early predictions.
        """
        drafts: list[list[int]] = [[] for _ in request_ids]
        drafting = requests.going_on()
        if not len(drafting):
            return drafts
        if len(drafting) < len(request_ids):
            requests = requests.select(drafting)
        drafting_ids = [request_ids[request] for request in drafting]
        window = self._drafter.draft(requests)
        self.ledger.record(step, drafting_ids, window)
        for row, (request, request_id) in enumerate(
            zip(drafting, drafting_ids, strict=True)
        ):
            predicted = slice(1, window.length[row])
            drafts[request] = window.token_ids[row, predicted].tolist()
            self._exits[request_id] = window.exits[row, predicted]
        return drafts

    def options(
        self, asked: Iterable[tuple[str, Mapping[str, Any] | None]]
    ) -> list[RequestOptions] | None:
        """What requests ask for.

        Args:
            asked: R request ids, each with its ``SamplingParams.extra_args``.

        Returns:
            R requests' options; None if all leave everything to the engine, which is
            what a step should find out quickly.
        """
        asked = list(asked)
        if not any(extra_args for _, extra_args in asked):
            return None
        return [self._request_options(*request) for request in asked]

    def _request_options(
        self, request_id: str, extra_args: Mapping[str, Any] | None
    ) -> RequestOptions:
        """What a request asks for; remembered until it is forgotten."""
        if not extra_args:
            return ENGINES
        found = self._options.get(request_id)
        if found is None:
            try:
                # Validated at the front door.
                found = parse_request_options(extra_args, self._config)
            except AdaDecodeError as error:
                # Only a front door without this plugin lets such a request in.
                logger.warning("adadecode: request %s: %s", request_id, error)
                found = ENGINES
            self._options[request_id] = found
        return found

    def caps(
        self, options: Sequence[RequestOptions] | None, requests: int, most: int
    ) -> np.ndarray | None:
        """Most early predictions that requests ask for and the engine allows.

        Args:
            options: R requests' options, or None for the engine's.
            requests: R.
            most: The scheduler's bound for this step.

        Returns:
            (R,) int64, or None if nothing may be predicted early.
        """
        cap = min(self.policy.max_early_predictions, most)
        if options is None:
            caps = np.full(requests, cap if self.policy.can_predict else 0, np.int64)
        else:
            caps = np.array([self._cap(own, cap) for own in options], np.int64)
        return caps if caps.any() else None

    def _cap(self, own: RequestOptions, cap: int) -> int:
        if not (self.policy.can_predict if own.predicts is None else own.predicts):
            return 0
        asked = own.max_early_predictions
        return cap if asked is None else min(cap, asked)

    def thresholds(self, options: Sequence[RequestOptions] | None) -> np.ndarray | None:
        """Requests' own thresholds on the exits' probabilities.

        Args:
            options: R requests' options, or None for the engine's.

        Returns:
            (R, K), or None if all leave it to the policy.
        """
        if options is None or all(own.threshold is None for own in options):
            return None
        return np.array(
            [
                self.policy.thresholds
                if own.threshold is None
                else _own_thresholds(self._config, own.threshold)
                for own in options
            ]
        )

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

    def count_verdicts(
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
        for request_id, num_drafts in scheduled.items():
            exits = self._exits.pop(request_id, None)
            tokens = sampled.get(request_id, 0)
            if exits is not None and tokens:
                self.stats.count_verdict(exits[:num_drafts], tokens - 1)
                if tokens <= num_drafts and request_id not in self._contradicted:
                    self._contradicted.add(request_id)
                    self.stats.contradicted_requests += 1

    def weights(self) -> dict[str, torch.Tensor]:
        """What is ours beside the model's weights: storage of heads and gate, by name.

        Loading the model anew does not bring it back.
        """
        return {
            name: tensor.data
            for name, tensor in chain(
                self._gate.named_parameters(), self._gate.named_buffers()
            )
        }

    def counters(self) -> np.ndarray:
        """What the server's metrics show, since the start or the last reset; float64.

        Returns:
            :meth:`Stats.reported`, then the dropped tokens for each of
            :data:`adadecode_vllm.core.ledger.REASONS`.
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
        """Change when to predict early, for studies on a running engine.

        Args:
            options: Those of :data:`_CHANGEABLE`; what is not named stays.

        Raises:
            AdaDecodeError: If an option cannot be changed or its value is wrong.
        """
        if fixed := sorted(options.keys() - _CHANGEABLE):
            raise AdaDecodeError(
                f"adadecode_configure: {fixed[0]} cannot be changed on a running "
                "engine. Set it in --adadecode-config."
            )
        config = parse_config({**self._config.model_dump(), **options})
        room = self.states.window - 1
        if config.max_early_predictions > room:
            raise AdaDecodeError(
                f"adadecode_configure: max_early_predictions = "
                f"{config.max_early_predictions} is refused: this engine reserved room "
                f"for {room}. Start it with more in --adadecode-config."
            )
        self._config = config
        self.policy = _policy(config)
        self._drafter.policy = self.policy

    def forget(self, request_ids: set[str]) -> None:
        """Release what is remembered of finished requests."""
        for request_id in request_ids:
            self._exits.pop(request_id, None)
            self._options.pop(request_id, None)
        self._contradicted -= request_ids


def _policy(config: AdaDecodeConfig) -> ThresholdPolicy:
    assert config.exit_layers is not None, "resolved at start-up"
    guess = 1.0
    if config.last_guess:
        guess = load_heads_config(config.heads).guess_threshold(config.exit_layers[-1])
    rate = config.synthetic_acceptance_rate
    return ThresholdPolicy(
        _thresholds(config),
        config.max_early_predictions,
        guess,
        0.0 if rate is None else 1.0 - rate,
    )


def _draft_token_ids(config: AdaDecodeConfig) -> torch.Tensor | None:
    """The tokens that the gates look at; None for all."""
    if not config.draft_vocabulary_size:
        return None
    heads = load_heads_config(config.heads)
    token_ids = load_draft_token_ids(config.heads, heads)
    assert token_ids is not None, "refused at start-up"
    return token_ids[: config.draft_vocabulary_size]


def _thresholds(config: AdaDecodeConfig) -> list[float]:
    """The threshold on each used exit's probability that the gate amounts to."""
    assert config.exit_layers is not None, "resolved at start-up"
    if config.gate == "probability":
        return [config.threshold] * len(config.exit_layers)
    heads = load_heads_config(config.heads)
    by_layer = dict(
        zip(
            heads.exit_layers,
            heads.acceptance_thresholds(config.threshold),
            strict=True,
        )
    )
    return [by_layer[layer] for layer in config.exit_layers]


@lru_cache(maxsize=1024)
def _own_thresholds(config: AdaDecodeConfig, threshold: float) -> list[float]:
    return _thresholds(config.model_copy(update={"threshold": threshold}))


def _check_lm_head(
    decoder: Decoder, config: AdaDecodeConfig, vllm_config: VllmConfig
) -> None:
    """Compare the loaded LM head's rows with the heads' fingerprint.

    Start-up compares local checkpoints without loading them; this covers the others.
    A quantized LM head has no rows to compare, nor has one whose weight vLLM moved into
    a packed format of its own.
    """
    head: Any = decoder.lm_head
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or not weight.numel():
        return
    heads = load_heads_config(config.heads)
    first_row, rows = 0, heads.vocab_size
    if get_tensor_model_parallel_world_size() > 1:
        shard = head.shard_indices
        first_row = shard.org_vocab_start_index
        rows = shard.org_vocab_end_index - first_row
    if not check_fingerprint(
        heads.lm_head_fingerprint, weight[:rows], first_row, heads.vocab_size
    ):
        raise fingerprint_mismatch(
            config.heads, vllm_config.model_config.model, heads.base_model
        )
