# SPDX-License-Identifier: Apache-2.0
"""vLLM's own client, `vllm bench serve`, and what it found."""

from __future__ import annotations

import argparse
import gc
import io
import json
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.variants import EngineSettings
from benchmarks.workloads import Workload

WARM_UP_TOKENS = 16
_MOST_WARM_UP_REQUESTS = 32
_CLIENT_FIGURES = [
    f"{figure}_{metric}_ms"
    for metric in ("ttft", "tpot", "itl", "e2el")
    for figure in ("mean", "p50", "p99")
]


@dataclass(frozen=True)
class Load:
    """How requests reach a server.

    Attributes:
        concurrency: Requests in flight; None for no limit.
        request_rate: Requests per second, at random moments that are the same for all
            variants; None for all at once, as far as the concurrency allows.
    """

    concurrency: int | None = None
    request_rate: float | None = None

    @property
    def label(self) -> str:
        """Words for a table."""
        if self.request_rate is None:
            return f"{self.concurrency} at a time"
        return f"{self.request_rate:g} per second"


class Client:
    """vLLM's own client, `vllm bench serve`, sending a workload.

    It runs in this process: importing it anew for every run would take longer than most
    runs.
    """

    def __init__(
        self,
        settings: EngineSettings,
        workload: Workload,
        dataset: Path,
        *,
        ignore_eos: bool = False,
    ) -> None:
        """Write the workload where the client can read it.

        Args:
            settings: The comparison's settings.
            workload: The prompts.
            dataset: JSON Lines to write.
            ignore_eos: Generate all tokens of every prompt.
        """
        self._settings = settings
        self._workload = workload
        self._dataset = dataset
        self._ignore_eos = ignore_eos
        rows = [json.dumps({"prompt": text}) + "\n" for text in workload.texts]
        dataset.write_text("".join(rows), encoding="utf-8")

    def warm_up(self, url: str, load: Load) -> None:
        """Send short requests, as many at a time as the load may; untimed."""
        most = min(len(self._workload.texts), _MOST_WARM_UP_REQUESTS)
        concurrency = min(load.concurrency or most, len(self._workload.texts))
        self._send(url, Load(concurrency), concurrency, WARM_UP_TOKENS, ignore_eos=True)

    def run(self, url: str, load: Load) -> dict[str, Any]:
        """Send all prompts.

        Args:
            url: The server's.
            load: How the requests arrive.

        Returns:
            See :func:`read_client`.
        """
        result = self._send(
            url,
            load,
            len(self._workload.texts),
            self._workload.output_tokens,
            ignore_eos=self._ignore_eos,
        )
        return read_client(result)

    def flags(
        self, url: str, load: Load, prompts: int, tokens: int, *, ignore_eos: bool
    ) -> list[str]:
        """Flags of ``vllm bench serve``.

        Args:
            url: The server's.
            load: How the requests arrive.
            prompts: Number of prompts, the first ones.
            tokens: Most new tokens of each.
            ignore_eos: Generate all of them.
        """
        settings, chat = self._settings, self._workload.chat
        arguments = settings.arguments
        flags = [
            f"--base-url={url}",
            f"--backend={'openai-chat' if chat else 'openai'}",
            f"--endpoint=/v1/{'chat/' if chat else ''}completions",
            f"--model={settings.model}",
            f"--tokenizer={arguments.get('tokenizer') or settings.model}",
            "--dataset-name=custom",
            f"--dataset-path={self._dataset}",
            # With the chat backend the server applies the template.
            "--skip-chat-template",
            # Texts are compared prompt by prompt.
            "--disable-shuffle",
            f"--num-prompts={prompts}",
            f"--custom-output-len={tokens}",
            f"--request-rate={load.request_rate or 'inf'}",
            "--temperature=0",
            "--percentile-metrics=ttft,tpot,itl,e2el",
            "--metric-percentiles=50,99",
            "--save-detailed",
            "--disable-tqdm",
            # Servers are waited for when they start.
            "--ready-check-timeout-sec=0",
        ]
        if load.concurrency is not None:
            flags.append(f"--max-concurrency={load.concurrency}")
        names = arguments.get("served_model_name")
        if names:
            name = names if isinstance(names, str) else names[0]
            flags.append(f"--served-model-name={name}")
        if "tokenizer_mode" in arguments:
            flags.append(f"--tokenizer-mode={arguments['tokenizer_mode']}")
        if arguments.get("trust_remote_code"):
            flags.append("--trust-remote-code")
        if ignore_eos:
            flags.append("--ignore-eos")
        return flags

    def _send(
        self, url: str, load: Load, prompts: int, tokens: int, *, ignore_eos: bool
    ) -> dict[str, Any]:
        from vllm.benchmarks.serve import main as bench_serve

        flags = self.flags(url, load, prompts, tokens, ignore_eos=ignore_eos)
        # Standard output is the table's.
        with redirect_stdout(io.StringIO()):
            try:
                return bench_serve(_client_parser().parse_args(flags))
            finally:
                # The client freezes all objects for good; libraries would report them
                # as leaks when Python ends.
                gc.unfreeze()


def read_client(result: Mapping[str, Any]) -> dict[str, Any]:
    """Read what vLLM's client found.

    Args:
        result: Its detailed result.

    Returns:
        ``seconds``, ``tokens``, ``tokens_per_s``, ``requests_per_s``, ``completed`` and
        ``failed`` requests; ``errors``, the different ones; by completed request
        ``ttft_s``, ``tpot_s`` (None for one token) and ``e2el_s``; ``texts`` by prompt,
        None for a failed one; ``speculation``, the change of the server's own counters;
        ``client``, the client's own figures in milliseconds.
    """
    done = [
        not error and ttft > 0
        for error, ttft in zip(result["errors"], result["ttfts"], strict=True)
    ]
    found = list(
        zip(result["ttfts"], result["latencies"], result["output_lens"], strict=True)
    )
    found = [entry for entry, success in zip(found, done, strict=True) if success]
    return {
        "seconds": result["duration"],
        "tokens": result["total_output_tokens"],
        "tokens_per_s": result["output_throughput"],
        "requests_per_s": result["request_throughput"],
        "completed": result["completed"],
        "failed": result["failed"],
        "errors": list(dict.fromkeys(map(_last_line, filter(None, result["errors"])))),
        "ttft_s": [ttft for ttft, _, _ in found],
        "tpot_s": [
            (latency - ttft) / (length - 1) if length > 1 else None
            for ttft, latency, length in found
        ],
        "e2el_s": [latency for _, latency, _ in found],
        "texts": [
            text if success else None
            for text, success in zip(result["generated_texts"], done, strict=True)
        ],
        "speculation": {
            "drafts": result.get("spec_decode_num_drafts", 0),
            "draft_tokens": result.get("spec_decode_draft_tokens", 0),
            "accepted": result.get("spec_decode_accepted_tokens", 0),
        },
        "client": {
            name: float(result[name]) for name in _CLIENT_FIGURES if name in result
        },
    }


@cache
def _client_parser() -> argparse.ArgumentParser:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser


def _last_line(text: str) -> str:
    """Of a traceback, the error."""
    return text.strip().splitlines()[-1] if text.strip() else text
