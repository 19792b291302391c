# SPDX-License-Identifier: Apache-2.0
r"""Serving speed of several ways of decoding, measured by vLLM's own client.

One `vllm serve` per arm (--arms). All stay loaded side by side on this machine and take
turns under the load of `vllm bench serve`, so ratios hold on a machine whose speed
drifts. A finite request rate sends requests as they come; with the rate inf, a fixed
number of requests is in flight (--max-concurrency). Engine arguments are those of vLLM
and hold for all arms:

    python benchmarks/benchmark_serving.py --model MODEL --adadecode-heads HEADS \
        --dataset-name problems --num-prompts 64 --max-concurrency 1,16 \
        --request-rate inf,2 --output-json out.json

Prints a Markdown table; --output-json keeps everything. Texts are compared as text: in
bfloat16 some differ at ties, which `benchmark_throughput.py` tells from errors.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, TracebackType
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adadecode_vllm.errors import AdaDecodeError
from benchmarks.arms import (
    REFERENCE,
    Arm,
    EngineSettings,
    obstacle,
    parse_arms,
    with_identity_heads,
)
from benchmarks.client import Client, Load
from benchmarks.options import (
    add_arms_option,
    make_parser,
    numbers,
    run_command,
    say,
    settings_from,
    workload_from,
)
from benchmarks.process import ArmError
from benchmarks.result_files import empty_results, write_results
from benchmarks.server import Server
from benchmarks.serving_figures import compare_texts, serving_table, summarize
from benchmarks.workloads import Workload

DEFAULT_ARMS = "ordinary,adadecode"
DEFAULT_CONCURRENCY = "1,4,16,32"


def parse_loads(concurrency: str, request_rate: str) -> list[Load]:
    """Read ``--max-concurrency`` and ``--request-rate``.

    Args:
        concurrency: For example ``1,4``.
        request_rate: For example ``inf,0.5``. ``inf`` stands for the concurrencies;
            at a finite rate their number is not limited, for a limit would change the
            rate of the slower arm.

    Raises:
        AdaDecodeError: If a number is none, or not positive.
    """
    flights = numbers("--max-concurrency", concurrency, int, lambda n: n > 0)
    rates = numbers("--request-rate", request_rate, float, lambda rate: rate > 0)
    loads: list[Load] = []
    for rate in rates:
        if math.isinf(rate):
            loads += [Load(concurrency=number) for number in flights]
        else:
            loads.append(Load(request_rate=rate))
    return list(dict.fromkeys(loads))


def serving_obstacle(arm: Arm, settings: EngineSettings) -> str | None:
    """Why an arm cannot be served; the end of a sentence that begins with its name."""
    if not arm.uses_vllm:
        return "has no server; benchmark_throughput.py measures it"
    return obstacle(arm, settings, [1])


class ServingSession:
    """Running servers, and what was measured with them so far.

    A context manager; the result file is written after every turn, so that a killed run
    keeps what is finished.

    Attributes:
        results: Content of the result file.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        settings: EngineSettings,
        workload: Workload,
        *,
        ignore_eos: bool = False,
        output: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Describe the comparison; servers start when the context is entered.

        Args:
            arms: The arms, the reference among them.
            settings: What they have in common.
            workload: The prompts.
            ignore_eos: Generate all tokens of every prompt.
            output: Result file.
            say: Called with lines about the progress.

        Raises:
            AdaDecodeError: If the reference is not among the arms.
        """
        if REFERENCE not in (arm.name for arm in arms):
            raise AdaDecodeError(
                f"--arms: {REFERENCE!r} is missing, and ratios are taken to it. Add it."
            )
        # In every turn the reference comes first.
        self._arms = sorted(arms, key=lambda arm: arm.name != REFERENCE)
        self._settings = settings
        self._workload = workload
        self._ignore_eos = ignore_eos
        self._output = output
        self._say = say
        self._stack = ExitStack()
        self._servers: dict[str, Server] = {}
        self.results = empty_results(settings, workload, ignore_eos)

    def __enter__(self) -> ServingSession:
        """Start every server that can run; the others are noted with their reason."""
        with ExitStack() as stack:
            self._directory = Path(stack.enter_context(TemporaryDirectory()))
            self._client = Client(
                self._settings,
                self._workload,
                self._directory / "prompts.jsonl",
                ignore_eos=self._ignore_eos,
            )
            # One after the other: on a GPU each takes stock of the memory it finds.
            for arm in self._arms:
                self._start(arm, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End all servers."""
        self._stack.close()

    def measure(self, load: Load, turns: int) -> None:
        """Measure all servers in turn, turn after turn, under one load.

        A server that fails on the way is noted, and the rest goes on.

        Args:
            load: How requests arrive.
            turns: Runs of each server.

        Raises:
            ArmError: If the reference fails.
        """
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in self._servers}
        first = len(self.results["cases"])
        for arm in list(self._servers):
            self._attempt(arm, load, self._warm_up)
        for turn in range(turns):
            for arm in list(self._servers):
                run = self._attempt(arm, load, self._run)
                if run is None:
                    continue
                if arm != REFERENCE:
                    expected = runs[REFERENCE][-1]["texts"]
                    run["parity"] = compare_texts(expected, run["texts"])
                runs[arm].append(run)
                self._say(
                    f"[{turn + 1}/{turns}] {load.label}, {arm}: "
                    f"{run['tokens_per_s']:.2f} tok/s"
                )
            self.results["cases"][first:] = [
                self._entry(arm, load, found, runs[REFERENCE])
                for arm, found in runs.items()
                if found
            ]
            self._save()

    def _start(self, arm: Arm, stack: ExitStack) -> None:
        reason = serving_obstacle(arm, self._settings)
        if reason is not None:
            self._drop(arm.name, "skipped", reason)
            return
        settings = self._settings
        if arm.kind == "t-identity":
            settings = with_identity_heads(settings, self._directory / "heads")
        self._say(f"starting {arm.name}")
        try:
            server = stack.enter_context(Server(arm, settings))
        except ArmError as error:
            if arm.name == REFERENCE:
                raise
            self._drop(arm.name, "failed", str(error))
            return
        self._servers[arm.name] = server
        self.results["arms"][arm.name] = {
            "status": "ran",
            "start_up_seconds": server.start_up_seconds,
        }

    def _arm(self, name: str) -> Arm:
        return next(arm for arm in self._arms if arm.name == name)

    def _attempt(
        self, arm: str, load: Load, action: Callable[[Server, Load], Any]
    ) -> Any:
        """Do something with a server; None if it failed, which is noted."""
        try:
            return action(self._servers[arm], load)
        except ArmError as error:
            if arm == REFERENCE:
                raise
            self._drop(arm, "failed", str(error))
            return None

    def _warm_up(self, server: Server, load: Load) -> None:
        """Meet every kernel once; each number of rows has its own on CPU."""
        self._client.warm_up(server.url, load)
        server.check()

    def _run(self, server: Server, load: Load) -> dict[str, Any]:
        run = self._client.run(server.url, load)
        server.check()
        if not run["completed"] or not run["tokens"]:
            errors = run["errors"] or ["no token was generated"]
            raise ArmError(f"no request of {load.label} succeeded: {errors[0]}")
        return run

    def _drop(self, arm: str, status: str, reason: str) -> None:
        self._say(f"{arm} {status}: {reason}")
        self._servers.pop(arm, None)
        self.results["arms"][arm] = {"status": status, "reason": reason}
        self._save()

    def _entry(
        self,
        arm: str,
        load: Load,
        runs: list[dict[str, Any]],
        base: list[dict[str, Any]],
    ) -> dict[str, Any]:
        early = self._arm(arm).predicts_early
        return {
            "arm": arm,
            "label": arm,
            "concurrency": load.concurrency,
            "request_rate": load.request_rate,
            # An arm that failed on the way has fewer turns than the reference.
            "figures": summarize(runs, base[: len(runs)], predicts_early=early),
            "runs": [
                {key: value for key, value in run.items() if key != "texts"}
                for run in runs
            ],
        }

    def _save(self) -> None:
        if self._output is not None:
            self.results["table"] = serving_table(self.results)
            write_results(self._output, self.results)


