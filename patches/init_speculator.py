# SPDX-License-Identifier: Apache-2.0
"""``init_speculator`` builds the class that a ``custom_class`` method names.

Symptom without it: Model Runner V2 ends in ``NotImplementedError: custom_class is not
supported yet``. Which speculator runs is an if/else over vLLM's own methods; V1 has
``create_custom_proposer`` in that place. The runner calls the function in the middle of
its ``__init__`` and sizes what follows by the result, so a subclass cannot add a
speculator afterwards.

Upstream:
https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/worker/gpu/spec_decode/__init__.py
The change to propose there is one more branch::

    elif speculative_config.method == "custom_class":
        cls = resolve_obj_by_qualname(speculative_config.model)
        return cls(vllm_config, device, req_states)

Can go when vLLM has it. The name is replaced only while one runner is built, so nothing
is installed and other engines in the same process keep vLLM's function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.spec_decode import init_speculator

from adadecode_vllm.compat import SUPPORTED_NAMES

logger = init_logger("vllm.adadecode")


@contextmanager
def custom_class() -> Iterator[None]:
    """Let ``GPUModelRunner.__init__`` build speculators of the ``custom_class`` method.

    Raises:
        RuntimeError: If vLLM's module does not look as expected, or another patch is
            already in place.
    """
    if getattr(model_runner, "init_speculator", None) is not init_speculator:
        raise RuntimeError(
            f"adadecode: {model_runner.__name__}.init_speculator is not vLLM's own; "
            f"this plugin was written for vLLM {SUPPORTED_NAMES}. Remove other "
            "patches, or install one of them."
        )
    model_runner.init_speculator = _init_speculator
    logger.debug("init_speculator knows custom_class")
    try:
        yield
    finally:
        model_runner.init_speculator = init_speculator


def _init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
    speculative_config = vllm_config.speculative_config
    if speculative_config.method != "custom_class":
        return init_speculator(vllm_config, device, req_states)
    speculator_class = resolve_obj_by_qualname(speculative_config.model)
    return speculator_class(vllm_config, device, req_states)
