# SPDX-License-Identifier: Apache-2.0
"""Load with aborts on a server whose KV cache is too small, checked against vLLM.

    python -m tests.reliability.load --requests 2000 --output FILE.json

An ordinary server (the plugin is installed but not asked for) answers every distinct
request first. Then the AdaDecode server gets all of them at once, as many in flight as
asked for: prompts of mixed lengths, streamed or not, with options of their own or
without, a share of them aborted at random times. Its KV cache holds fewer blocks than
the requests in flight need, so that it preempts.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from benchmarks.result_files import provenance, write_results
from tests.harness import MODEL, demo_corpus
from tests.server_process import PLUGIN, Server, complete, serve

logger = logging.getLogger(__name__)

BLOCK_SIZE = 32
KV_BLOCKS = 96
"""Of 32 tokens: 64 requests in flight need about twice as many."""

MAX_GROWTH = {"server": 0.005, "engine": 0.005, "worker": 0.03}
"""Most growth of a process's resident memory over the second half of the requests.

As a share of its memory at half time, of the line fitted to the samples: allocators
keep freed pages in an order that depends on the requests, so single samples move both
ways. The worker's grows by steps for longer, in an ordinary server as well: vLLM's CPU
build keeps a kernel for each number of rows that it has met.
"""

_SAMPLE_SECONDS = 0.25
_ROLES = {"VLLM::EngineCore": "engine", "VLLM::Worker": "worker"}
_MAX_TOKENS = (1, 8, 24, 48, 96)
_LONG = 150
_LONGEST_ABORTED = 100  # characters, so that the model has room for the text
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"adadecode_enabled": "false"},
    {"adadecode_threshold": 0.0},
    {"adadecode_threshold": 0.9, "adadecode_max_early_predictions": 2},
    {"adadecode_threshold": 1},
    {"adadecode_max_early_predictions": 0},
    {"adadecode_max_early_predictions": 5},
)


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        prompt: Its prompt.
        max_tokens: Most tokens of its text.
        ignore_eos: Whether it goes on after the end-of-text token.
        stream: Whether its text is streamed.
        options: Its `vllm_xargs`.
        abort_at: When it is aborted, as a share of the usual time of a request.
    """

    prompt: str
    max_tokens: int
    ignore_eos: bool = False
    stream: bool = False
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    abort_at: float | None = None

    @property
    def key(self) -> tuple[str, int, bool]:
        """What the text depends on."""
        return self.prompt, self.max_tokens, self.ignore_eos


@dataclass
class Outcome:
    """What became of a load.

    Attributes:
        texts: Completed texts, with their jobs.
        aborted: Requests that were aborted.
        aborted_early: Streams among them that had not brought a token yet.
        aborted_midway: Streams among them that had.
        errors: What clients were told instead of a text.
        samples: Requests finished so far and resident bytes by process.
        seconds: Duration.
    """

    texts: list[tuple[Job, str]] = field(default_factory=list)
    aborted: int = 0
    aborted_early: int = 0
    aborted_midway: int = 0
    errors: list[str] = field(default_factory=list)
    samples: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def finished(self) -> int:
        """Requests that are over."""
        return len(self.texts) + self.aborted + len(self.errors)