def main(arguments: Sequence[str] | None) -> None:
    """Measure and print the table."""
    # vLLM logs to standard output, which is the table's.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.batch_sizes is not None:
        raise AdaDecodeError(
            "--batch-sizes: a server makes its batches itself. Say with "
            "--max-concurrency how many requests are in flight."
        )
    arms = parse_arms(args.arms)
    loads = parse_loads(args.max_concurrency, args.request_rate)
    if args.repeats < 1:
        raise AdaDecodeError(
            f"--repeats {args.repeats}: nothing would be measured. Give at least 1."
        )
    settings = settings_from(args)
    workload = workload_from(args, settings)
    check_prompts(len(workload.prompts), loads)
    # A terminated measurement, too, must end its servers.
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        with ServingSession(
            arms,
            settings,
            workload,
            ignore_eos=args.ignore_eos,
            output=args.output_json,
            say=say,
        ) as session:
            for load in loads:
                session.measure(load, args.repeats)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.stdout.write(serving_table(session.results) + "\n")


def check_prompts(prompts: int, loads: Sequence[Load]) -> None:
    """Refuse fewer prompts than are to be in flight.

    Raises:
        AdaDecodeError: If there are fewer.
    """
    most = max(load.concurrency or 1 for load in loads)
    if prompts < most:
        raise AdaDecodeError(
            f"--num-prompts: {prompts} prompts are too few for {most} in flight. Ask "
            f"for at least {most}, or for a smaller --max-concurrency."
        )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__ or "")
    add_arms_option(parser, DEFAULT_ARMS)
    parser.add_argument(
        "--max-concurrency",
        default=DEFAULT_CONCURRENCY,
        help="Requests in flight at the rate inf, comma-separated",
    )
    parser.add_argument(
        "--request-rate",
        default="inf",
        help="Requests per second, comma-separated; inf sends one as soon as another "
        "has ended",
    )
    # Refused with a sentence rather than without effect.
    parser.add_argument("--batch-sizes", help=argparse.SUPPRESS)
    return parser


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    run_command(main)
