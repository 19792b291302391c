# SPDX-License-Identifier: Apache-2.0
"""An engine stepped by hand, with requests that arrive and are aborted meanwhile."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Sequence
from typing import Any

from vllm.v1.request import RequestStatus

from tests.reliability.differential.books import Books
from tests.reliability.differential.case import Request

GRAMMAR_SECONDS = 20
"""Most that the compilation of a grammar may take."""
IDLE_STEPS = 60
"""So many steps that schedule nothing, with requests unfinished, are a hang."""

TOKENLESS_STEPS = 1500
"""So many steps that yield no token are one as well; a long prompt takes far fewer."""


class Driver:
    """Runs streams on one engine."""

    def __init__(self, llm: Any) -> None:
        """Watch an engine.

        Args:
            llm: A `vllm.LLM` in this process.
        """
        self._core = llm.llm_engine
        self._scheduler = self._core.engine_core.engine_core.scheduler
        self._scheduled = 0
        self._streams = 0
        schedule = self._scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._scheduled += output.total_num_scheduled_tokens
            return output

        self._scheduler.schedule = watched
        self._books = Books(llm)

    def run(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Run a stream to its end.

        Args:
            requests: In any order.

        Returns:
            `answers`, one for each request; `failure`, None or a pair of its kind
            ("hang" or "death") and a text, after which the engine is of no use;
            `books`, sentences about what should not be; `counts`, what happened.
        """
        self._core.reset_prefix_cache()
        self._streams += 1
        stream = _Stream(self._core, requests, f"{self._streams}.")
        self._books.open()
        failure = None
        try:
            failure = self._drive(stream)
        except Exception:
            failure = ("death", traceback.format_exc())
        found = {"answers": stream.answers, "failure": failure, "books": []}
        if failure is None:
            try:
                self._drive(_Stream(self._core, [_CLOSING], f"{self._streams}.end."))
                found["books"] = self._books.close()
            except Exception:
                found["failure"] = ("death", traceback.format_exc())
        return {**found, "counts": {**self._books.counts, "steps": stream.step}}

    def _drive(self, stream: _Stream) -> tuple[str, str] | None:
        idle = tokenless = 0
        progress = time.monotonic()
        while stream.go_on():
            before = self._scheduled
            idle, tokenless = idle + 1, tokenless + 1
            if stream.take(self._core.step()):
                idle = tokenless = 0
            if self._scheduled > before or stream.waits_for_input:
                idle = 0
                progress = time.monotonic()
            elif (
                # A request that is never looked at again waits for ever.
                time.monotonic() - progress < GRAMMAR_SECONDS
                and self._waits_for_grammar()
            ):
                idle = tokenless = 0
                time.sleep(0.001)
            if idle > IDLE_STEPS or tokenless > TOKENLESS_STEPS:
                waiting = self._scheduler.get_request_counts()
                return (
                    "hang",
                    f"step {stream.step}: {idle} steps without scheduled tokens, "
                    f"{tokenless} without new ones; running and waiting: {waiting}",
                )
        return None

    def _waits_for_grammar(self) -> bool:
        """Whether a grammar is still being compiled, in a thread of its own."""
        waits = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        return any(
            request.status == waits for request in self._scheduler.requests.values()
        )


