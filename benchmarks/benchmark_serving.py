# SPDX-License-Identifier: Apache-2.0
r"""Serving speed of several ways of decoding, measured by vLLM's own client.

One `vllm serve` per variant (--variants). All stay loaded side by side on this machine
and take turns under the load of `vllm bench serve`, so ratios hold on a machine whose
speed drifts. A finite request rate sends requests as they come; with the rate inf, a
fixed number of requests is in flight (--max-concurrency). Engine arguments are those of
vLLM and hold for all variants:

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
from benchmarks.client import Client, Load
from benchmarks.options import (
    add_variants_option,
    make_parser,
    numbers,
    print_results,
    run_command,
    say,
    settings_from,
    workload_from,
)
from benchmarks.process import VariantError
from benchmarks.result_files import empty_results, write_results
from benchmarks.server import Server
from benchmarks.serving_figures import compare_texts, serving_table, summarize
from benchmarks.variants import (
    BASELINE,
    EngineSettings,
    Variant,
    parse_variants,
    reason_to_skip,
    with_identity_heads,
)
from benchmarks.workloads import Workload

DEFAULT_VARIANTS = "baseline,adadecode"
DEFAULT_CONCURRENCY = "1,4,16,32"


def parse_loads(concurrency: str, request_rate: str) -> list[Load]:
    """Read ``--max-concurrency`` and ``--request-rate``.

    Args:
        concurrency: For example ``1,4``.
        request_rate: For example ``inf,0.5``. ``inf`` stands for the concurrencies;
            at a finite rate their number is not limited, for a limit would change the
            rate of the slower variant.

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


def reason_not_to_serve(variant: Variant, settings: EngineSettings) -> str | None:
    """Why a variant cannot be served: the end of a sentence that its name begins."""
    if not variant.uses_vllm:
        return "has no server; benchmark_throughput.py measures it"
    return reason_to_skip(variant, settings, [1])


class ServingSession:
    """Running servers, and what was measured with them so far.

    A context manager; the result file is written after every repeat, so that a killed
    run keeps what is finished.

    Attributes:
        results: Content of the result file.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        settings: EngineSettings,
        workload: Workload,
        *,
        ignore_eos: bool = False,
        output: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Describe the comparison; servers start when the context is entered.

        Args:
            variants: The variants, the baseline among them.
            settings: What they have in common.
            workload: The prompts.
            ignore_eos: Generate all tokens of every prompt.
            output: Result file.
            say: Called with lines about the progress.

        Raises:
            AdaDecodeError: If the baseline is not among the variants.
        """
        if BASELINE not in (variant.name for variant in variants):
            raise AdaDecodeError(
                f"--variants: {BASELINE!r} is missing, and ratios are taken to it. Add "
                "it."
            )
        # In every repeat the baseline comes first.
        self._variants = sorted(variants, key=lambda variant: variant.name != BASELINE)
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
            for variant in self._variants:
                self._start(variant, stack)
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

    def measure(self, load: Load, repeats: int) -> None:
        """Measure all servers in turn, repeat after repeat, under one load.

        A server that fails on the way is noted, and the rest goes on.

        Args:
            load: How requests arrive.
            repeats: Runs of each server.

        Raises:
            VariantError: If the baseline fails.
        """
        runs: dict[str, list[dict[str, Any]]] = {
            variant: [] for variant in self._servers
        }
        first = len(self.results["cases"])
        for variant in list(self._servers):
            self._attempt(variant, load, self._warm_up)
        for repeat in range(repeats):
            for variant in list(self._servers):
                run = self._attempt(variant, load, self._run)
                if run is None:
                    continue
                if variant != BASELINE:
                    expected = runs[BASELINE][-1]["texts"]
                    run["parity"] = compare_texts(expected, run["texts"])
                runs[variant].append(run)
                self._say(
                    f"[{repeat + 1}/{repeats}] {load.label}, {variant}: "
                    f"{run['tokens_per_s']:.2f} tok/s"
                )
            self.results["cases"][first:] = [
                self._entry(variant, load, found, runs[BASELINE])
                for variant, found in runs.items()
                if found
            ]
            self._save()

    def _start(self, variant: Variant, stack: ExitStack) -> None:
        reason = reason_not_to_serve(variant, self._settings)
        if reason is not None:
            self._drop(variant.name, "skipped", reason)
            return
        settings = self._settings
        if variant.kind == "t-identity":
            settings = with_identity_heads(settings, self._directory / "heads")
        self._say(f"starting {variant.name}")
        try:
            server = stack.enter_context(Server(variant, settings))
        except VariantError as error:
            if variant.name == BASELINE:
                raise
            self._drop(variant.name, "failed", str(error))
            return
        self._servers[variant.name] = server
        self.results["variants"][variant.name] = {
            "status": "ran",
            "start_up_seconds": server.start_up_seconds,
        }

    def _attempt(
        self, variant: str, load: Load, action: Callable[[Server, Load], Any]
    ) -> Any:
        """Do something with a server; None if it failed, which is noted."""
        try:
            return action(self._servers[variant], load)
        except VariantError as error:
            if variant == BASELINE:
                raise
            self._drop(variant, "failed", str(error))
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
            raise VariantError(f"no request of {load.label} succeeded: {errors[0]}")
        return run

    def _drop(self, variant: str, status: str, reason: str) -> None:
        self._say(f"{variant} {status}: {reason}")
        self._servers.pop(variant, None)
        self.results["variants"][variant] = {"status": status, "reason": reason}
        self._save()

    def _entry(
        self,
        variant: str,
        load: Load,
        runs: list[dict[str, Any]],
        base: list[dict[str, Any]],
    ) -> dict[str, Any]:
        return {
            "variant": variant,
            "label": variant,
            "concurrency": load.concurrency,
            "request_rate": load.request_rate,
            # A variant that failed on the way has fewer repeats than the baseline.
            "figures": summarize(runs, base[: len(runs)]),
            "runs": [
                {key: value for key, value in run.items() if key != "texts"}
                for run in runs
            ],
        }

    def _save(self) -> None:
        if self._output is not None:
            self.results["table"] = serving_table(self.results)
            write_results(self._output, self.results)


def main(arguments: Sequence[str] | None = None) -> None:
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
    variants = parse_variants(args.variants)
    loads = parse_loads(args.max_concurrency, args.request_rate)
    settings = settings_from(args)
    workload = workload_from(args, settings)
    check_prompts(len(workload.prompts), loads)
    # A terminated measurement, too, must end its servers.
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        with ServingSession(
            variants,
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
    print_results(session.results, serving_table(session.results))


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
    add_variants_option(parser, DEFAULT_VARIANTS)
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
