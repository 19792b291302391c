# SPDX-License-Identifier: Apache-2.0
"""The command; see the package."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.result_files import provenance, write_results
from tests.reliability.differential.draw import requests_of, runner_of
from tests.reliability.differential.fuzz import Effort, Report, fuzz_engine
from tests.reliability.differential.pair import Pair


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _totals(reports: list[Report]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report.counts)
    return {
        "engines": sum(report.refused is None for report in reports),
        "engines_refused": sum(report.refused is not None for report in reports),
        "cases": sum(report.cases for report in reports),
        "mismatches": sum(report.of_kind("mismatch") for report in reports),
        "bookkeeping": sum(report.of_kind("books") for report in reports),
        "hangs": sum(report.of_kind("hang") for report in reports),
        "deaths": sum(report.of_kind("death", "start") for report in reports),
        "ties": sum(report.ties for report in reports),
        "void_streams": sum(len(report.void) for report in reports),
        "counts": dict(counts),
        "seconds": round(sum(report.seconds for report in reports)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run engines, print a line for each and write the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.differential", description=__doc__
    )
    parser.add_argument("--engines", type=int, default=60)
    parser.add_argument("--requests", type=int, default=50, help="of each engine")
    parser.add_argument("--seed", type=int, default=0, help="the first engine's")
    parser.add_argument("--only", type=int, metavar="SEED", help="this engine alone")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--runner", choices=("v1", "v2", "both"), default="both")
    parser.add_argument("--shrink-seconds", type=float, default=120.0)
    parser.add_argument(
        "--scripts",
        type=Path,
        default=Path("build/differential"),
        help="directory for scripts that reproduce failures",
    )
    parser.add_argument("--output-json", type=Path, help="file for the figures")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    end = time.monotonic() + 60 * args.minutes
    seeds = range(args.seed, args.seed + args.engines)
    if args.only is not None:
        seeds = range(args.only, args.only + 1)
    reports: list[Report] = []
    with closing(Pair()) as pair:
        for seed in seeds:
            if time.monotonic() > end:
                break
            runner = runner_of(seed, args.runner)
            requests = requests_of(runner, args.runner, args.requests)
            effort = Effort(requests, args.shrink_seconds, args.scripts)
            reports.append(fuzz_engine(pair, seed, runner, effort, end, _say))
            _say(reports[-1].line())
    totals = _totals(reports)
    _say(" ".join(f"{name}={value}" for name, value in totals.items()))
    if args.output_json is not None:
        results = {
            **provenance(),
            "command": f"{parser.prog} {shlex.join(arguments)}",
            **totals,
            "reports": [report.to_dict() for report in reports],
        }
        write_results(args.output_json, results)
    return int(any(report.failures for report in reports))


if __name__ == "__main__":
    sys.exit(main())
