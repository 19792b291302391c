# SPDX-License-Identifier: Apache-2.0
"""vLLM refuses bad per-request options, and no good ones.

Symptom without it: requests with ``min_p`` or ``logit_bias`` are answered with HTTP
400, all of them where the model's generation_config.json has a min_p, because vLLM does
not verify drafts of such requests; here they get none. Nor does vLLM 0.33 take a beam
search with ``allowed_token_ids`` beside drafts. And a wrong
``adadecode_threshold`` in ``vllm_xargs`` would be met by the worker, in the middle of a
batch, where the only ways out are to ignore it or to end the engine. vLLM validates
``extra_args`` through custom logits processors only, and a streamed request once its
stream has begun, so that the answer would be HTTP 200 with an error in it.

Upstream: ``InputProcessor._validate_params`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/engine/input_processor.py,
the async generators ``AsyncLLM.generate`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/engine/async_llm.py and
``OpenAIServingResponses._generate_with_builtin_tools`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/entrypoints/openai/responses/serving.py,
``BeamSearchParams.configure_logprobs`` in
https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/sampling_params.py
The change to propose there: let the speculative method validate a request's parameters,
as logits processors do, and validate before a stream begins.

Can go when vLLM does. Requests of engines without AdaDecode are not looked at.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from adadecode_vllm.compat import SUPPORTED_NAMES

_MARK = "_adadecode_original"


def install(*, streams: bool = True) -> None:
    """Wrap what takes requests in; a second call does nothing.

    Args:
        streams: Whether requests may be streamed, as they are not by ``LLM``; importing
            what does so takes a second.

    Raises:
        RuntimeError: If vLLM's classes do not look as expected.
    """
    from vllm.logger import init_logger
    from vllm.v1.engine.input_processor import InputProcessor

    if streams:
        _install_for_streams()
    original = _method(InputProcessor, "_validate_params")
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        from adadecode_vllm.config import engine_config

        if self.speculative_config is not None and engine_config(self.vllm_config):
            # It is read for what vLLM cannot verify with drafts, and for nothing else.
            self.speculative_config = None
        _check_options(params, self.vllm_config)
        return original(self, params, *args, **kwargs)

    setattr(_validate_params, _MARK, original)
    InputProcessor._validate_params = _validate_params
    _install_for_beams()
    init_logger("vllm.adadecode").debug("InputProcessor validates adadecode_ options")


def _method(owner: type, name: str) -> Any:
    original = vars(owner).get(name)
    if original is None:
        raise RuntimeError(
            f"adadecode: {owner.__module__}.{owner.__name__} has no {name}; this "
            f"plugin was written for vLLM {SUPPORTED_NAMES}. Install one of them."
        )
    return original


def _check_options(params: Any, vllm_config: Any) -> None:
    """Refuse a request's bad options with what vLLM's server answers 400 to."""
    from vllm.exceptions import VLLMValidationError

    from adadecode_vllm.config import engine_config
    from adadecode_vllm.errors import AdaDecodeError
    from adadecode_vllm.request_options import parse_request_options

    extra_args = getattr(params, "extra_args", None)
    config = engine_config(vllm_config) if extra_args else None
    if config is not None:
        try:
            parse_request_options(extra_args, config)
        except AdaDecodeError as error:
            raise VLLMValidationError(str(error)) from None


def _install_for_streams() -> None:
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    _check_when_called(AsyncLLM, "generate", lambda llm: llm.vllm_config)
    # Calls the other within a generator of its own.
    _check_when_called(
        OpenAIServingResponses,
        "_generate_with_builtin_tools",
        lambda serving: serving.engine_client.vllm_config,
    )


def _check_when_called(owner: Any, name: str, config_of: Callable[[Any], Any]) -> None:
    """Let an async generator check options when it is called, not when it begins."""
    from vllm.sampling_params import SamplingParams

    original = _method(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            if isinstance(given, SamplingParams):
                _check_options(given, config_of(self))
        return original(self, *args, **kwargs)

    setattr(generate, _MARK, original)
    setattr(owner, name, generate)


def _install_for_beams() -> None:
    from vllm import sampling_params as module

    beams: Any = module.BeamSearchParams
    original = vars(beams).get("configure_logprobs")
    # vLLM 0.32 has none: its beams take no list of tokens.
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def configure_logprobs(self: Any, sampling_params: Any, config: Any) -> Any:
        from adadecode_vllm.config import engine_config

        if config.speculative_config is not None and engine_config(config):
            # Such requests get no drafts, nor do those that share a step with them.
            config = copy.copy(config)
            config.speculative_config = None
        return original(self, sampling_params, config)

    setattr(configure_logprobs, _MARK, original)
    beams.configure_logprobs = configure_logprobs
