# SPDX-License-Identifier: Apache-2.0
"""The engine's decoding cycles, played on known answers.

The answer of a model at temperature 0 is known, so nothing is generated: the simulation
walks along it and asks, at every token, what the exits would have said. Where a wrong
prediction leads off the answer, the model is run on that text too. Drafting, n-gram
lookup and the decisions by cost are the engine's own code, which runs here on a clock
that costs drive. The counters are therefore those of the engine, not an estimate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import cast

import numpy as np
import torch

from adadecode_vllm.config import Ngram
from adadecode_vllm.engine.adaptive import AdaptiveDrafting
from adadecode_vllm.method.admission import AcceptanceRecord
from adadecode_vllm.method.combined import CombinedDrafter, Drafts
from adadecode_vllm.method.cycle import DraftRequests
from adadecode_vllm.method.drafting import Drafter
from adadecode_vllm.method.executor import SegmentExecutor
from adadecode_vllm.method.lookup import Lookup
from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.method.states import PendingStates
from adadecode_vllm.method.stats import Stats
from adadecode_vllm.toolkit.evaluation.counters import Counters, StepCosts
from adadecode_vllm.toolkit.evaluation.known_exits import Answer, KnownExits


@dataclass(frozen=True)
class Setting:
    """How a simulated engine is started.

    Attributes:
        exit_layers: Layer counts of the exits.
        num_layers: L.
        policy: When an exit's prediction is taken, and the cap.
        ngram: Drafts by n-gram lookup.
        lookup: What looks up; None where `ngram` is off.
        by_costs: Whether drafts are made where and as far as they pay, instead of by
            the policy's thresholds.
        requests: Most requests at a time; None for all at once.
        timed_alone: Whether requests that run together take what each takes alone,
            which is faster to play than one after the other. Not where drafts are made
            by costs, which depend on the batch.
    """

    exit_layers: tuple[int, ...]
    num_layers: int
    policy: ThresholdPolicy
    ngram: Ngram = "off"
    lookup: Lookup | None = None
    by_costs: bool = False
    requests: int | None = None
    timed_alone: bool = False


def without_drafts(setting: Setting) -> Setting:
    """The same engine, decoding plainly.

    Args:
        setting: The engine.
    """
    never = ThresholdPolicy([1.0] * len(setting.exit_layers), 1)
    return replace(setting, policy=never, ngram="off", by_costs=False)


def total(
    answers: Sequence[Answer],
    setting: Setting,
    costs: StepCosts | None = None,
    advance: Callable[[int], None] = lambda answers: None,
) -> Counters:
    """Decode answers, in their order.

    Args:
        answers: The answers.
        setting: The engine.
        costs: What its steps take; None for nothing, where `by_costs` is off.
        advance: Called with how many further answers were decoded.

    Returns:
        The counters. Prompts cost nothing.
    """
    return _Engine(answers, setting, costs or StepCosts()).run(advance)


@dataclass
class _Request:
    """A request that runs.

    Attributes:
        request_id: Its name.
        row: Its row in the batch.
        answer: Its answer.
        token_ids: (n,) int32, prompt and answer.
        done: Answer tokens that are verified.
        drafts: Waiting for their verification.
        levels: (w,) of the window's tokens and the drafts by lookup behind it.
    """

    request_id: str
    row: int
    answer: Answer
    token_ids: np.ndarray
    done: int = 0
    drafts: Drafts | None = None
    levels: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @property
    def position(self) -> int:
        """Of the newest token."""
        return len(self.answer.prompt) + self.done - 1

    @property
    def ended(self) -> bool:
        """Whether the whole answer is verified."""
        return self.done >= len(self.answer.tokens)

    def limit(self, most: int) -> int:
        """Most drafts; see :func:`adadecode_vllm.engine.limits.draft_limits`."""
        answer = self.answer
        left = min(answer.max_tokens, answer.length_limit) - self.done - 1
        return max(0, min(most, left))


class _Engine:
    """Scheduler and worker of one simulated engine."""

    def __init__(
        self, answers: Sequence[Answer], setting: Setting, costs: StepCosts
    ) -> None:
        rows = min(setting.requests or len(answers), len(answers))
        cap = setting.policy.max_draft_tokens
        self._setting = setting
        self._counters = Counters(setting.exit_layers, setting.num_layers)
        self._waiting = deque(enumerate(answers))
        self._running: list[_Request] = []
        self._free = list(range(rows))[::-1]
        self._clock = 0.0
        self._adaptive = None
        if setting.by_costs and rows:
            self._adaptive = AdaptiveDrafting(rows, lambda: self._clock)
        self._exits = KnownExits(
            setting.exit_layers,
            setting.num_layers,
            cap + 1,
            costs.drafting,
            timed_alone=setting.timed_alone,
        )
        # What a forward takes, by the rows of its segments, of which there are few.
        self._verifying = lru_cache(maxsize=4096)(
            lambda *rows: costs.verifying(
                list(zip(self._exits.shares, rows, strict=True))
            )
        )
        self._stats = Stats(setting.exit_layers, setting.num_layers)
        self._record = AcceptanceRecord()
        self._drafter = CombinedDrafter(
            Drafter(
                # All that drafting asks of an executor whose steps are prepared.
                cast(SegmentExecutor, self._exits),
                PendingStates(rows, cap + 1, 1, torch.float32, torch.device("cpu")),
                setting.policy,
                self._stats,
            ),
            self._record,
            self._stats,
            self._lookup,
        )

    def _lookup(self) -> Lookup:
        assert self._setting.lookup is not None, "given where n-grams are looked up"
        return self._setting.lookup

    def run(self, advance: Callable[[int], None]) -> Counters:
        """Decode everything."""
        while self._waiting or self._running:
            if ended := self._step():
                advance(ended)
        counters, stats = self._counters, self._stats
        for name in ("early_predictions", "accepted", "rejected", "gates"):
            setattr(counters, name, getattr(stats, name).tolist())
        for name in ("ngram_drafts", "ngram_accepted", "ngram_rejected"):
            setattr(counters, name, getattr(stats, name))
        ran = zip(counters.segments_run, self._exits.segments_run, strict=True)
        counters.segments_run = [sum(pair) for pair in ran]
        counters.time = self._clock
        return counters

    def _step(self) -> int:
        """One engine step, and the drafting behind it.

        Returns:
            Requests that ended.
        """
        while self._waiting and self._free:
            index, answer = self._waiting.popleft()
            token_ids = np.array((*answer.prompt, *answer.tokens), np.int32)
            self._running.append(
                _Request(str(index), self._free.pop(), answer, token_ids)
            )
        requests, adaptive = len(self._running), self._adaptive
        most = self._setting.policy.max_draft_tokens
        admission, exit_costs = None, []
        if adaptive is not None:
            admission = adaptive.admission(requests)
            exit_costs = adaptive.exit_costs(requests)
            most = most if adaptive.drafts(requests) else 0
        decoding = [request for request in self._running if request.done]
        drafts = sum(len(r.drafts.token_ids) for r in decoding if r.drafts)
        self._forward(decoding)
        sampled = sum(map(self._verify, self._running))
        ended = [request for request in self._running if request.ended]
        for request in ended:
            self._free.append(request.row)
            self._record.forget([request.request_id])
            if self._setting.lookup is not None:
                self._setting.lookup.forget([request.request_id])
        self._running = [request for request in self._running if not request.ended]
        if adaptive is not None:
            adaptive.step(
                requests=requests,
                drafted=most > 0,
                drafts=drafts,
                tokens=sampled,
                decodes=len(decoding) == requests,
                busy=bool(self._running),
                drafting_seconds=self._exits.exit_seconds[0].sum(),
                exit_seconds=self._exits.exit_seconds,
            )
        if most and self._running:
            self._draft(most, admission, exit_costs)
        return len(ended)

    def _forward(self, decoding: Sequence[_Request]) -> None:
        """Run the rest of the model for what is pending and new."""
        if not decoding:
            return
        first = self._exits.exits_at_embedding
        forwards: list[list[int]] = []
        for request in decoding:
            levels = request.levels
            rows = [0] * self._exits.num_segments
            for segment in range(int(levels.min()), len(rows)):
                rows[segment] = int((levels <= segment).sum())
                self._counters.segments_run[first + segment] += 1
            forwards.append(rows)
        self._counters.forwards += len(decoding)
        if not self._setting.timed_alone:
            forwards = [[sum(rows) for rows in zip(*forwards, strict=True)]]
        for rows in forwards:
            self._clock += self._verifying(*rows)

    def _verify(self, request: _Request) -> int:
        """Compare drafts with the answer.

        Returns:
            Tokens that the request sampled.
        """
        if not request.done:
            request.done = 1  # the prefill's forward yields the first token
            return 1
        accepted, drafts = 0, request.drafts
        rest = request.answer.tokens[request.done :]
        if drafts is not None and drafts.token_ids:
            for draft, own in zip(drafts.token_ids, rest, strict=False):
                if draft != own:
                    break
                accepted += 1
            if drafts.expected is not None:
                self._record.record_acceptance(
                    request.request_id, drafts.exits, drafts.expected, accepted
                )
            self._stats.record_acceptance(drafts.exits, accepted)
        kept = min(accepted + 1, len(rest))
        self._counters.generated_tokens += kept
        request.done += kept
        request.drafts, request.levels = None, np.zeros(1, np.int64)
        return accepted + 1

    def _draft(
        self, most: int, admission: float | None, exit_costs: Sequence[float]
    ) -> None:
        """One drafting cycle of all requests that go on."""
        running, setting = self._running, self._setting
        contexts = ways = None
        if setting.ngram != "off":
            contexts = [
                request.token_ids[: request.position + 1] for request in running
            ]
            ways = [setting.ngram] * len(running)
        request_ids = [request.request_id for request in running]
        requests = DraftRequests(
            rows=np.array([request.row for request in running]),
            token_ids=np.array(
                [request.answer.tokens[request.done - 1] for request in running]
            ),
            positions=np.array([request.position for request in running]),
            limits=np.array([request.limit(most) for request in running]),
            stop_token_ids=[request.answer.stops for request in running],
            contexts=contexts,
            ways=ways,
            admission=None
            if admission is None
            else self._record.admission(
                request_ids, np.full(len(running), admission), exit_costs
            ),
        )
        drafting = requests.going_on()
        if not len(drafting):
            return
        requests = requests.select(drafting)
        chosen = [running[index] for index in drafting]
        self._exits.begin([(r.row, r.answer, r.done) for r in chosen])
        window, drafts = self._drafter.draft([r.request_id for r in chosen], requests)
        self._clock += self._exits.time
        for row, (request, found) in enumerate(zip(chosen, drafts, strict=True)):
            request.drafts = found
            request.levels = np.zeros(1 + len(found.token_ids), np.int64)
            request.levels[: window.length[row]] = window.levels[
                row, : window.length[row]
            ]
