# SPDX-License-Identifier: Apache-2.0
"""vLLM refuses bad per-request options, and no good ones.

Symptom without it: requests with ``min_p`` or ``logit_bias`` are answered with HTTP
400, all of them where the model's generation_config.json has a min_p, because vLLM does
not verify drafts of such requests; here they get none. Nor does vLLM 0.33 take a beam
search with ``allowed_token_ids`` beside drafts. And a wrong
``adadecode_threshold`` in ``vllm_xargs`` would be met by the worker, in the middle of a
batch, where the only ways out are to ignore it or to end the engine. vLLM validates
``extra_args`` through custom logits processors only.

Upstream: ``InputProcessor._validate_params`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/engine/input_processor.py and
``BeamSearchParams.configure_logprobs`` in
https://github.com/vllm-project/vllm/blob/v0.33.0/vllm/sampling_params.py
The change to propose there: let the speculative method validate a request's parameters,
as logits processors do.

Can go when vLLM does. Requests of engines without AdaDecode are not looked at.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from adadecode_vllm.compat import SUPPORTED_NAMES

_MARK = "_adadecode_original"


def install() -> None:
    """Wrap both; a second call does nothing.

    Raises:
        RuntimeError: If vLLM's class does not look as expected.
    """
    from vllm.logger import init_logger
    from vllm.v1.engine.input_processor import InputProcessor

    original = vars(InputProcessor).get("_validate_params")
    if original is None:
        raise RuntimeError(
            "adadecode: vllm.v1.engine.input_processor.InputProcessor has no "
            f"_validate_params; this plugin was written for vLLM {SUPPORTED_NAMES}. "
            "Install one of them."
        )
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.exceptions import VLLMValidationError

        from adadecode_vllm.config import engine_config
        from adadecode_vllm.errors import AdaDecodeError
        from adadecode_vllm.request_options import parse_request_options

        extra_args = getattr(params, "extra_args", None)
        if self.speculative_config is not None and engine_config(self.vllm_config):
            # It is read for what vLLM cannot verify with drafts, and for nothing else.
            self.speculative_config = None
        config = engine_config(self.vllm_config) if extra_args else None
        if config is not None:
            try:
                parse_request_options(extra_args, config)
            except AdaDecodeError as error:
                # What vLLM's server answers 400 to; other errors are its own.
                raise VLLMValidationError(str(error)) from None
        return original(self, params, *args, **kwargs)

    setattr(_validate_params, _MARK, original)
    InputProcessor._validate_params = _validate_params
    _install_for_beams()
    init_logger("vllm.adadecode").debug("InputProcessor validates adadecode_ options")


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