def make_jobs(requests: int, abort_share: float, seed: int) -> list[Job]:
    """Draw the requests of a load.

    Prompts come back with other lengths and options, so that requests share cached
    prefixes. Requests to be aborted would run long.
    """
    draw = Random(seed)
    corpus = demo_corpus()
    pool = max(requests // 4, 8)
    texts = corpus.heldout_problems(pool) + corpus.heldout_code_prompts(pool)
    aborted = set(draw.sample(range(requests), round(requests * abort_share)))
    jobs = []
    for number in range(requests):
        text = draw.choice(texts)
        abort = number in aborted
        jobs.append(
            Job(
                prompt=text[: draw.randint(8, _LONGEST_ABORTED if abort else 400)],
                max_tokens=_LONG if abort else draw.choice(_MAX_TOKENS),
                ignore_eos=abort or draw.random() < 0.3,
                stream=draw.random() < 0.5,
                options=draw.choice(_OPTIONS) if draw.random() < 0.5 else {},
                abort_at=1.5 * draw.random() if abort else None,
            )
        )
    return jobs


class Load:
    """Requests in flight on one server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._client = AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            timeout=300,
            max_retries=0,
            # A connection for each request: the server closes idle ones after some
            # seconds, and a request sent at that moment would be lost.
            http_client=DefaultAsyncHttpxClient(
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
            ),
        )
        self._times: deque[float] = deque([1.0], maxlen=64)
        self.outcome = Outcome()

    async def run(self, jobs: list[Job], concurrency: int) -> Outcome:
        """Send all jobs, a number of them at a time."""
        start = time.monotonic()
        sampler = asyncio.create_task(self._sample())
        queue = iter(jobs)
        async with self._client:
            await asyncio.gather(*(self._work(queue) for _ in range(concurrency)))
        sampler.cancel()
        with suppress(asyncio.CancelledError):
            await sampler
        self.outcome.seconds = time.monotonic() - start
        return self.outcome

    async def _work(self, queue: Iterator[Job]) -> None:
        for job in queue:
            try:
                await self._one(job)
            except OpenAIError as error:
                self.outcome.errors.append(repr(error))

    async def _one(self, job: Job) -> None:
        seen: list[str] = []
        start = time.monotonic()
        request = asyncio.create_task(self._request(job, seen))
        if job.abort_at is not None:
            usual = statistics.median(self._times)
            await asyncio.wait({request}, timeout=job.abort_at * usual)
            if not request.done():
                request.cancel()
                await asyncio.wait({request})
        if job.abort_at is not None and request.cancelled():
            self.outcome.aborted += 1
            self.outcome.aborted_early += job.stream and not seen
            self.outcome.aborted_midway += job.stream and bool(seen)
            return
        await request
        self._times.append(time.monotonic() - start)
        self.outcome.texts.append((job, "".join(seen)))

    async def _request(self, job: Job, seen: list[str]) -> None:
        arguments: dict[str, Any] = {
            "model": MODEL,
            "prompt": job.prompt,
            "temperature": 0,
            "max_tokens": job.max_tokens,
            "extra_body": {"ignore_eos": job.ignore_eos},
        }
        if job.options:
            arguments["extra_body"]["vllm_xargs"] = job.options
        if not job.stream:
            answer = await self._client.completions.create(**arguments)
            seen.append(answer.choices[0].text)
            return
        async with await self._client.completions.create(
            **arguments, stream=True
        ) as chunks:
            async for chunk in chunks:
                seen.append(chunk.choices[0].text)

    async def _sample(self) -> None:
        processes = server_processes(self._server)
        while True:
            resident = {role: p.memory_info().rss for role, p in processes.items()}
            self.outcome.samples.append((self.outcome.finished, resident))
            await asyncio.sleep(_SAMPLE_SECONDS)


def server_processes(server: Server) -> dict[str, psutil.Process]:
    """A server's own process, the engine core's and its worker's."""
    api_server = psutil.Process(server.process.pid)
    found = {"server": api_server}
    for child in api_server.children(recursive=True):
        role = _ROLES.get((child.cmdline() or [""])[0])
        if role is not None:
            found[role] = child
    assert len(found) == 3, found
    return found


def log_errors(log: Path) -> list[str]:
    """Lines of a server's log that tell of an error."""
    words = ("ERROR", "CRITICAL", "Traceback")
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if any(word in line for word in words)]


def memory(samples: list[tuple[int, dict[str, int]]]) -> dict[str, dict[str, float]]:
    """Resident MiB at start, half and end, and growth over the second half.

    Half is when half of the requests are finished. Growth is that of the least-squares
    line through the samples since then, as a share of its value at half.
    """
    last = samples[-1][0]
    half = [sample for sample in samples if 2 * sample[0] >= last]
    finished = [number for number, _ in half]
    found = {}
    for role in samples[0][1]:
        line = statistics.linear_regression(finished, [rss[role] for _, rss in half])
        middle, end = (line.intercept + line.slope * x for x in (last / 2, last))
        found[role] = {
            "start_mib": round(samples[0][1][role] / (1 << 20), 1),
            "half_mib": round(middle / (1 << 20), 1),
            "end_mib": round(end / (1 << 20), 1),
            "growth_second_half": round(end / middle - 1, 4),
        }
    return found


def run_load(
    jobs: list[Job], concurrency: int, directory: Path, kv_blocks: int = KV_BLOCKS
) -> dict[str, Any]:
    """Run a load on both servers, one after the other.

    Args:
        jobs: The requests.
        concurrency: Most requests in flight.
        directory: For the servers' logs.
        kv_blocks: Blocks of the AdaDecode server's KV cache.

    Returns:
        The figures.
    """
    expected, baseline = _expected_texts(jobs, concurrency, directory / "ordinary.log")
    log = directory / "adadecode.log"
    with serve(
        log,
        *PLUGIN,
        '--adadecode-config={"threshold": 0.5}',
        f"--num-gpu-blocks-override={kv_blocks}",
        f"--block-size={BLOCK_SIZE}",
        f"--max-num-seqs={concurrency}",
        worker_process=True,
    ) as server:
        outcome = asyncio.run(Load(server).run(jobs, concurrency))
        left = _what_is_left(server, kv_blocks)
        alive = server.process.poll() is None
        # Before the end: vLLM's API server, an ordinary one as well, now and then takes
        # the end of its engine for a failure while it shuts down, and logs it.
        errors = log_errors(log)
        counters = {
            name: round(server.metric(f"vllm:{metric}_total"))
            for name, metric in {
                "preemptions": "num_preemptions",
                "drafts": "spec_decode_num_draft_tokens",
                "accepted_drafts": "spec_decode_num_accepted_tokens",
            }.items()
        }
    drafts = counters.pop("drafts")
    wrong = [(job, text) for job, text in outcome.texts if text != expected[job.key]]
    for job, text in wrong:
        logger.error("%s: %r, expected %r", job, text, expected[job.key])
    return {
        "requests": len(jobs),
        "concurrency": concurrency,
        "kv_blocks": kv_blocks,
        "block_size": BLOCK_SIZE,
        "completed": len(outcome.texts),
        "aborted": outcome.aborted,
        "streams_aborted_before_the_first_token": outcome.aborted_early,
        "streams_aborted_midway": outcome.aborted_midway,
        **counters,
        "rejected_drafts": drafts - counters["accepted_drafts"],
        "mismatches": len(wrong),
        "client_errors": outcome.errors,
        "log_errors": errors,
        "server_lives": alive,
        **left,
        "memory": memory(outcome.samples),
        "memory_of_ordinary_server": memory(baseline.samples),
        "seconds": round(outcome.seconds, 1),
    }


