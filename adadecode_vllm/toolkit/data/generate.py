# SPDX-License-Identifier: Apache-2.0
"""The target model answers prompts, greedily, through vLLM.

All prompts of a shard are given to the engine at once, and the engine starts each shard
without anything left of the one before (no prefix caching, and no second process whose
timing decides which requests share a step). So a shard's rows do not depend on which
shards the same engine answered earlier, which is what makes several engines side by
side give the same rows. Answers are handed on as they finish. Where some of a shard
were kept from an interrupted run, the others share their steps with fewer: in float32
they are the same, in 16 bits a tie may fall the other way.
"""

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from adadecode_vllm.errors import AdaDecodeError

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0
_OWN_FLAGS = {
    "model": "--model",
    "dtype": "--dtype",
    "trust_remote_code": "--trust-remote-code",
}


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is started with; plain values, so that it can be sent to actors.

    Attributes:
        model: Directory or Hugging Face name.
        dtype: vLLM's `dtype`.
        max_new_tokens: Most tokens of an answer.
        options: Further engine arguments.
        trust_remote_code: Whether program code that comes with the model may run.
    """

    model: str
    dtype: str
    max_new_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False


#: Rows that are to be answered, by shard: the prompts' token ids by row.
Shards = Mapping[int, Mapping[int, list[int]]]


class Answer(NamedTuple):
    """The answer of one row.

    Attributes:
        shard: The shard.
        row: The row.
        token_ids: The answer, with its end-of-sequence token unless it was cut off.
        began: When an engine that had started took the shard up, in seconds since the
            epoch.
    """

    shard: int
    row: int
    token_ids: list[int]
    began: float


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse engine options that vLLM does not have or that have a flag of their own.

    Args:
        options: What `--engine` holds.

    Raises:
        AdaDecodeError: There is such an option, or vLLM is not installed.
    """
    for name, flag in _OWN_FLAGS.items():
        if name in options:
            raise AdaDecodeError(
                f"--engine: {name!r} has a flag of its own; pass {flag}"
            )
    try:
        from vllm import EngineArgs
    except ImportError as error:
        raise AdaDecodeError(
            f"adadecode data: vLLM, which lets the model answer, is not installed "
            f"({error}); install the extra `cpu` or `cuda` as docs/get-started.md "
            "says, or pass --finished for text that is complete"
        ) from error

    known = {f.name for f in fields(EngineArgs)}
    if unknown := sorted(set(options) - known):
        raise AdaDecodeError(
            f"--engine: vLLM has no engine argument {', '.join(unknown)}; use the "
            "names of its flags with underscores, such as max_model_len"
        )


def model_length(spec: EngineSpec) -> int:
    """Return the most tokens, prompt and answer, that vLLM will serve the model with.

    Args:
        spec: The engine's arguments; no engine is started.

    Raises:
        AdaDecodeError: vLLM refuses the model or an option.
    """
    from vllm import EngineArgs

    try:
        dtype: Any = spec.dtype  # vLLM checks it
        arguments = EngineArgs(
            model=spec.model,
            dtype=dtype,
            trust_remote_code=spec.trust_remote_code,
            **spec.options,
        )
        return int(arguments.create_model_config().max_model_len)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise _refused(spec, error) from error


def dtype_here(dtype: str) -> str:
    """Decide what vLLM's dtype `auto` is on this machine.

    vLLM takes bfloat16, which CPUs without AVX-512 compute several times as slowly as
    float32.

    Args:
        dtype: vLLM's `dtype`.

    Returns:
        The same, or `float32` in place of `auto` on such a CPU.
    """
    import torch

    slow = (
        not torch.cuda.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )
    if dtype != "auto" or not slow:
        return dtype
    logger.warning("Answering in float32: this CPU has no AVX-512 for bfloat16")
    return "float32"


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Let vLLM run an engine that starts here in this process; see the docstring above.

    Afterwards the environment is as before: processes that this one starts inherit it.
    """
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    if name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


class Generator:
    """One engine that answers shards.

    Args:
        spec: The engine's arguments.

    Raises:
        AdaDecodeError: vLLM could not start the engine.
    """

    def __init__(self, spec: EngineSpec) -> None:
        from safetensors import SafetensorError
        from vllm import LLM, SamplingParams

        options = {
            "enable_prefix_caching": False,
            **spec.options,
            "dtype": dtype_here(spec.dtype),
            "trust_remote_code": spec.trust_remote_code,
        }
        try:
            with _in_this_process():
                self._llm = LLM(spec.model, **options)
        except (
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
            SafetensorError,
        ) as error:
            _end_process_groups()
            raise _refused(spec, error) from error
        self._params = SamplingParams(
            temperature=0, max_tokens=spec.max_new_tokens, detokenize=False
        )

    def answer(
        self,
        shard: int,
        prompts: Mapping[int, list[int]],
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ) -> Iterator[Answer]:
        """Answer the prompts of one shard.

        Args:
            shard: The shard.
            prompts: Token ids by row.
            on_tokens: Called now and then with the number of tokens that unfinished
                answers have.

        Yields:
            Answers as they finish.
        """
        from vllm import RequestOutput, TokensPrompt

        began = time.time()
        engine = self._llm.llm_engine
        # All at once, as one batch.
        ids = self._llm.enqueue(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts.values()],
            self._params,
            use_tqdm=False,
        )
        # vLLM names a request `id-random` and its output `id`.
        row_of = {
            name.partition("-")[0]: row for name, row in zip(ids, prompts, strict=True)
        }
        reported = time.monotonic()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not (isinstance(output, RequestOutput) and output.finished):
                    continue
                row = row_of[output.request_id]
                if output.prompt_token_ids != prompts[row]:
                    raise RuntimeError("vLLM changed the token ids of a prompt")
                yield Answer(shard, row, list(output.outputs[0].token_ids), began)
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                states = engine.output_processor.request_states.values()
                counters = [state.detokenizer for state in states]
                on_tokens(sum(c.num_output_tokens() for c in counters if c))
                reported = time.monotonic()

    def close(self) -> None:
        """Stop the engine and free its memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        _end_process_groups()


def _end_process_groups() -> None:
    """Leave nothing of vLLM's that the process's next engine would take for its own."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def generate(
    spec: EngineSpec,
    shards: Shards,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Answer]:
    """Answer shards one after the other with an engine in this process.

    Args:
        spec: The engine's arguments.
        shards: What is to be answered.
        on_tokens: Called now and then with the number of tokens that unfinished
            answers have.

    Yields:
        Answers as they finish.

    Raises:
        AdaDecodeError: vLLM could not start the engine.
    """
    generator = Generator(spec)
    try:
        for index, prompts in shards.items():
            yield from generator.answer(index, prompts, on_tokens)
    finally:
        generator.close()


def _refused(spec: EngineSpec, error: Exception) -> AdaDecodeError:
    """Turn vLLM's report into a sentence; the log above it has the rest."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    # pydantic: "1 validation error for ModelConfig", then "  Value error, ..."
    if "validation error" in reason and len(lines) > 1:
        reason = lines[1].removeprefix("Value error, ").partition(" [type=")[0]
    return AdaDecodeError(
        f"--model {spec.model}: vLLM cannot serve it ({reason.rstrip('.')}); correct "
        "--model, --dtype or --engine"
    )
