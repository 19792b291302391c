# SPDX-License-Identifier: Apache-2.0
"""The fuzzer's loop: engines one after the other, failures shrunk as they are found."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.differential.case import Engine, Request, literal, plain
from tests.reliability.differential.draw import draw_engine, draw_stream, stream_sizes
from tests.reliability.differential.pair import Failure, Outcome, Pair, Refused
from tests.reliability.differential.shrink import shrink


@dataclass
class Report:
    """What became of one engine's streams.

    Attributes:
        seed: The engine's.
        engine: What it drew.
        cases: Requests that were run on both engines.
        failures: Number of the stream and what was wrong with it.
        refused: Why there was no such engine.
        void: Streams that plain vLLM itself failed.
        ties: Texts that part at a tie.
        counts: What happened on the engine with AdaDecode, by name.
        seconds: Duration.
        scripts: Shrunk reproductions.
    """

    seed: int
    engine: Engine
    cases: int = 0
    failures: list[tuple[int, Failure]] = field(default_factory=list)
    refused: str | None = None
    void: list[str] = field(default_factory=list)
    ties: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    scripts: list[str] = field(default_factory=list)

    def of_kind(self, *kinds: str) -> int:
        """How many failures are of some kinds."""
        return sum(failure.kind in kinds for _, failure in self.failures)

    def line(self) -> str:
        """One line for the terminal."""
        engine = self.engine
        if self.refused is not None:
            return f"seed {self.seed} {engine.runner}: refused: {self.refused}"
        notes = f", {len(self.void)} void" if self.void else ""
        notes += f", {self.ties} ties" if self.ties else ""
        return (
            f"seed {self.seed} {engine.runner}: {self.cases} cases, "
            f"{self.of_kind('mismatch', 'books')} mismatches, "
            f"{self.of_kind('hang')} hangs, {self.of_kind('death', 'start')} deaths"
            f"{notes}; {self.counts['draft_tokens']} drafts, "
            f"{self.counts['accepted']} accepted, {self.counts['preemptions']} "
            f"preemptions, {self.seconds:.0f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "seed": self.seed,
            **plain(self.engine),
            "cases": self.cases,
            "failures": [
                {"stream": stream, "kind": failure.kind, "found": failure.sentences}
                for stream, failure in self.failures
            ],
            "refused": self.refused,
            "void": self.void,
            "ties": self.ties,
            "counts": dict(self.counts),
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class Effort:
    """How much is done.

    Attributes:
        requests: Request-cases of an engine.
        shrink_seconds: Most time for shrinking one failure; 0 leaves it.
        scripts: Where to write scripts that reproduce failures.
        stop_at_failure: Leave an engine after its first one.
    """

    requests: int = 50
    shrink_seconds: float = 120.0
    scripts: Path | None = None
    stop_at_failure: bool = False


def fuzz_engine(
    pair: Pair,
    seed: int,
    runner: str,
    effort: Effort,
    end: float = float("inf"),
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run the streams of one seed.

    Args:
        pair: Where they run.
        seed: Of engine and streams.
        runner: "v1" or "v2".
        effort: How much to do.
        end: When to stop, on the monotonic clock.
        say: Called with lines about failures.
    """
    start = time.monotonic()
    report = Report(seed, draw_engine(seed, runner))
    engine = report.engine
    for number, size in enumerate(stream_sizes(seed, effort.requests, runner)):
        if time.monotonic() > end or (effort.stop_at_failure and report.failures):
            break
        requests = draw_stream(seed, number, engine, size)
        try:
            outcome = pair.check(engine, requests)
        except Refused as refusal:
            report.refused = str(refusal)
            break
        _enter(report, number, requests, outcome)
        if outcome.failure is None:
            continue
        say(f"seed {seed}, stream {number}: {_headline(outcome.failure)}")
        if effort.shrink_seconds and len(report.failures) == 1:
            script = _shrunk(pair, engine, requests, outcome.failure, effort)
            report.scripts.append(script)
            if effort.scripts is not None:
                effort.scripts.mkdir(parents=True, exist_ok=True)
                path = effort.scripts / f"seed_{seed}_{runner}.py"
                path.write_text(script)
                say(f"reproduced by {path}")
        if outcome.failure.kind == "start":
            break
    report.seconds = time.monotonic() - start
    return report


def _enter(
    report: Report, number: int, requests: Sequence[Request], outcome: Outcome
) -> None:
    report.counts.update(outcome.counts)
    if outcome.void is not None:
        report.void.append(outcome.void)
        return
    report.cases += len(requests)
    report.ties += outcome.ties
    if outcome.failure is not None:
        report.failures.append((number, outcome.failure))


def _headline(failure: Failure) -> str:
    return f"{failure.kind}: {failure.sentences[0]}"


def _shrunk(
    pair: Pair,
    engine: Engine,
    requests: list[Request],
    failure: Failure,
    effort: Effort,
) -> str:
    """A script that reproduces a failure, as small as it could be made."""
    last = failure

    def fails(engine: Engine, requests: list[Request]) -> bool:
        nonlocal last
        try:
            found = pair.check(engine, requests).failure
        except Refused:
            return False
        if found is None or found.kind != failure.kind:
            return False
        last = found
        return True

    small = shrink(engine, requests, fails, effort.shrink_seconds)
    return script(*small, last)


def script(engine: Engine, requests: Sequence[Request], failure: Failure) -> str:
    """A Python script that runs a case."""
    lines = "\n".join(f"    {literal(request)}," for request in requests)
    return f"""# {_headline(failure)[:300].replace(chr(10), " ")}
#
# Run it from the repository's root:
#     PYTHONPATH=. scripts/run.sh .venv/bin/python FILE
from tests.reliability.differential.case import Engine, Request
from tests.reliability.differential.fuzz import replay

ENGINE = {literal(engine)}
REQUESTS = [
{lines}
]

if __name__ == "__main__":
    replay(ENGINE, REQUESTS)
"""


def replay(engine: Engine, requests: list[Request]) -> None:
    """Run one case and tell what is wrong with it; exits with 1 if anything is."""
    with closing(Pair()) as pair:
        outcome = pair.check(engine, requests)
    if outcome.failure is None:
        sys.stdout.write(f"nothing is wrong ({outcome.void or outcome.counts})\n")
        return
    found = "\n".join(outcome.failure.sentences)
    sys.stdout.write(f"{outcome.failure.kind}:\n{found}\n")
    sys.exit(1)
