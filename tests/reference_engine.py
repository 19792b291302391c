# SPDX-License-Identifier: Apache-2.0
"""An imitation of vLLM's step loop around the core, with mishaps.

:class:`Engine` drives the core's parts on a reference model, with the mishaps of
:data:`EVENTS`. :func:`plain_decoding` is the loop without any of that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from adadecode_vllm.method.admission import AcceptanceRecord, Admission
from adadecode_vllm.method.cycle import DraftRequests
from adadecode_vllm.method.drafting import Drafter
from adadecode_vllm.method.executor import TokenSubset
from adadecode_vllm.method.ledger import Ledger, Resumable, Window
from adadecode_vllm.method.policy import ThresholdPolicy
from adadecode_vllm.method.resume import Resumer, ScheduledBatch
from adadecode_vllm.method.states import PendingStates
from adadecode_vllm.method.stats import Stats
from tests.reference_model import WIDTH, ReferenceModel, View
from tests.reference_steps import WholeSteps

Event = tuple[str, int]
EVENTS = (
    "none",
    "skip",  # an engine step without a forward
    "hold",  # a running request is not scheduled in this step
    "preempt",  # a request loses its KV and starts again later
    "bounce",  # the same, but it starts again in this very step
    "truncate",  # a request's last drafts are not scheduled
    "change",  # a draft is replaced by another token
    "rollback",  # the KV of a request's last tokens is lost
    "abort",
    "reorder",  # batch rows are permuted
)


def plain_decoding(
    model: ReferenceModel,
    prompt: Sequence[int],
    max_tokens: int,
    stop_token_ids: frozenset[int] = frozenset(),
) -> tuple[list[int], dict[tuple[int, ...], torch.Tensor]]:
    """Generate greedily, one token per forward, prompt included.

    Args:
        model: A model of its own: blocks 0, 1, ... are used.
        prompt: Token ids.
        max_tokens: Tokens to generate.
        stop_token_ids: Tokens to end after.

    Returns:
        The generated tokens, and the final hidden state after each prefix.
    """
    tokens = list(prompt)
    finals = {}
    view = View(0, list(range(model.num_blocks)), tokens, (0, 1 << 30))
    model.views = {0: view}
    one = np.ones(1, np.int64)
    generated: list[int] = []
    position = 0
    while len(generated) < max_tokens and not stop_token_ids & set(generated):
        subset = TokenSubset(one * 0, one * position, one)
        final = model.forward(subset, torch.tensor([tokens[position]]))
        position += 1
        finals[tuple(tokens[:position])] = final[0]
        if position == len(tokens):
            generated += model.next_tokens(final)
            tokens.append(generated[-1])
    return generated, finals


@dataclass
class Request:
    """A request, as vLLM's scheduler and worker see it."""

    number: int
    tokens: list[int]
    prompt_length: int
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    started: bool = False
    aborted: bool = False

    @property
    def id(self) -> str:
        return f"request-{self.number}"

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclass
class Schedule:
    """One step's decisions.

    Attributes:
        counts: Scheduled tokens per request number.
        drafts: Scheduled drafts per request number.
        rebuilt: Numbers of requests that are new or resumed after a preemption.
    """

    counts: dict[int, int] = field(default_factory=dict)
    drafts: dict[int, list[int]] = field(default_factory=dict)
    rebuilt: set[int] = field(default_factory=set)