class _Stream:
    """Requests under way.

    Attributes:
        answers: By request, what came of it so far.
        step: Number of engine steps so far.
    """

    def __init__(self, core: Any, requests: Sequence[Request], prefix: str) -> None:
        self._core = core
        self._prefix = prefix
        self._requests = requests
        self.answers: list[dict[str, Any]] = [
            {"error": None, "aborted": False, "prompt_logprobs": None, "outputs": {}}
            for _ in requests
        ]
        self.step = 0
        # What happens before which step: arrivals first, inputs, then aborts.
        self._events: list[tuple[int, int, int, Any]] = []
        self._sessions: dict[int, _Session] = {}
        for number, request in enumerate(requests):
            self._events.append((request.arrives, 0, number, None))
            if request.abort_after is not None:
                at = request.arrives + request.abort_after
                self._events.append((at, 2, number, None))
            for index, (after, tokens) in enumerate(request.chunks):
                last = index == len(request.chunks) - 1
                at = request.arrives + after
                self._events.append((at, 1, number, (tokens, last)))
        self._events.sort(key=lambda event: event[:3])

    @property
    def waits_for_input(self) -> bool:
        """Whether a session may be waiting for an input that comes later."""
        return any(kind == 1 for _, kind, _, _ in self._events)

    def go_on(self) -> bool:
        """Let happen what is due; whether there is anything left to be done."""
        while True:
            while self._events and self._events[0][0] <= self.step:
                _, kind, number, detail = self._events.pop(0)
                if kind == 0:
                    self._add(number)
                elif kind == 1:
                    self._input(number, *detail)
                else:
                    self._abort(number)
            if self._core.has_unfinished_requests():
                return True
            if not self._events:
                return False
            self.step = self._events[0][0]

    def take(self, outputs: list[Any]) -> bool:
        """Take a step's outputs in; whether they hold a token or an end."""
        self.step += 1
        news = False
        for output in outputs:
            number = int(output.request_id.removeprefix(self._prefix))
            answer = self.answers[number]
            if output.prompt_logprobs is not None and not answer["prompt_logprobs"]:
                answer["prompt_logprobs"] = _plain_logprobs(output.prompt_logprobs)
            for completion in output.outputs:
                previous = answer["outputs"].get(completion.index)
                found = _completion(completion)
                if self._requests[number].chunks and previous is not None:
                    found = _joined(previous, found)
                news |= found != previous
                answer["outputs"][completion.index] = found
        return news

    def _add(self, number: int) -> None:
        request = self._requests[number]
        try:
            params = sampling_params(request)
            name = f"{self._prefix}{number}"
            if request.chunks:
                session = _Session(self._core, name, params, request.priority)
                session.send(request.prompt, last=False)
                self._sessions[number] = session
            else:
                self._core.add_request(
                    name,
                    {"prompt_token_ids": list(request.prompt)},
                    params,
                    priority=request.priority,
                )
        except Exception as error:
            self.answers[number]["error"] = f"{type(error).__name__}: {error}"

    def _input(self, number: int, tokens: list[int], last: bool) -> None:
        answer = self.answers[number]
        if number in self._sessions and not answer["aborted"]:
            self._sessions[number].send(tokens, last)

    def _abort(self, number: int) -> None:
        name = f"{self._prefix}{number}"
        if self._core.output_processor.external_req_ids.get(name):
            self._core.abort_request([name])
            self.answers[number]["aborted"] = True


class _Session:
    """A request whose input comes in pieces, as `AsyncLLM.generate` handles it."""

    def __init__(self, core: Any, name: str, params: Any, priority: int) -> None:
        self._core = core
        self._name = name
        self._params = params
        self._priority = priority
        self._final = self._process(name, [0], resumable=False)
        core.input_processor.assign_request_id(self._final)

    def send(self, tokens: list[int], last: bool) -> None:
        """Send a piece of the input, and the sign that it was the last one."""
        piece = self._process(self._final.request_id, tokens, resumable=True)
        piece.external_req_id = self._name
        for request in (piece, self._final) if last else (piece,):
            self._core.output_processor.add_request(request, None, None, 0)
            # In one process both would extend the same list of token ids.
            self._core.engine_core.add_request(copy.deepcopy(request))

    def _process(self, name: str, tokens: list[int], resumable: bool) -> Any:
        return self._core.input_processor.process_inputs(
            name,
            {"prompt_token_ids": list(tokens)},
            self._params,
            supported_tasks=self._core.get_supported_tasks(),
            priority=self._priority,
            resumable=resumable,
        )


_CLOSING = Request(prompt=[5], params={"temperature": 0, "max_tokens": 1})
"""One more step for the engine to notice what has ended."""


def sampling_params(request: Request) -> Any:
    """vLLM's parameters of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        StructuredOutputsParams,
    )

    params = dict(request.params)
    if "structured_outputs" in params:
        params["structured_outputs"] = StructuredOutputsParams(
            **params["structured_outputs"]
        )
    if "repetition_detection" in params:
        params["repetition_detection"] = RepetitionDetectionParams(
            **params["repetition_detection"]
        )
    if request.chunks:
        params["output_kind"] = RequestOutputKind.DELTA
    return SamplingParams(**params)


def _completion(completion: Any) -> dict[str, Any]:
    return {
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "logprobs": completion.logprobs and _plain_logprobs(completion.logprobs),
        "cumulative_logprob": completion.cumulative_logprob,
    }


def _joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """What a session said in pieces."""
    pieces = {
        name: earlier[name] + later[name]
        for name in ("token_ids", "text")
        if later[name] is not None
    }
    if later["logprobs"]:
        pieces["logprobs"] = (earlier["logprobs"] or []) + later["logprobs"]
    return {**later, **pieces, "cumulative_logprob": None}


def _plain_logprobs(positions: Any) -> list[dict[int, tuple[float, int | None]] | None]:
    return [
        position
        and {token: (entry.logprob, entry.rank) for token, entry in position.items()}
        for position in positions
    ]
