# SPDX-License-Identifier: Apache-2.0
"""One way of decoding, as an engine in a process of its own.

Several arms stay loaded side by side and generate in turn, so that a machine whose
speed drifts from minute to minute slows all of them alike, and so that the plugin of
one arm cannot touch another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ARMS = {
    "ordinary": "vLLM alone, the plugin not loaded",
    "installed": "the plugin installed but not asked for",
    "adadecode": "early predictions at the given threshold and cap",
    "threshold-1": "AdaDecode that never predicts early",
}


class ArmProcess:
    """A running arm; a context manager that ends it.

    Attributes:
        arm: A key of :data:`ARMS`.
        start_up_seconds: How long the engine took to start.
    """

    def __init__(self, arm: str, engine: dict[str, Any]) -> None:
        """Start the engine and wait until it can generate.

        Args:
            arm: A key of :data:`ARMS`.
            engine: ``model``, ``heads``, ``threshold``, ``max_early_predictions``,
                ``dtype``, ``kv_cache_gib``, ``texts`` (whether prompts are texts rather
                than token ids) and ``arguments``, more arguments of ``vllm.LLM``.

        Raises:
            RuntimeError: If the engine does not start; with the end of its log.
        """
        self.arm = arm
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        if arm == "ordinary":
            environment["VLLM_PLUGINS"] = ""
        self._log = tempfile.TemporaryFile(  # noqa: SIM115 (closed in __exit__)
            "w+", encoding="utf-8", errors="replace"
        )
        self._process = subprocess.Popen(
            [sys.executable, __file__, arm],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        self.start_up_seconds: float = self._ask(engine)["start_up_seconds"]

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        batch_size: int,
        output_tokens: int,
        ignore_eos: bool,
    ) -> dict[str, Any]:
        """Generate greedily and take the time.

        Args:
            prompts: Texts, or lists of token ids.
            batch_size: Requests at a time.
            output_tokens: Most tokens to generate for a prompt.
            ignore_eos: Generate all of them.

        Returns:
            ``tokens_per_s``, ``seconds``, ``tokens``, ``token_ids`` by prompt and
            AdaDecode's counters as ``stats``, None for other arms.

        Raises:
            RuntimeError: If the engine fails; with the end of its log.
        """
        return self._ask(
            {
                "prompts": list(prompts),
                "batch_size": batch_size,
                "output_tokens": output_tokens,
                "ignore_eos": ignore_eos,
            }
        )

    def memory_mib(self) -> dict[str, float]:
        """Memory of the arm's processes, summed.

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

    def __enter__(self) -> ArmProcess:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the engine."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self.arm} failed:\n{self._log.read()[-3000:]}")
        return json.loads(answer)


def tokens_per_forward(stats: dict[str, Any]) -> float:
    """Tokens that a full forward yields, counted per request."""
    return stats["generated_tokens"] / stats["request_steps"]


def _serve(arm: str) -> None:
    """Start the engine that the first line describes, then answer line by line."""
    # vLLM and its child processes may print; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    started = time.perf_counter()
    llm = _start_engine(arm, json.loads(sys.stdin.readline()))
    answer({"start_up_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        answer(_generate(llm, json.loads(line), counters=not _plain(arm)))
    llm.llm_engine.engine_core.shutdown()


def _plain(arm: str) -> bool:
    return arm in ("ordinary", "installed")


def _start_engine(arm: str, engine: dict[str, Any]) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {}
    if not _plain(arm):
        from adadecode_vllm import engine_args

        options = engine_args(
            engine["heads"],
            threshold=1.0 if arm == "threshold-1" else engine["threshold"],
            max_early_predictions=engine["max_early_predictions"],
        )
    return LLM(
        engine["model"],
        dtype=engine["dtype"],
        skip_tokenizer_init=not engine["texts"],
        kv_cache_memory_bytes=engine["kv_cache_gib"] << 30,
        enable_prefix_caching=False,
        **options,
        **engine["arguments"],
    )


def _generate(llm: Any, job: dict[str, Any], *, counters: bool) -> dict[str, Any]:
    from vllm import SamplingParams

    prompts = job["prompts"]
    texts = isinstance(prompts[0], str)
    params = SamplingParams(
        temperature=0,
        max_tokens=job["output_tokens"],
        ignore_eos=job["ignore_eos"],
        detokenize=texts,
    )
    inputs = [prompt if texts else {"prompt_token_ids": prompt} for prompt in prompts]
    size = job["batch_size"]
    if counters:
        llm.collective_rpc("adadecode_stats", kwargs={"reset": True})
    outputs = []
    started = time.perf_counter()
    for first in range(0, len(inputs), size):
        outputs += llm.generate(inputs[first : first + size], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    tokens = sum(map(len, token_ids))
    return {
        "tokens_per_s": tokens / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "stats": llm.collective_rpc("adadecode_stats")[0] if counters else None,
        "token_ids": token_ids,
    }


if __name__ == "__main__":
    _serve(sys.argv[1])