class Engine:
    """vLLM's step loop in small, around the parts of the core."""

    def __init__(
        self,
        model: ReferenceModel,
        *,
        cap: int = 3,
        threshold: float = 0.5,
        guess_threshold: float = 1.0,
        token_budget: int = 8,
        max_num_seqs: int = 4,
        max_model_len: int = 32,
        step_tokens: int = 0,
        admission: float | None = None,
    ) -> None:
        """Wire the parts.

        Args:
            model: The model; its blocks must hold at least one whole request.
            cap: Most early predictions of a request.
            threshold: gamma.
            guess_threshold: For unsure guesses of the last exit; 1 for none.
            token_budget: Tokens per step; less than a prompt cuts it into chunks.
            max_num_seqs: Requests per step.
            max_model_len: Most tokens of a request.
            step_tokens: Largest resumed forward that runs in whole steps.
            admission: What drafts of every other request must promise; None for none.
        """
        assert model.num_blocks * model.block_size >= max_model_len
        self.model = model
        self.cap = cap
        self.admission = admission
        self.record = AcceptanceRecord()
        self.token_budget = token_budget
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.policy = ThresholdPolicy(
            [threshold] * len(model.exit_layers), cap, guess_threshold
        )
        self.stats = Stats(model.exit_layers, model.num_layers)
        self.ledger = Ledger()
        self.states = PendingStates(
            max_num_seqs,
            cap + 1,
            model.state_width,
            torch.float32,
            torch.device("cpu"),
            with_memory=True,
        )
        if step_tokens:
            model.steps = WholeSteps(model, self.states, step_tokens)
        self.drafter = Drafter(model, self.states, self.policy, self.stats)
        self.resumer = Resumer(model, self.states, self.stats)
        self.finals: dict[tuple[int, ...], torch.Tensor] = {}
        self.requests: list[Request] = []
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.rows: list[Request] = []
        self.step_number = 0
        self.compared_states = 0
        self._free = list(range(model.num_blocks))
        self._exits: dict[int, np.ndarray] = {}
        self._final_rows: dict[int, int] = {}

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> Request:
        """Add a request."""
        assert len(prompt) + max_tokens <= self.max_model_len
        request = Request(
            len(self.requests), list(prompt), len(prompt), max_tokens, stop_token_ids
        )
        self.requests.append(request)
        self.waiting.append(request)
        return request

    def run(self, events: Sequence[Event] = ()) -> None:
        """Step until every request is finished, with one event per step."""
        pending = list(events)
        for _ in range(2000):
            if not self.waiting and not self.running:
                return
            self.step(pending.pop(0) if pending else ("none", 0))
        raise AssertionError("the engine makes no progress")

    def step(self, event: Event = ("none", 0)) -> None:
        """Schedule, run the model, verify, draft: one engine step."""
        self.step_number += 1
        schedule = self._schedule(*event)
        if not schedule.counts:
            return
        self._arrange_rows(schedule, *event)
        final, starts = self._forward(schedule)
        sampled = self._verify(schedule, final, starts)
        for request in self.rows:
            request.tokens += sampled.get(request.number, [])
        drafts = self._draft([r for r in self.rows if r.number in sampled], final)
        for request in self.rows:
            if request.number in sampled:
                request.drafts = drafts.get(request.number, [])
                self._finish_if_done(request)

    # The scheduler

    def _schedule(self, kind: str, argument: int) -> Schedule:
        schedule = Schedule()
        held = None
        may_admit = True
        if kind == "skip":
            return schedule
        if self.running:
            chosen = self.running[argument % len(self.running)]
            if kind == "hold":
                held = chosen
            elif kind in ("preempt", "bounce"):
                self._preempt(chosen)
                may_admit = kind == "bounce"
            elif kind == "abort":
                chosen.aborted = True
                self._release(chosen)
            elif kind == "truncate":
                chosen.drafts = chosen.drafts[: argument % (len(chosen.drafts) + 1)]
            elif kind == "change" and chosen.drafts:
                place = argument % len(chosen.drafts)
                token = (chosen.drafts[place] + 1) % self.model.vocab_size
                chosen.drafts[place] = token
            elif kind == "rollback":
                lost = min(chosen.computed, 1 + argument % 3)
                chosen.computed -= lost
                slots = self.model.block_slots(chosen.blocks)[chosen.computed :]
                self.model.poison(slots)
        budget = self.token_budget
        lookahead = self._lookahead()
        for request in list(self.running):
            if request is held or request not in self.running:
                continue
            count = self._wanted(request, budget)
            while count > 0 and not self._allocate(request, count + lookahead):
                victim = self.running[-1]
                self._preempt(victim)
                may_admit = False
                if victim is request:
                    count = 0
            if count > 0:
                self._admit(schedule, request, count)
                budget -= count
        while may_admit and self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            count = self._wanted(request, budget)
            if count <= 0 or not self._allocate(request, count + lookahead):
                break
            self.running.append(self.waiting.pop(0))
            schedule.rebuilt.add(request.number)
            self._admit(schedule, request, count)
            budget -= count
        return schedule

    def _wanted(self, request: Request, budget: int) -> int:
        count = len(request.tokens) + len(request.drafts) - request.computed
        return min(count, budget, self.max_model_len - 1 - request.computed)

    def _lookahead(self) -> int:
        """The reservation of ``AdaDecodeScheduler``."""
        blocks = -(-(1 + 2 * self.cap) // self.model.block_size) + 1
        affordable = len(self._free) >= blocks * (len(self.running) + 1)
        return self.cap if affordable else 0

    def _allocate(self, request: Request, tokens: int) -> bool:
        end = min(request.computed + tokens, self.max_model_len)
        missing = -(-end // self.model.block_size) - len(request.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            request.blocks.append(self._free.pop())
        return True

    def _admit(self, schedule: Schedule, request: Request, count: int) -> None:
        past = max(0, request.computed + count - len(request.tokens))
        schedule.counts[request.number] = count
        schedule.drafts[request.number] = request.drafts[:past]
        request.drafts = []

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.computed = 0
        request.drafts = []
        self.waiting.insert(0, request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.model.poison(self.model.block_slots(request.blocks))
        self._free += request.blocks
        request.blocks = []

    def _finish_if_done(self, request: Request) -> None:
        """Keep what precedes the end, as vLLM's scheduler does after the step."""
        for length, token in enumerate(request.generated, 1):
            if length == request.max_tokens or token in request.stop_token_ids:
                del request.tokens[request.prompt_length + length :]
                self._release(request)
                return

    # The worker

    def _arrange_rows(self, schedule: Schedule, kind: str, argument: int) -> None:
        scheduled = [r for r in self.requests if r.number in schedule.counts]
        kept = [request for request in self.rows if request in scheduled]
        self.rows = kept + [request for request in scheduled if request not in kept]
        if kind == "reorder":
            random.Random(argument).shuffle(self.rows)

    def _forward(self, schedule: Schedule) -> tuple[torch.Tensor, np.ndarray]:
        numbers = [request.number for request in self.rows]
        first = np.array([request.computed for request in self.rows], np.int64)
        count = np.array([schedule.counts[number] for number in numbers], np.int64)
        table = np.full((len(self.rows), self.max_model_len), -7, np.int64)
        self.model.drafting = False
        self.model.views = {}
        for row, request in enumerate(self.rows):
            tokens = request.tokens + schedule.drafts[request.number]
            table[row, : len(tokens)] = tokens
            end = int(first[row] + count[row])
            view = View(request.number, request.blocks, tokens, (int(first[row]), end))
            self.model.views[row] = view
        resumable = self._take(schedule, first, count, table)
        rows = np.arange(len(self.rows))
        starts = np.concatenate(([0], np.cumsum(count)))
        token_ids = torch.from_numpy(
            np.concatenate([table[r, first[r] : first[r] + count[r]] for r in rows])
        )
        if resumable is None:
            subset = TokenSubset(rows, first, count)
            final = self.model.forward(subset, token_ids)
        else:
            batch = ScheduledBatch(rows, first, count, token_ids)
            final = self.resumer.forward(batch, resumable)
        assert final.shape == (len(token_ids), WIDTH)
        for row in rows:
            for offset in range(count[row]):
                prefix = tuple(table[row, : first[row] + offset + 1].tolist())
                if prefix in self.finals:
                    self.compared_states += 1
                    found = final[starts[row] + offset]
                    assert torch.equal(found, self.finals[prefix]), "I4"
        return final, starts

    def _take(
        self,
        schedule: Schedule,
        first: np.ndarray,
        count: np.ndarray,
        table: np.ndarray,
    ) -> Resumable | None:
        if not len(self.ledger):
            return None
        offered = {
            request.id: row
            for row, request in enumerate(self.rows)
            if request.number not in schedule.rebuilt
        }
        resumable = self.ledger.take(self.step_number, offered, first, count, table)
        assert len(self.ledger) == 0
        if resumable is not None:
            assert (np.diff(resumable.levels, axis=1) <= 0).all(), "I1"
            assert len(set(resumable.requests.tolist())) == len(resumable.requests)
        return resumable

    def _verify(
        self, schedule: Schedule, final: torch.Tensor, starts: np.ndarray
    ) -> dict[int, list[int]]:
        """Sample greedily; accepted drafts and one more token per request."""
        sampled = {}
        for row, request in enumerate(self.rows):
            count = schedule.counts[request.number]
            drafts = schedule.drafts[request.number]
            request.computed += count
            if request.computed < len(request.tokens):
                continue
            end = int(starts[row]) + count
            chosen = self.model.next_tokens(final[end - len(drafts) - 1 : end])
            accepted = 0
            self._final_rows[request.number] = end - len(drafts) - 1
            while accepted < len(drafts) and drafts[accepted] == chosen[accepted]:
                accepted += 1
            sampled[request.number] = chosen[: accepted + 1]
            self._final_rows[request.number] += accepted
            request.computed -= len(drafts) - accepted
            exits = self._exits.pop(request.number, None)
            if exits is not None:
                self.stats.record_acceptance(exits[: len(drafts)], accepted)
        self.stats.request_steps += len(sampled)
        self.stats.generated_tokens += sum(map(len, sampled.values()))
        return sampled

    def _draft(
        self, requests: list[Request], final: torch.Tensor
    ) -> dict[int, list[int]]:
        if not self.policy.can_predict:
            return {}
        limits = {request.number: self._limit(request) for request in requests}
        requests = [request for request in requests if limits[request.number] > 0]
        if not requests:
            return {}
        rows = {request.number: row for row, request in enumerate(self.rows)}
        self.model.drafting = True
        self.model.views = {}
        slots_left = {}
        places = np.zeros((len(final), 2), np.int64)
        for request in requests:
            position = len(request.tokens) - 1
            places[self._final_rows[request.number]] = position - 1, request.number
            slots_left[request.number] = self._owned(request) - position
            # The last prediction may be prefetched where there is a slot for it.
            needed = limits[request.number] + 1
            end = position + min(needed, slots_left[request.number])
            self.model.views[rows[request.number]] = View(
                request.number, request.blocks, list(request.tokens), (position, end)
            )
        final_states = self.model.final_states(final, places)
        for request in requests:
            view = self.model.views[rows[request.number]]
            row = self._final_rows[request.number]
            view.memory = {len(request.tokens) - 1: final_states[row]}
        numbers = [request.number for request in requests]
        admission = None
        if self.admission is not None:
            least = [np.nan if number % 2 else self.admission for number in numbers]
            admission = self.record.admission([r.id for r in requests], np.array(least))
        window = self.drafter.draft(
            DraftRequests(
                rows=np.array([rows[number] for number in numbers], np.int64),
                token_ids=np.array([r.tokens[-1] for r in requests], np.int64),
                positions=np.array([len(r.tokens) - 1 for r in requests], np.int64),
                limits=np.array([limits[number] for number in numbers], np.int64),
                stop_token_ids=[request.stop_token_ids for request in requests],
                slots_left=np.array(
                    [slots_left[number] for number in numbers], np.int64
                ),
                alone=len(numbers) == len(self.rows),
                final_states=final_states,
                final_rows=np.array([self._final_rows[number] for number in numbers]),
                admission=admission,
            )
        )
        window = self.drafter.prefetch() or window
        self._check_window(window, [limits[number] for number in numbers])
        if admission is not None:
            _check_admission(window, admission)
        self.ledger.record(self.step_number, [r.id for r in requests], window)
        drafts = {}
        for index, number in enumerate(numbers):
            predicted = slice(1, window.length[index])
            drafts[number] = window.token_ids[index, predicted].tolist()
            self._exits[number] = window.exits[index, predicted]
        return drafts

    def _limit(self, request: Request) -> int:
        """The bounds of ``AdaDecodeProposer``."""
        position = len(request.tokens) - 1
        if request.tokens[-1] in request.stop_token_ids:
            return 0
        return max(
            0,
            min(
                self.cap,
                self._owned(request) - position,
                self.max_model_len - 2 - position,
                request.max_tokens - len(request.generated) - 1,
            ),
        )

    def _owned(self, request: Request) -> int:
        return len(request.blocks) * self.model.block_size

    def _check_window(self, window: Window, limits: list[int]) -> None:
        for index, limit in enumerate(limits):
            length = int(window.length[index])
            assert 1 <= length <= limit + 1, "limits"
            levels = window.levels[index, :length]
            assert (np.diff(levels) <= 0).all(), "I1"
            at_embedding = self.model.exits_at_embedding
            assert levels[0] > 0 or at_embedding, "the newest token ran"
            done = levels == self.model.num_segments
            assert done.all() or not done.any(), "all tokens are done, or none"
            exits = window.exits[index, :length]
            assert exits[0] == -1
            assert (exits[1:] >= 0).all()
            # A token is predicted at an exit that the one before it has reached.
            assert (levels[:-1] + at_embedding > exits[1:]).all()


def _check_admission(window: Window, admission: Admission) -> None:
    """No draft of a request that costs decide about promises too little."""
    assert window.expected is not None
    drafted = window.exits >= 0
    survival = np.where(drafted, window.expected, 1.0).cumprod(axis=1)
    for row, least in enumerate(admission.least):
        if not np.isnan(least):
            assert (survival[row][drafted[row]] > least).all()
