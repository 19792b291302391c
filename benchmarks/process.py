# SPDX-License-Identifier: Apache-2.0
"""One way of decoding, loaded in a process of its own.

Several variants stay loaded side by side and generate in turn, so that a machine whose
speed drifts from minute to minute slows all of them alike, and so that the plugin of
one variant cannot touch another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.variants import BASELINE, EngineSettings, Variant


class VariantError(RuntimeError):
    """A variant's engine did not start or ended while generating."""


class VariantProcess:
    """A running variant; a context manager that ends it.

    Attributes:
        variant: The variant.
        start_up_seconds: How long the engine took to start.
    """

    def __init__(
        self,
        variant: Variant,
        settings: EngineSettings,
        logs: Path | None = None,
        *,
        step_by_step: bool = False,
    ) -> None:
        """Start the engine and wait until it can generate.

        Args:
            variant: The variant.
            settings: What all variants of the comparison have in common.
            logs: Directory that keeps the engine's log, with what vLLM says while it
                starts; None to keep errors only, and those to the end of the variant.
            step_by_step: Run the engine in the variant's own process, as `stream`
                needs it.

        Raises:
            VariantError: If the engine does not start; with the end of its log.
        """
        self.variant = variant
        level = "ERROR" if logs is None else "INFO"
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": level}
        if step_by_step:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if variant.kind == BASELINE:
            environment["VLLM_PLUGINS"] = ""
        self._log = _open_log(variant, logs)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        started = time.perf_counter()
        try:
            self._request({"variant": vars(variant), "settings": settings.to_dict()})
        except VariantError:
            self._end()
            raise
        self.start_up_seconds = time.perf_counter() - started

    def configure(self, **policy: Any) -> None:
        """Change AdaDecode's policy; variants that do not predict early ignore it.

        Args:
            **policy: What the worker's ``adadecode_configure`` takes.
        """
        self._request({"configure": policy})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int,
        output_tokens: int,
        ignore_eos: bool,
        oscillate_to: int | None = None,
        top_logits: bool = False,
    ) -> dict[str, Any]:
        """Generate greedily and take the time.

        Args:
            prompts: Token ids.
            batch_size: Requests at a time.
            output_tokens: Most tokens to generate for a prompt.
            ignore_eos: Generate all of them.
            oscillate_to: Requests at a time in every other phase of the run; vLLM's
                variants only.
            top_logits: Also return the best logits at every token; vLLM's variants
                only.

        Returns:
            ``seconds`` in all; by prompt ``token_ids``, ``ttft_s`` (time to first
            token) and ``tpot_s`` (time per token after it, None for one token);
            ``speculation``, vLLM's counters (drafts, draft_tokens, accepted);
            ``forwards`` of the whole model, each once for every request in it, where
            the variant counts them; ``stats``, AdaDecode's counters or None;
            ``top_logits`` if asked for.

        Raises:
            VariantError: If the engine fails; with the end of its log.
        """
        return self._request(
            {
                "generate": {
                    "prompts": [list(prompt) for prompt in prompts],
                    "batch_size": batch_size,
                    "output_tokens": output_tokens,
                    "ignore_eos": ignore_eos,
                    "oscillate_to": oscillate_to,
                    "top_logits": top_logits,
                }
            }
        )

    def stream(
        self, prompt: Sequence[int], output_tokens: int
    ) -> Iterator[dict[str, Any]]:
        """Generate one text greedily and tell of every step; vLLM's variants only.

        Args:
            prompt: Token ids.
            output_tokens: Most tokens to generate.

        Yields:
            Of each step ``tokens``, the new ones, and ``rejected``, early predictions
            that were not accepted, both as [token id, layer count of the exit, -1 for
            n-gram lookup, or None];
            ``seconds`` since the text was asked for.

        Raises:
            VariantError: If the engine fails; with the end of its log.
        """
        step = self._request(
            {"stream": {"prompt": list(prompt), "output_tokens": output_tokens}}
        )
        while step:
            yield step
            step = self._read()

    def memory_mib(self) -> dict[str, float]:
        """Memory of the variant's processes, summed.

        Returns:
            ``peak_memory_mib``: largest resident memory so far, where libraries and
            files that processes share count for each. ``private_memory_mib``: what
            only they have, now.
        """
        import psutil

        parent = psutil.Process(self._process.pid)
        peak = private = 0
        for process in (parent, *parent.children(recursive=True)):
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            peak += int(status.split("VmHWM:")[1].split()[0])
            private += process.memory_full_info().uss
        return {
            "peak_memory_mib": peak / 1024,
            "private_memory_mib": private / (1 << 20),
        }

    def __enter__(self) -> VariantProcess:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the engine."""
        self._end()

    def _end(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it may have ended already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _request(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # the answer, or its absence, tells
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._log.seek(0)
            raise VariantError(log_reason(self._log.read()))
        return json.loads(answer)


def _open_log(variant: Variant, logs: Path | None) -> IO[str]:
    """A file for the engine's log; ``_end`` closes it."""
    if logs is None:
        return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    logs.mkdir(parents=True, exist_ok=True)
    name = variant.name.replace(":", "-").replace("/", "-")
    return (logs / f"{name}.log").open("w+", encoding="utf-8", errors="replace")


def log_reason(log: str) -> str:
    """What the end of a log says: the last error's own sentence, or its last lines."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [
        line
        for line in lines
        # The engine's own error comes before the one that only points to it.
        if ("Error: " in line or "error: " in line) and "Engine core" not in line
    ]
    return errors[-1].strip() if errors else "\n".join(lines[-20:])


def _serve() -> None:
    """Start the engine that the first line describes, then answer line by line."""
    # vLLM and its child processes may print; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    first = json.loads(sys.stdin.readline())
    variant, settings = Variant(**first["variant"]), EngineSettings(**first["settings"])
    backend: Any
    if variant.uses_vllm:
        from benchmarks.backend_vllm import VllmBackend

        backend = VllmBackend(variant, settings)
    else:
        from benchmarks.backend_transformers import TransformersBackend

        backend = TransformersBackend(variant, settings)
    answer({})
    for line in sys.stdin:
        question = json.loads(line)
        if "configure" in question:
            backend.configure(**question["configure"])
            answer({})
        elif "stream" in question:
            for step in backend.stream(**question["stream"]):
                answer(step)
            answer({})
        else:
            answer(backend.generate(**question["generate"]))
    backend.close()


if __name__ == "__main__":
    _serve()
