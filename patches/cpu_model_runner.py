# SPDX-License-Identifier: Apache-2.0
"""``CPUWorker.init_device`` builds the model runner class that a subclass names.

Symptom without it: a subclass of vLLM's CPU worker cannot choose its runner. The CUDA
worker has ``_make_model_runner`` for that; ``CPUWorker.init_device`` names its two
classes (Model Runner V1 and V2) itself, between steps that must run in that order, so a
subclass could only build a second runner (and its buffers) afterwards.

Upstream: https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/worker/cpu_worker.py

Can go when ``CPUWorker`` calls ``self._make_model_runner()``. The name is replaced only
while one worker sets itself up, so nothing is installed and other engines in the same
process keep vLLM's runner.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from adadecode_vllm.compat import SUPPORTED_NAMES

logger = init_logger("vllm.adadecode")


@contextmanager
def use(runner_class: type) -> Iterator[None]:
    """Let ``CPUWorker.init_device`` build another runner class.

    Args:
        runner_class: A subclass of vLLM's runner for CPUs, V1 or V2.

    Raises:
        RuntimeError: If vLLM's module does not look as expected, or another patch is
            already in place.
    """
    module: Any = cpu_worker
    original: type = CPUModelRunner
    if not issubclass(runner_class, CPUModelRunner):
        # Needs Triton, so it is imported only where it is asked for.
        from vllm.v1.worker.cpu import model_runner

        module = model_runner
        original = next(
            base for base in runner_class.__mro__ if base.__module__ == module.__name__
        )
    if getattr(module, "CPUModelRunner", None) is not original:
        raise RuntimeError(
            f"adadecode: {module.__name__}.CPUModelRunner is not vLLM's own; this "
            f"plugin was written for vLLM {SUPPORTED_NAMES}. Remove other patches, or "
            "install one of them."
        )
    module.CPUModelRunner = runner_class
    logger.debug("CPUWorker builds %s", runner_class.__name__)
    try:
        yield
    finally:
        module.CPUModelRunner = original
