# SPDX-License-Identifier: Apache-2.0
"""Put known defects back, one at a time, and tell how soon the fuzzer finds each.

python -m tests.reliability.differential.prove --output-json FILE
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.result_files import provenance, write_results
from tests.reliability.differential.defects import DEFECTS, PLANTED
from tests.reliability.differential.draw import requests_of, runner_of
from tests.reliability.differential.fuzz import Effort, fuzz_engine
from tests.reliability.differential.pair import Pair


def prove(
    pair: Pair, defect: str, seed: int, engines: int, requests: int, runner: str
) -> dict[str, Any]:
    """Fuzz with a defect until it is found.

    Args:
        pair: Where to run.
        defect: A name in `defects.py`.
        seed: The first engine's.
        engines: Most to try.
        requests: Request-cases of an engine.
        runner: "v1", "v2" or "both".

    Returns:
        `found`, what it was found by or None; `engines`, `cases` and `seconds` it took.
    """
    start, cases, found, number = time.monotonic(), 0, None, 0
    pair.defect = defect
    try:
        while found is None and number < engines:
            chosen = runner_of(seed + number, runner)
            effort = Effort(
                requests_of(chosen, runner, requests),
                shrink_seconds=0,
                stop_at_failure=True,
            )
            report = fuzz_engine(pair, seed + number, chosen, effort)
            number, cases = number + 1, cases + report.cases
            if report.failures:
                _, failure = report.failures[0]
                found = f"{failure.kind}: {failure.sentences[0]}"
    finally:
        pair.defect = None
    return {
        "defect": defect,
        "found": found,
        "engines": number,
        "cases": cases,
        "seconds": round(time.monotonic() - start),
    }


def main(arguments: list[str] | None = None) -> int:
    """Try defects and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.differential.prove", description=__doc__
    )
    parser.add_argument(
        "--defects", nargs="*", choices=[*DEFECTS, *PLANTED], default=list(DEFECTS)
    )
    parser.add_argument("--engines", type=int, default=60, help="most to try")
    parser.add_argument("--requests", type=int, default=50, help="of each engine")
    parser.add_argument("--seed", type=int, default=0, help="the first engine's")
    parser.add_argument("--runner", choices=("v1", "v2", "both"), default="both")
    parser.add_argument("--output-json", type=Path, help="file for the figures")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    found = []
    with closing(Pair()) as pair:
        for defect in args.defects:
            one = prove(
                pair, defect, args.seed, args.engines, args.requests, args.runner
            )
            found.append(one)
            outcome = "not found" if one["found"] is None else f"found ({one['found']})"
            sys.stdout.write(
                f"{defect}: {outcome} after {one['engines']} engines, {one['cases']} "
                f"cases, {one['seconds']} s\n"
            )
            sys.stdout.flush()
    if args.output_json is not None:
        command = f"{parser.prog} {shlex.join(arguments)}"
        write_results(
            args.output_json, {**provenance(), "command": command, "defects": found}
        )
    return int(any(one["found"] is None for one in found))


if __name__ == "__main__":
    sys.exit(main())
