# SPDX-License-Identifier: Apache-2.0
"""Both engines of a draw, and what becomes of a stream on them."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.harness import adadecode_options, make_memory_heads
from tests.reliability.differential.case import MEMORY_HEADS, Engine, Request
from tests.reliability.differential.compare import Difference, differences
from tests.reliability.differential.host import EngineFailed, Host, HostDied

TIE = 5e-5
"""Two logprobs so close may change places with the size of the batch, in float32."""


@dataclass(frozen=True)
class Failure:
    """What a stream must not show and did.

    Attributes:
        kind: "mismatch", "books", "hang", "death" or "start".
        sentences: What was found, the worst first.
    """

    kind: str
    sentences: list[str]


@dataclass
class Outcome:
    """What became of a stream.

    Attributes:
        failure: What is wrong with AdaDecode.
        void: Why nothing can be said: plain vLLM failed itself.
        ties: Texts that part where plain vLLM's two best tokens are as good.
        counts: What happened, by name.
    """

    failure: Failure | None = None
    void: str | None = None
    ties: int = 0
    counts: dict[str, int] = field(default_factory=dict)


class Refused(Exception):
    """The engine is not to be had, with a reason that users are told."""


class Pair:
    """Plain vLLM and AdaDecode, in two processes that outlive their engines.

    Attributes:
        defect: What is put in where AdaDecode runs; see `defects.py`.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self.defect: str | None = None
        self._baseline = _Seat()
        self._ours = _Seat()

    def close(self) -> None:
        """End the processes."""
        self._baseline.leave()
        self._ours.leave()

    def check(self, engine: Engine, requests: Sequence[Request]) -> Outcome:
        """Run a stream on both.

        Args:
            engine: Started where it is not running already.
            requests: The stream.

        Returns:
            What became of it.

        Raises:
            Refused: If plain vLLM or AdaDecode refuses the engine.
        """
        # Ordinary Model Runner V1 says the same as V2, many times faster.
        expected = self._run_baseline("v1", engine, requests)
        if expected["failure"]:
            return Outcome(void=expected["failure"][1])
        try:
            self._ours.start(engine.runner, _ours(engine), self.defect)
            found = self._ours.run(requests)
        except EngineFailed as error:
            last = str(error).strip().splitlines()[-1]
            if "AdaDecodeError" in last:
                raise Refused(last) from error
            return Outcome(Failure("start", [last, str(error)]))
        except HostDied as error:
            self._ours.leave()
            kind = "hang" if "no answer" in str(error) else "death"
            return Outcome(Failure(kind, [str(error)]))
        if found["failure"]:
            self._ours.leave()
            kind, text = found["failure"]
            sentences = [text.strip().splitlines()[-1], text]
            return Outcome(Failure(kind, sentences), counts=found["counts"])
        return self._judge(engine, requests, expected, found)

    def _judge(
        self,
        engine: Engine,
        requests: Sequence[Request],
        expected: dict[str, Any],
        found: dict[str, Any],
    ) -> Outcome:
        outcome = Outcome(counts=found["counts"])
        wrong = differences(requests, expected["answers"], found["answers"])
        if wrong and engine.runner == "v2":
            # Unless the two runners of plain vLLM differ.
            expected = self._run_baseline("v2", engine, requests)
            if expected["failure"]:
                outcome.void = expected["failure"][1]
                return outcome
            wrong = differences(requests, expected["answers"], found["answers"])
        real = [
            one
            for one in wrong
            if not self._is_tie(engine, requests[one.request], one, expected, found)
        ]
        outcome.ties = len(wrong) - len(real)
        if real:
            sentences = [f"request {one.request}: {one.sentence}" for one in real]
            outcome.failure = Failure("mismatch", [*sentences, *found["books"]])
        elif found["books"]:
            outcome.failure = Failure("books", found["books"])
        return outcome

    def _is_tie(
        self,
        engine: Engine,
        request: Request,
        difference: Difference,
        expected: dict[str, Any],
        found: dict[str, Any],
    ) -> bool:
        """Ask plain vLLM again, alone and greedily, how good both tokens are."""
        if difference.token is None:
            return False
        index, at = difference.token
        texts = [
            answers["answers"][difference.request]["outputs"][index]["token_ids"]
            for answers in (expected, found)
        ]
        if any(len(text) <= at for text in texts):
            return False
        dropped = ("n", "top_k", "top_p", "min_p", "logprob_token_ids", "seed")
        params = {
            name: value for name, value in request.params.items() if name not in dropped
        }
        alone = replace(
            request,
            params={**params, "temperature": 0, "logprobs": 20},
            abort_after=None,
        )
        processed = {**engine.arguments, "logprobs_mode": "processed_logprobs"}
        again = self._run_baseline("v1", replace(engine, arguments=processed), [alone])
        output = again["answers"][0]["outputs"].get(0)
        if output is None or len(output["token_ids"]) <= at:
            return False
        if output["token_ids"][:at] != texts[0][:at]:
            return True  # plain vLLM's own text depends on the batch
        values = [output["logprobs"][at].get(text[at]) for text in texts]
        if None in values:
            return False
        return abs(values[0][0] - values[1][0]) <= TIE

    def _run_baseline(
        self, runner: str, engine: Engine, requests: Sequence[Request]
    ) -> dict[str, Any]:
        seat = self._baseline
        try:
            seat.start(runner, engine.arguments)
            found = seat.run(requests)
        except EngineFailed as error:
            last = str(error).strip().splitlines()[-1]
            raise Refused(f"plain vLLM: {last}") from error
        except HostDied as error:
            found = {"failure": ("death", str(error))}
        if found["failure"]:
            seat.leave()
        return found


class _Seat:
    """A process and what it runs."""

    def __init__(self) -> None:
        self._host: Host | None = None
        self._runner = ""
        self._started: tuple[dict[str, Any], str | None] | None = None

    def start(
        self, runner: str, arguments: dict[str, Any], defect: str | None = None
    ) -> None:
        if self._host is not None and runner != self._runner:
            self.leave()
        if self._host is None:
            self._host = Host(runner)
            self._runner = runner
        if self._started != (arguments, defect):
            self._started = None
            self._host.start(arguments, defect)
            self._started = arguments, defect

    def run(self, requests: Sequence[Request]) -> dict[str, Any]:
        assert self._host is not None, "started before"
        return self._host.run(requests)

    def leave(self) -> None:
        host, self._host, self._started = self._host, None, None
        if host is not None:
            host.close()


def _ours(engine: Engine) -> dict[str, Any]:
    options = engine.adadecode
    if options.get("heads") == MEMORY_HEADS:
        options = {**options, "heads": _memory_heads()}
    return {**engine.arguments, **engine.own, **adadecode_options(**options)}


@cache
def _memory_heads() -> str:
    """Made once; the engines' processes read them."""
    directory = TemporaryDirectory(prefix="memory-heads-")
    atexit.register(directory.cleanup)
    return str(make_memory_heads(Path(directory.name) / "heads"))
