# SPDX-License-Identifier: Apache-2.0
"""vLLM loads on CPUs what it compiled ahead of time for an earlier start.

Symptom without it: every start on a CPU compiles the model and each segment again, and
warns ``Compiling model again due to a load failure from ..., reason: 'function' object
has no attribute 'finalize_loading'``. What was loaded is complete; only vLLM's own
backend, which CPUs do not use, has something left to do, and a method for it.

Quantized models and mixtures of experts compile again as in plain vLLM: whether what
their kernels keep outlives a process was not tried.

Upstream: ``_try_load_aot_compiled_fn`` in
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/compilation/decorators.py
The change to propose there: finish loading only what has such a method.

Can go when vLLM does. What has the method is loaded as before.
"""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_adadecode_original"


def install() -> None:
    """Wrap vLLM's loading of compiled functions; a second call does nothing."""
    from vllm.compilation import decorators

    original = decorators._try_load_aot_compiled_fn
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any:
        import torch

        config = model.vllm_config.model_config
        if config.quantization is not None or config.is_moe:
            return original(model, aot_compilation_path)
        load = torch.compiler.load_compiled_function
        torch.compiler.load_compiled_function = _with_finish(load)
        try:
            return original(model, aot_compilation_path)
        finally:
            torch.compiler.load_compiled_function = load

    setattr(_try_load_aot_compiled_fn, _MARK, original)
    decorators._try_load_aot_compiled_fn = _try_load_aot_compiled_fn


def _with_finish(load: Any) -> Any:
    @functools.wraps(load)
    def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = _nothing_left
        return loaded

    return load_compiled_function


def _nothing_left(vllm_config: Any) -> None:
    """Loading is complete."""
