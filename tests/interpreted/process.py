# SPDX-License-Identifier: Apache-2.0
"""An engine on Model Runner V2 in a process of its own, reached through a pipe."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import harness

_SITE = Path(__file__).parent / "site"


class EngineProcess:
    """The calls of `tests.harness`, made in the other process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        """Any function of `_Calls`; its exception is raised here."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._connection.send((name, args, kwargs))
            failed, answer = self._connection.recv()
            if failed:
                raise RuntimeError(answer)
            return answer

        return call


@contextmanager
def interpreted_environment() -> Iterator[None]:
    """What a process that starts meanwhile finds, for V2 in Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        # Inductor would ask the backend to compile.
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("PYTHONPATH", str(_SITE), prepend=os.pathsep)
        yield


def join_or_kill(process: BaseProcess, seconds: float) -> None:
    """Wait for a process to end, so long."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()


class _Process:
    """A process that runs one engine after the other; importing vLLM takes longer."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        with interpreted_environment():
            self._process.start()
        theirs.close()  # so that a child that dies ends our waiting
        self.engine = EngineProcess(self._connection)

    def end(self) -> None:
        self._connection.close()
        join_or_kill(self._process, 60)


_idle: list[_Process] = []


@atexit.register
def _end_idle_processes() -> None:
    while _idle:
        _idle.pop().end()


@contextmanager
def start_engine(
    *, multiprocessing: bool = False, **options: Any
) -> Iterator[EngineProcess]:
    """An engine with the defaults of `tests.harness.start_engine`."""
    # Workers take the environment of the process that starts them, hence a new one.
    process = _idle.pop() if _idle and not multiprocessing else _Process()
    try:
        process.engine.start({"multiprocessing": multiprocessing, **options})
        yield process.engine
        process.engine.stop()
    except BaseException:
        process.end()
        raise
    if multiprocessing:
        process.end()
    else:
        _idle.append(process)


class _Calls:
    """What the other process answers; named functions of `tests.harness`."""

    def __init__(self) -> None:
        self._engine: Any = None
        self.llm: Any = None

    def start(self, options: dict[str, Any]) -> None:
        from tests.interpreted import grammar_kernel

        self._engine = harness.start_engine(**options)
        self.llm = self._engine.__enter__()
        grammar_kernel.install()

    def stop(self) -> None:
        if self.llm is not None:
            self.llm = None
            self._engine.__exit__(None, None, None)

    def generate(self, prompts: list[Any], **options: Any) -> list[list[int]]:
        return harness.generate(self.llm, prompts, **options)

    def sample(self, prompts: list[Any], **options: Any) -> list[list[list[int]]]:
        """Token ids of every completion of every prompt."""
        from vllm import SamplingParams

        outputs = self.llm.generate(prompts, SamplingParams(**options), use_tqdm=False)
        return [
            [list(completion.token_ids) for completion in output.outputs]
            for output in outputs
        ]

    def mixed(
        self, prompts: list[Any], options: list[dict[str, Any]]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """Token ids, and the tokens that have logprobs; one batch of all kinds."""
        from vllm import SamplingParams

        params = [SamplingParams(**own) for own in options]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [
            (
                list(text.token_ids),
                [sorted(logprobs) for logprobs in text.logprobs or ()],
            )
            for (text,) in (output.outputs for output in outputs)
        ]

    def structured(self, prompts: list[Any], schema: Any, **options: Any) -> list[str]:
        """Texts that follow a JSON schema, greedily."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        params = SamplingParams(
            temperature=0,
            structured_outputs=StructuredOutputsParams(json=schema),
            **options,
        )
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    @property
    def _runner(self) -> Any:
        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        return worker.model_runner

    def use_whole_steps(self, use: bool) -> None:
        """Run segments as CUDA graphs would, or as without them."""
        from tests.interpreted.eager_steps import EagerSteps

        adadecode = self._runner.adadecode
        with torch.inference_mode():
            steps = EagerSteps(self._runner) if use else None
        adadecode.bind(replace(adadecode.executor.backend, steps=steps))

    def whole_steps(self) -> dict[str, int]:
        """How many of them ran."""
        steps = self._runner.adadecode.executor.steps
        return {
            **steps.drafted,
            "resumed": steps.resumed,
            "prefetched": steps.prefetched["parts"],
            "finished": steps.prefetched["whole"],
        }

    def configure(self, **options: Any) -> None:
        harness.configure(self.llm, **options)

    def stats(self) -> dict[str, Any]:
        return harness.stats(self.llm)

    def ranks(self) -> list[dict[str, Any]]:
        """The counters of all tensor-parallel ranks."""
        return self.llm.collective_rpc("adadecode_stats")

    def drafts_of_requests(self, prompts: list[Any]) -> list[list[int]]:
        return harness.drafts_of_requests(self.llm, prompts)

    def metric(self, name: str) -> float:
        return harness.metric(self.llm, name)

    def finished(self) -> list[tuple[int, int, int]]:
        """Tokens, drafts and accepted drafts of requests that ended, newest first."""
        from adadecode_vllm.engine.finished_requests import RECENT

        return [
            (request.tokens, request.drafted, request.accepted)
            for request in RECENT.newest()
        ]

    def facts(self) -> dict[str, Any]:
        """Which parts of vLLM the engine was made of."""
        config = self.llm.llm_engine.vllm_config
        return {
            "v2": config.use_v2_model_runner,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "runner": type(self._runner).__name__,
        }


def _serve(connection: Connection) -> None:
    calls = _Calls()
    try:
        while True:
            name, args, kwargs = connection.recv()
            try:
                connection.send((False, getattr(calls, name)(*args, **kwargs)))
            except Exception as error:
                connection.send((True, f"{type(error).__name__}: {error}"))
    except EOFError:
        calls.stop()