def failures(
    results: dict[str, Any], max_growth: Mapping[str, float] = MAX_GROWTH
) -> list[str]:
    """What a load must show and did not; empty if all is well."""
    wrong = [
        f"{name} = {results[name]!r}"
        for name in (
            "mismatches",
            "client_errors",
            "log_errors",
            "leaked_blocks",
            "requests_left",
        )
        if results[name]
    ]
    wrong += [
        f"no {name}"
        for name in (
            "completed",
            "aborted",
            "streams_aborted_before_the_first_token",
            "streams_aborted_midway",
            "preemptions",
            "accepted_drafts",
            "rejected_drafts",
            "server_lives",
        )
        if not results[name]
    ]
    if results["completed"] + results["aborted"] != results["requests"]:
        wrong.append("requests are unaccounted for")
    wrong += [
        f"{role} grew by {figures['growth_second_half']:.1%}"
        for role, figures in results["memory"].items()
        if figures["growth_second_half"] > max_growth[role]
    ]
    return wrong


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    growth, baseline = (
        ", ".join(
            f"{role} {f['half_mib']:.0f} → {f['end_mib']:.0f} MiB "
            f"({f['growth_second_half']:+.1%})"
            for role, f in results[name].items()
        )
        for name in ("memory", "memory_of_ordinary_server")
    )
    rows = {
        "requests": results["requests"],
        "completed": results["completed"],
        "aborted": results["aborted"],
        "streams among them, before / after their first token": "{} / {}".format(
            results["streams_aborted_before_the_first_token"],
            results["streams_aborted_midway"],
        ),
        "preemptions": results["preemptions"],
        "drafts accepted / rejected": f"{results['accepted_drafts']} / "
        f"{results['rejected_drafts']}",
        "mismatches": results["mismatches"],
        "errors at clients / in the log": f"{len(results['client_errors'])} / "
        f"{len(results['log_errors'])}",
        "blocks / requests left behind": f"{results['leaked_blocks']} / "
        f"{results['requests_left']}",
        "resident memory, second half": growth,
        "the same of the ordinary server": baseline,
        "seconds": results["seconds"],
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _expected_texts(
    jobs: list[Job], concurrency: int, log: Path
) -> tuple[dict[tuple[str, int, bool], str], Outcome]:
    """Texts of an ordinary server with ample memory, by what they depend on."""
    distinct = {job.key: Job(*job.key) for job in jobs}
    arguments = [f"--max-num-seqs={concurrency}"]
    with serve(log, *arguments, worker_process=True) as server:
        load = Load(server)
        outcome = asyncio.run(load.run(list(distinct.values()), concurrency))
    if outcome.errors:
        raise RuntimeError(f"an ordinary server failed: {outcome.errors[:3]}")
    return {job.key: text for job, text in outcome.texts}, outcome


def _what_is_left(server: Server, kv_blocks: int) -> dict[str, int]:
    """Blocks and requests that an idle engine still holds."""
    # Gauges are as old as the last step; an abort in an idle engine takes none.
    complete(server.client, "Problem:", max_tokens=1)
    end = time.monotonic() + 60
    while True:
        requests = sum(
            server.metric(f"vllm:num_requests_{state}")
            for state in ("running", "waiting")
        )
        usage = server.metric("vllm:kv_cache_usage_perc")
        if (requests, usage) == (0, 0) or time.monotonic() > end:
            break
        time.sleep(0.2)
    # One block is vLLM's null block, which is never used.
    return {
        "leaked_blocks": round(usage * (kv_blocks - 1)),
        "requests_left": round(requests),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the load, write its figures and print them."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability.load", description=__doc__
    )
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--abort-share", type=float, default=0.2)
    parser.add_argument("--kv-blocks", type=int, default=KV_BLOCKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    # The demo model is too small to gain from threads; tests set the same.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    jobs = make_jobs(args.requests, args.abort_share, args.seed)
    with tempfile.TemporaryDirectory() as directory:
        figures = run_load(jobs, args.concurrency, Path(directory), args.kv_blocks)
    command = f"{parser.prog} {shlex.join(arguments)}"
    results = {
        **provenance(),
        "command": command,
        "abort_share": args.abort_share,
        "seed": args.seed,
        **figures,
    }
    if args.output is not None:
        write_results(args.output, results)
    sys.stdout.write(table(results))
    wrong = failures(results)
    for sentence in wrong:
        sys.stderr.write(f"{sentence}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
